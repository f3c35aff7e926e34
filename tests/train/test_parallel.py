"""Data parallel: the ranks of a run are one run, as if one process had taken all rows."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import CHAT, relative_gap, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.data.batch.order import BatchOrder
from mlx_gemma4.train.parallel import Ranks
from mlx_gemma4.train.prefetch import Progress, training_steps

ROOT = Path(g4.__file__).parents[1]
SETTINGS = {
    "packing": False, "batch_size": 4, "grad_accumulation_steps": 2, "learning_rate": 1e-3,
    "eval_every": 1, "report_every": 1, "save_every": 1, "max_grad_norm": 0.5,
    "rematerialize": "none",
    "optimizer": "adafactor",  # whose state is smooth: rounding is not blown up as by Adam
}  # fmt: skip
ROWS = [*CHAT, CHAT[0], {"prompt": "Read.", "completion": "It yields values."}, CHAT[1]]

WORK = """\
import hashlib, sys
import numpy as np
import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
model, rows, output = sys.argv[1:]
gemma = g4.load(model)
config, lora = g4.TrainConfig(iters=2, **{}), g4.LoraConfig(rank=2, targets=('q_proj',))
run = g4.finetune(gemma, g4.read(rows, gemma), config, lora=lora, output=output)
digest = hashlib.sha256()
for name, value in sorted(flat(gemma.backbone.trainable_parameters()).items()):
    digest.update(np.array(value).tobytes())
print("digest", digest.hexdigest(), run.summary["val_loss"], file=sys.stderr)
""".replace("**{}", f"**{SETTINGS}")


def launch(count: int, folder: Path, *words) -> list[subprocess.Popen]:
    """So many ranks on this machine, as mlx.launch starts them."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    place = {"PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(folder / "hosts.json")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, **place, "MLX_RANK": str(rank)}, **pipes,
        )
        for rank in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), told
    return told


def assert_same_run(output: Path, reference: g4.Run, steps: int) -> None:
    weights = mx.load(str(output / "checkpoints" / f"step-{steps:06d}" / "adapters.safetensors"))
    expected = mx.load(str(reference.output / "adapter" / "adapters.safetensors"))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_gap(weights[name], np.array(value)) < 1e-5, name
    history = [m for m in g4.Run.open(output).history if m["step"] <= steps]
    assert [m["step"] for m in history] == [m["step"] for m in reference.history]
    for ours, theirs in zip(history, reference.history):
        assert ours["tokens"] == theirs["tokens"]
        for key in ("loss", "val_loss", "grad_norm"):
            one, other = ours[key], theirs[key]
            assert one is other is None or one == pytest.approx(other, rel=1e-5), key


def test_two_ranks_and_then_three_are_the_run_of_one_and_end_together(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows", train=ROWS, valid=ROWS[:3])
    out = tmp_path / "out"
    (printed, first), (silent, second) = ended(launch(2, tmp_path, "-c", WORK, tiny, rows, out))
    gemma = g4.load(tiny)
    data = g4.read(rows, gemma)
    lora = g4.LoraConfig(rank=2, targets=("q_proj",))
    place = {"output": tmp_path / "alone", "console": False}
    alone = g4.finetune(gemma, data, g4.TrainConfig(iters=2, **SETTINGS), lora=lora, **place)
    assert_same_run(out, alone, 2)
    assert "step 2 of 2" in printed and not silent
    assert first.split("digest")[1] == second.split("digest")[1]

    words = ["-m", "mlx_gemma4.train", "--resume", "--output", out, "--keep-checkpoints", 1000]
    one, *others = launch(3, tmp_path, *words, "--iters", 100_000)
    told = ""
    for line in one.stdout:
        told += line
        if line.startswith("step 4 "):
            break
    others[1].send_signal(signal.SIGKILL)
    since = time.monotonic()
    one.stdout.close()
    error = one.stderr.read()
    assert [one.wait(), others[0].wait()] == [2, 2] and time.monotonic() - since < 30
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert "error: rank 0 has lost another rank" in error
    assert "going on after step 2" in told
    assert [other.communicate()[0] for other in others] == ["", ""]
    alone = g4.finetune(gemma, data, g4.TrainConfig(iters=3, **SETTINGS), resume=True, **place)
    assert_same_run(out, alone, 3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "alone", "out", "rows"
    ]  # fmt: skip


class Fixed(Ranks):
    """One rank of several, which hears from no other."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def told(self, value):
        return {"rows": "a", "seed": 1}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_every_example_is_on_one_rank(gemma, size, packing):
    data = g4.read(ROWS * 2, gemma)
    order = BatchOrder.of(data.train, 96, 4, packing, 3)

    def steps(ranks: Ranks) -> list:
        return [*training_steps(gemma, data.train, order, Progress(), 5, 2, ranks)]

    whole, parts = steps(Ranks()), [steps(Fixed(rank, size)) for rank in range(size)]
    for one, *shares in zip(whole, *parts):
        found = sorted(e.origin for share in shares for e in share.examples)
        assert found == sorted(e.origin for e in one.examples)
        assert {share.num_tokens for share in shares} == {one.num_tokens}
        counts = [[b.num_targets.item() for b in step.batches] for step in (one, *shares)]
        assert np.sum(counts[1:], axis=0).tolist() == counts[0]


def test_ranks_that_would_train_something_else_are_refused(gemma):
    ranks = Fixed(1, 2)
    ranks.require_same({"rows": "a", "seed": 1})
    with pytest.raises(g4.TrainingError, match="rank 1 has other values than rank 0 of rows, seed"):
        ranks.require_same({"rows": "b", "seed": 2})


def test_each_rank_needs_a_row(gemma, monkeypatch):
    monkeypatch.setattr(Ranks, "join", lambda: Fixed(0, 2))
    with pytest.raises(g4.TrainingError, match="batch_size is 1, for 2 ranks"):
        g4.finetune(gemma, g4.read(ROWS, gemma))
