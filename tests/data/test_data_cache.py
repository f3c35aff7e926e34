"""The token cache and the worker processes: whole or not there, shared, rebuilt when it must be."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_gemma4.config import DataConfig
from mlx_gemma4.data import dataset
from mlx_gemma4.data.chat.encode import Chunk, Task, encode_chunk
from mlx_gemma4.data.dataset import read
from mlx_gemma4.data.example import Facts
from mlx_gemma4.data.store import cache
from mlx_gemma4.data.store.cache import cached
from mlx_gemma4.data.store.workers import Workers
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tokenizer import TextSide, text_side

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"},
                  {"role": "assistant", "content": f"Value {i * i}."}]}
    for i in range(60)
]  # fmt: skip


@pytest.fixture(scope="session")
def side(checkpoints):
    return text_side(checkpoints["e2b"])


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def builds(tmp_path, monkeypatch) -> list[str]:
    """Every read goes through a cache of its own, and each build is noted."""
    noted: list[str] = []

    class Here:
        def __init__(self, task):
            self._task = task

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def encode(self, jobs):
            noted.append("built")
            return (encode_chunk(self._task, job) for job in jobs)

    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "SMALL", 0)
    monkeypatch.setattr(dataset, "Workers", Here)
    return noted


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.tokens, y.tokens)
        and np.array_equal(x.mask, y.mask)
        and x.origin == y.origin
        for x, y in zip(a, b)
    )


def test_the_cache_gives_what_memory_gives(path, side, builds, monkeypatch):
    first, second = read(path, side), read(path, side)
    assert builds == ["built"]
    monkeypatch.setattr(dataset, "SMALL", 1 << 30)
    plain = read(path, side)
    assert same(plain.train, first.train)
    assert same(plain.train, second.train)
    assert repr(first) == repr(second) == repr(plain)
    assert second.stats() == plain.stats()
    assert isinstance(second.train.stores[0].tokens, np.memmap)
    assert second.train.lengths.tolist() == [len(example) for example in plain]
    assert second.train.targets.tolist() == [example.num_targets for example in plain]


def test_slices_and_items_from_the_end(path, side, builds):
    data = read(path, side)
    assert data[-1].origin.endswith(":60")
    assert [e.origin for e in data[1::20]] == [data[i].origin for i in (1, 21, 41)]
    assert data[1::20].lengths.tolist() == data.train.lengths[[1, 21, 41]].tolist()
    with pytest.raises(IndexError):
        data[60]


@pytest.mark.parametrize(
    "change",
    [
        {"train_on": "last"},
        {"thinking": "drop"},
        {"max_seq_length": 100},
        {"overlong": "error"},
        {"overlong": "truncate"},
        {"truncate_from": "start"},
        {"on_bad_row": "skip"},
        {"columns": ("messages=messages",)},
        {"media_anywhere": True},
    ],
)
def test_another_setting_is_another_entry(path, side, builds, change):
    read(path, side)
    read(path, side, DataConfig(**change))
    read(path, side, DataConfig(valid_fraction=0.1))  # chosen behind the cache
    assert builds == ["built"] * 2


def test_another_content_of_the_same_size_and_time_is_another_entry(path, side, builds):
    before, stat = read(path, side), path.stat()
    path.write_text(path.read_text().replace("What is 7?", "What is 8?"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert not same(before.train, read(path, side).train)
    assert builds == ["built"] * 2


def test_another_template_or_tokenizer_is_another_entry(path, side, builds):
    side = TextSide(dataclasses.replace(side.plan, vocab_size=2000), side.tokenizer)
    read(path, side)
    template, words, ends = (copy.deepcopy(side.tokenizer) for _ in range(3))
    template.chat_template = "{# another #}" + template.chat_template
    words.add_tokens(["Value"])
    ends.eos_token = "<turn|>"
    after = [read(path, TextSide(side.plan, other)) for other in (template, words, ends)]
    assert builds == ["built"] * 4
    assert not same(after[0].train, after[1].train)


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.npy", "facts.json"])
def test_a_damaged_entry_is_built_again(path, side, builds, tmp_path, name):
    before = read(path, side)
    (file,) = (tmp_path / "cache" / "tokens").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-3])
    assert same(before.train, read(path, side).train) or name == "tokens.bin"
    assert builds == ["built"] * 2
    assert len(read(path, side)) == 60
    assert builds == ["built"] * 2


def test_a_bad_row_leaves_nothing_behind(path, side, builds, tmp_path):
    with path.open("a") as file:
        file.write("broken\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl:61: is not JSON"):
            read(path, side)
    assert builds == ["built"] * 2
    assert not [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]


def test_what_was_left_out_is_remembered(path, side, builds):
    with path.open("a") as file:
        file.write('broken\n{"text": "' + "long " * 3000 + '"}\n')
    config = DataConfig(on_bad_row="skip")
    first, second = read(path, side, config), read(path, side, config)
    assert builds == ["built"]
    assert second.facts == first.facts
    assert (second.facts.bad, second.facts.skipped) == (1, 1)


def test_a_cache_that_cannot_be_written(path, side, builds, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(path))
    with pytest.raises(DataError, match="cannot write the token cache") as error:
        read(path, side)
    assert "MLX_GEMMA4_CACHE" in error.value.do


# ---------------------------------------------------------------- two runs, and one that is killed

BUILD = """
import json, sys, time
from pathlib import Path
from mlx_gemma4.data.store.cache import cached
def build(folder):
    (folder / "a").write_text("half")
    with open(sys.argv[1], "a") as log: log.write("building\\n")
    time.sleep(float(sys.argv[2]))
    (folder / "a").write_text("whole")
    sizes = {"a": len("whole")}
    (folder / "facts.json").write_text(json.dumps({"facts": {}, "sizes": sizes}))
