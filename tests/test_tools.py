"""tools/make-venv finds a Python that will do, or says what to install."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "make-venv"
TOO_OLD = "exit 1"
GOOD = 'case "$1" in -c) exit 0;; *) echo "$0" "$@" >>"$LOG";; esac'


@pytest.fixture
def run(tmp_path):
    """Run the script with only the given programs on PATH; returns the result and what they did."""

    def run(**programs: str):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "cat").symlink_to(shutil.which("cat"))
        for name, body in programs.items():
            path = folder / name.replace("_", ".")
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        log = tmp_path / "log"
        result = subprocess.run(
            ["/bin/sh", str(SCRIPT), str(tmp_path / "venv")],
            env={"PATH": str(folder), "LOG": str(log), "HOME": os.environ.get("HOME", "/")},
            capture_output=True,
            text=True,
        )
        return result, log.read_text() if log.exists() else ""

    return run


def test_the_default_python_when_it_is_new_enough(run):
    result, done = run(python3=GOOD)
    assert result.returncode == 0
    assert "python3 -m venv" in done


def test_another_python_when_the_default_is_too_old(run):
    result, done = run(python3=TOO_OLD, python3_12=GOOD)
    assert result.returncode == 0
    assert "python3.12 -m venv" in done


def test_uv_when_no_python_will_do(run):
    result, done = run(python3=TOO_OLD, uv='echo uv "$@" >>"$LOG"')
    assert result.returncode == 0
    assert "uv venv" in done and "--seed" in done


def test_says_what_to_install(run):
    result, _ = run(python3=TOO_OLD)
    assert result.returncode == 1
    for part in ("no Python 3.10 or later", "wanted:", "brew install python", "uv"):
        assert part in result.stderr


def test_an_environment_that_is_there_is_kept(run, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    result, done = run(python3=GOOD)
    assert result.returncode == 0
    assert done == ""
