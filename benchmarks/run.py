"""Ours beside the others, each in a process of its own, on the same checkpoint and tokens.

    make bench                                             # the middle-size model, T 2048
    python benchmarks/run.py --length 8192 --steps 1
    python benchmarks/run.py --short                       # 64 short samples, batches of 4
    python benchmarks/run.py --rounds 3                    # by turns, where speed drifts
    python benchmarks/run.py --only unsloth "ours lean" --unsloth-python VENV/bin/python
    python benchmarks/run.py --model google/gemma-4-E2B-it --dtype bfloat16 --json results.json

Times are medians of steps (with --short: epochs) after the first, and of rounds; memory is the
allocator's peak after the first minus what was resident before it. A contestant that is not
installed or fails is left out, and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestant import CONTESTANTS
from middle import build_middle
from table import table

HERE = Path(__file__).parent


def main() -> None:
    given = _arguments()
    model = given.model or str(build_middle(Path("runs/middle")).resolve())
    words = ["--model", model, "--dtype", given.dtype, "--vocab", str(_vocab_size(model))]
    words += ["--batch", str(given.batch), "--length", str(given.length)]
    words += ["--steps", str(given.steps), "--samples", str(given.samples)]
    words += ["--short"] if given.short else []
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    left_out: dict[str, str] = {}
    for name in given.only * given.rounds:
        if name in left_out:
            continue
        with tempfile.TemporaryDirectory() as empty:
            cold = empty if given.cold else None
            record = _contest(name, given.unsloth_python, words, given.verbose, cold)
        if "left_out" in record:
            left_out[name] = record["left_out"]
        else:
            records[name].append(record)
        print(f"  {name}: {'left out' if name in left_out else 'done'}", file=sys.stderr)
    results = [_median(of_one) for name, of_one in records.items() if name not in left_out]
    if results:
        print(table(results, given.against, given.short))
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    if given.json:
        whole = {"machine": _machine(), "results": results, "left_out": left_out}
        given.json.write_text(json.dumps(whole, indent=2) + "\n")
    if any(name.startswith("ours") for name in left_out):
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: a middle-size random model with E2B's features")
    parser.add_argument("--dtype", default="float32", help="of weights and computation")
    parser.add_argument("--batch", type=int, default=1, help="rows of a dense load")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a dense row")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a dense load")
    parser.add_argument("--short", action="store_true", help="short samples in place of dense rows")
    parser.add_argument("--samples", type=int, default=64, help="how many short samples")
    parser.add_argument("--rounds", type=int, default=1, help="how often all take their turn")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--against", choices=CONTESTANTS, help="ratios to it; default: the first")
    parser.add_argument(
        "--unsloth-python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter that has unsloth_zoo with its MLX parts, and no torch",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="first epochs begin without the compiled kernels that MLX keeps in TMPDIR on a CPU",
    )
    parser.add_argument("--verbose", action="store_true", help="show what contestants print")
    return parser.parse_args()


def _contest(
    name: str, unsloth_python: str, words: list[str], verbose: bool, cold: str | None
) -> dict[str, Any]:
    interpreter = unsloth_python if name == "unsloth" else sys.executable
    environment = dict(os.environ) | ({"TMPDIR": cold} if cold else {})
    try:
        done = subprocess.run(
            [interpreter, str(HERE / "contestant.py"), name, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        return {"name": name, "left_out": f"{interpreter} does not start: {error.strerror}"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if name.startswith("ours"):
        print(done.stderr or "", file=sys.stderr)
    said = (done.stderr or "").strip().splitlines()
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return {"name": name, "left_out": f"it ended with {ended}: {said[-1] if said else ''}"}


def _median(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of a contestant's rounds."""
    measured = {key for key, value in records[0].items() if isinstance(value, float)}
    medians = {key: statistics.median(record[key] for record in records) for key in measured}
    return {**records[0], **medians}


def _vocab_size(model: str) -> int:
    from mlx_gemma4.model.download import resolve
    from mlx_gemma4.model.plan import Plan, read_config

    return Plan.from_config(read_config(resolve(model))).vocab_size


def _machine() -> dict[str, Any]:
    import mlx.core as mx

    device = mx.device_info() if hasattr(mx, "device_info") else {}
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "device": str(mx.default_device()),
        "device_name": device.get("device_name", ""),
    }


if __name__ == "__main__":
    main()