print((cached("key", build) / "a").read_text())
"""


def starting(tmp_path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path / "log"), str(seconds)],
        env=os.environ | {"MLX_GEMMA4_CACHE": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )


def log(tmp_path) -> list[str]:
    return (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []


def test_two_runs_build_once(tmp_path):
    runs = [starting(tmp_path, 1) for _ in range(3)]
    assert [run.communicate()[0] for run in runs] == ["whole\n"] * 3
    assert log(tmp_path) == ["building"]


def test_a_run_killed_while_writing_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    run = starting(tmp_path, 60)
    while not log(tmp_path):
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    [left] = (tmp_path / "tokens").glob(".partial-*-key/a")
    assert left.read_text() == "half"
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path))

    def build(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "a").write_text("ours")
        (folder / "facts.json").write_text(json.dumps({"sizes": {"a": len("ours")}}))

    assert (cached("key", build) / "a").read_text() == "ours"


# ---------------------------------------------------------------- worker processes


def chunks_of(path, size: int = 10) -> list[Chunk]:
    lines = list(enumerate(path.read_bytes().splitlines(), 1))
    return [Chunk("rows:", None, lines[i : i + size]) for i in range(0, len(lines), size)]


def test_workers_give_the_same_in_the_same_order(path, side):
    task = Task(side.tokenizer, side.plan.vocab_size, DataConfig())
    with Workers(task, 2) as workers:
        encoded = list(workers.encode(chunks_of(path)))
    assert len(workers._processes) == 2
    assert all(process.poll() is not None for process in workers._processes)
    for ours, plain in zip(encoded, [encode_chunk(task, chunk) for chunk in chunks_of(path)]):
        assert np.array_equal(ours.tokens, plain.tokens)
        assert np.array_equal(ours.numbers, plain.numbers)
        assert ours.facts == plain.facts


def test_the_bad_rows_of_all_chunks_are_told_in_order(path, side):
    lines = path.read_bytes().splitlines()
    lines[30] = lines[50] = b"broken"
    path.write_bytes(b"\n".join(lines))
    task = Task(side.tokenizer, side.plan.vocab_size, DataConfig())
    facts = Facts()
    with Workers(task, 2) as workers:
        for store in workers.encode(chunks_of(path)):
            facts.add(store.facts)
    assert [told.split(" is not")[0] for told in facts.bad_rows] == ["rows:31:", "rows:51:"]


def test_a_worker_that_is_killed_is_an_error_and_no_wait(path, side):
    task = Task(side.tokenizer, side.plan.vocab_size, DataConfig())
    with Workers(task, 1) as workers:
        results = workers.encode(chunks_of(path, 2))
        next(results)
        workers._processes[0].kill()
        with pytest.raises(DataError, match=r"a tokenizing process ended \(exit code -9\)"):
            list(results)


def test_workers_start_from_a_script_without_a_guard_and_from_no_script_at_all(
    path, tiny, tmp_path
):
    """A notebook has no file to import again; what multiprocessing spawns would need one."""
    script = (
        "import mlx_gemma4.data.dataset as dataset\n"
        "from mlx_gemma4.model.tokenizer import text_side\n"
        "dataset.SMALL = 0\n"
        f"data = dataset.read({str(path)!r}, text_side({str(tiny)!r}))\n"
        "print(len(data))\n"
    )
    done = subprocess.run(
        [sys.executable, "-"],
        input=script,
        env=os.environ | {"MLX_GEMMA4_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr


# ---------------------------------------------------------------- the key, and what workers load


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A copy of the modules of data/, of which keys are made."""
    copied = tmp_path / "data"
    shutil.copytree(cache._PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "_PACKAGE", copied)
    return copied


