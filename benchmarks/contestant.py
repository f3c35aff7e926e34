"""One contestant in a process of its own: loads, takes steps, prints one JSON line at the end.

Started by run.py. Whatever the contestant prints goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from typing import Any

from loads import Load, dense, short

# name -> (module, its arguments, where its objective is not the others')
CONTESTANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mlx-lm": ("of_mlx_lm", {}, ""),
    "mlx-lm checkpointed": ("of_mlx_lm", {"checkpointed": True}, ""),
    "mlx-vlm": ("of_mlx_vlm", {}, "its padding mask replaces the causal one"),
    "mlx-vlm checkpointed": (
        "of_mlx_vlm",
        {"checkpointed": True},
        "its padding mask replaces the causal one",
    ),
    "unsloth": ("of_unsloth", {}, ""),
    "ours fast": ("of_ours", {"rematerialize": False}, ""),
    "ours lean": ("of_ours", {"rematerialize": True}, ""),
}


def run(name: str, model: str, dtype: str, load: Load) -> dict[str, Any]:
    """Train as this contestant, in this process; returns its record, or why it is left out."""
    module_name, arguments, note = CONTESTANTS[name]
    from clock import Clock

    module = importlib.import_module(module_name)
    reason = getattr(module, "missing", lambda: None)()
    if reason:
        return {"name": name, "left_out": reason}
    clock = Clock(load)
    module.train(model, dtype, load, clock, **arguments)
    result = clock.result()
    notes = [note] if note else []
    extra = result["targets_counted"] - result["targets"]
    if extra:
        notes.append(f"counts {extra:+d} targets an epoch that the others do not")
    return {"name": name, "dtype": dtype, "load": load.name, "notes": notes, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vocab", type=int, required=True, help="random tokens stay below it")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="short samples, not dense rows")
    parser.add_argument("--samples", type=int, default=64)
    given = parser.parse_args()
    if given.short:
        load = short(given.vocab, given.samples)
    else:
        load = dense(given.vocab, given.batch, given.length, given.steps)
    with contextlib.redirect_stdout(sys.stderr):
        record = run(given.name, given.model, given.dtype, load)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
