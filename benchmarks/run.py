"""Ours beside mlx-lm, each in a process of its own, on the same checkpoint and tokens.

    make bench                                             # the middle-size model, T 2048
    python benchmarks/run.py --length 8192 --steps 1
    python benchmarks/run.py --model google/gemma-4-E2B-it --dtype bfloat16

Times are medians of steps after the first; memory is the allocator's peak minus what was resident
before the first step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from contestant import CONTESTANTS
from middle import build_middle

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="default: a middle-size random model with E2B's features")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    given = parser.parse_args()
    model = given.model or str(build_middle(Path("runs/middle")))
    shape = ["--batch", given.batch, "--length", given.length, "--steps", given.steps]
    results = []
    for name in given.only:
        words = [name, "--model", model, "--dtype", given.dtype, *map(str, shape)]
        done = subprocess.run(
            [sys.executable, str(HERE / "contestant.py"), *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"  {name} done", file=sys.stderr)
    first = results[0]
    print(f"B {given.batch}, T {given.length}, {given.dtype}; ratios to {first['name']}")
    print(
        f"{'':20} {'loss':>9} {'step s':>8} {'ratio':>6} {'resident MB':>12} "
        f"{'peak MB':>8} {'ratio':>6}"
    )
    for row in results:
        print(
            f"{row['name']:20} {row['loss']:9.5f} {row['seconds']:8.2f} "
            f"{row['seconds'] / first['seconds']:6.2f} {row['resident_mb']:12.0f} "
            f"{row['peak_minus_resident_mb']:8.0f} "
            f"{row['peak_minus_resident_mb'] / first['peak_minus_resident_mb']:6.2f}"
        )


if __name__ == "__main__":
    main()