@pytest.mark.parametrize(
    "name", ["data/inspect.py", "data/dataset.py", "data/batch/order.py", "data/__main__.py"]
)
def test_code_that_decides_no_token_is_not_in_the_key(code, side, name):
    task = Task(side.tokenizer, side.plan.vocab_size, DataConfig())
    before = cache.tokens_key(task)
    (code / name).write_text((code / name).read_text() + "\nCHANGED = 1\n")
    assert cache.tokens_key(task) == before


@pytest.mark.parametrize("name", cache.CODE)
def test_code_that_decides_tokens_is_in_the_key(code, side, name):
    task = Task(side.tokenizer, side.plan.vocab_size, DataConfig())
    before = cache.tokens_key(task)
    (code / name).write_text((code / name).read_text() + "\nCHANGED = 1\n")
    assert cache.tokens_key(task) != before


def test_workers_load_no_mlx_and_no_module_that_the_key_does_not_name(tiny):
    script = (
        "import sys\n"
        "import mlx_gemma4.data.store.workers\n"
        "from pathlib import Path\n"
        "from mlx_gemma4.config import DataConfig\n"
        "from mlx_gemma4.data.chat.encode import Chunk, Task, encode_chunk\n"
        "from mlx_gemma4.model.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer(Path({str(tiny)!r}))\n"
        'rows = [(1, b\'{"prompt": "Hi", "completion": "Hello"}\')]\n'
        "encode_chunk(Task(tokenizer, 9999, DataConfig()), Chunk('rows:', None, rows))\n"
        "ours = ('mlx_gemma4.data.', 'mlx_gemma4.media.')\n"
        "files = [m.__file__ for n, m in sys.modules.items() if n.startswith(ours)]\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('mlx', 'mlx_lm', 'mlx_vlm')])\n"
        "print('\\n'.join(files))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy, *files = done.stdout.split("\n")[:-1]
    assert heavy == "[]"
    loaded = {Path(file).relative_to(cache._PACKAGE).as_posix() for file in files}
    assert {name for name in loaded if not name.endswith("__init__.py")} <= set(cache.CODE)
    assert all((cache._PACKAGE / name).exists() for name in cache.CODE)
