"""The commands as processes: pipes, terminals without Unicode, caches, Ctrl-C, two at once."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHAT, write_rows
from test_cli import small_default  # noqa: F401

import mlx_gemma4 as g4
from mlx_gemma4.errors import run_command
from mlx_gemma4.train import __main__ as train
from mlx_gemma4.train import embedded

ROOT = Path(g4.__file__).parents[1]


def start(*words, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(command, env=environment, **pipes | options)


def training(tiny, rows, *more, **options) -> subprocess.Popen:
    words = ["--model", tiny, "--data", rows, "--report-every", 1, "--no-packing", *more]
    return start("mlx_gemma4.train", *words, **options)


def read_until(process: subprocess.Popen, text: str) -> str:
    told = ""
    for line in process.stdout:
        told += line
        if text in line:
            return told
    raise AssertionError(told + process.stderr.read())


def test_a_reader_that_goes_ends_the_command_quietly(tiny, rows, tmp_path):
    """As in `python -m mlx_gemma4.train ... | head -1`."""
    process = training(tiny, rows, "--iters", 500, "--output", tmp_path / "out")
    assert process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 141
    assert told == ""


def test_help_into_a_reader_that_goes(tmp_path):
    process = start("mlx_gemma4.train", "--help")
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() in (0, 141)  # argparse passes over it
    assert told == ""


def test_a_terminal_without_unicode_gets_escapes(tiny, tmp_path):
    data = write_rows(tmp_path / "daten_ü", train=CHAT)
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    process = training(tiny, data, "--iters", 1, "--output", tmp_path / "läuft", env=ascii_only)
    told, wrong = process.communicate()
    assert (process.returncode, wrong) == (0, "")
    assert "daten_\\xfc" in told and "l\\xe4uft/adapter" in told


def test_ctrl_c_saves_and_the_printed_command_goes_on(tiny, rows, tmp_path):
    process = training(tiny, rows, "--iters", 500, "--output", tmp_path / "my run")
    told = read_until(process, "step 2 of 500")
    process.send_signal(signal.SIGINT)
    rest, wrong = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in wrong
    assert "saving after this step" in wrong and "stopped: what was saved is kept" in wrong
    step = int(re.search(r"stopped after step (\d+): Ctrl-C", rest)[1])
    assert (tmp_path / "my run" / "checkpoints" / f"step-{step:06d}").is_dir()
    command = re.search(r"to go on: python -m (.*)", told + rest)[1]
    flags = ["--iters", str(step + 1)]
    done = subprocess.run(
        f"{sys.executable} -m {command} {' '.join(flags)}",
        shell=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}\n" in done.stdout
    assert f"step {step + 1} of {step + 1}:" in done.stdout


def test_two_runs_that_start_together_write_to_two_folders(tiny, rows, tmp_path):
    both = [training(tiny, rows, "--iters", 1, cwd=tmp_path) for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    folders = sorted(re.search(r"adapter: (\S+)/adapter", out)[1] for out, _ in told)
    assert folders == ["runs/1", "runs/2"]
    assert {len(g4.Run.open(tmp_path / folder).history) for folder in folders} == {2}


# ---------------------------------------------------------------- in this process


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_anywhere_is_one_error(code, capsys):
    def main():
        raise OSError(code, os.strerror(code), "some/file")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: cannot write some/file: {os.strerror(code)}\n  wanted: ")


def test_another_failure_keeps_its_traceback():
    def main():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        run_command(main)


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written(small_default, tmp_path, monkeypatch, place):  # noqa: F811
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / place))
    with pytest.raises(g4.ConfigError, match="cannot write the cache") as error:
        train.main([])
    assert error.value.do == "set MLX_GEMMA4_CACHE to another folder"
    assert not Path("runs/1").exists()


def test_a_damaged_cache_is_built_again(small_default, capsys):  # noqa: F811
    model, _ = embedded.prepare()
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for damage in (
        lambda: weights.write_bytes(content[:1000]),
        lambda: weights.write_bytes(content[:-4] + b"\xff\xff\xff\xff"),
        (model / "tokenizer.json").unlink,
        lambda: (shutil.rmtree(model.parent), model.parent.mkdir()),
        (model.parent / "hashes.json").unlink,
    ):
        damage()
        capsys.readouterr()
        assert embedded.prepare()[0] == model
        assert "building a small Gemma 4" in capsys.readouterr().out
        assert weights.stat().st_size == len(content)
        embedded.prepare()
        assert "building" not in capsys.readouterr().out
