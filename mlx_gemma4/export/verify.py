"""Proof of an export: read it back by the format's rules, then load it in its library.

The rules: exactly the tensors that were meant, with their values, and our own reader makes the
trained update of them. The library: the base alone and with the export must give what ours give,
on a few prompts, and the export must move the logits.

Shapes: T tokens, V vocabulary, O what a weight gives, I what it takes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AdapterError, ExportError, Gemma4Error, listing
from ..gemma import Gemma4, load
from ..lora.attach import Update, Whole, updates_of, without_lora
from ..lora.state import read_files, read_updates
from ..model.checkpoint import mismatches, shapes_of
from ..model.download import resolve
from ..model.names import is_frozen_buffer

PROMPTS = (
    "What is a list? A list holds values, one after another.",
    "Open the file, read a line, and return the sum of its numbers.",
    "def area(width, height):\n    return width * height\n",
)
EXACT = 1e-4  # logits of one float32 model in two libraries
_MOST_TOKENS = 48


@dataclass(frozen=True)
class Proof:
    """What was seen of an export.

    Attributes:
        tensors: how many it has.
        by: the library that loaded it, with its version; None, and `why_not`, if none did.
        difference: largest difference of its logits from the trained model's in memory.
        moved_by: largest difference of its logits from the base's, in that library.
    """

    format: str
    tensors: int
    by: str | None = None
    difference: float = 0.0
    moved_by: float = 0.0
    why_not: str = ""

    def __str__(self) -> str:
        counted = f"{self.format}: {self.tensors} tensors"
        if self.by is None:
            return f"{counted} keep the format's rules; not run: {self.why_not}"
        return (
            f"{counted}, loaded by {self.by}: logits within {self.difference:.1e} of the trained "
            f"model's, up to {self.moved_by:.3g} from the base's"
        )


def check_adapter(gemma: Gemma4, folder: Path, tensors: Mapping[str, mx.array]) -> None:
    """An adapter folder against the format's rules, without its library.

    The file must hold exactly `tensors`, bit by bit, and what our reader makes of it must do what
    the trained model does; lora_b lora_a is compared on a few vectors.

    Raises:
        ExportError: with the name of every tensor or weight that is not as it was trained.
    """
    try:
        _, stored = read_files(folder)
        found = read_updates(folder, gemma.plan)
    except AdapterError as error:
        raise ExportError(error.found, wanted=error.wanted, do="report this") from None
    _require_same(stored, tensors, str(folder))
    trained = updates_of(gemma.backbone, gemma.plan)
    meant = {name: update for name, update in trained.items() if not is_frozen_buffer(name)}
    _require_same(_values(found), _values(meant), f"what {folder} does", tolerance=1e-5)


def _values(updates: Mapping[str, Update]) -> dict[str, mx.array]:
    """What updates do, by name: whole weights, LoRA's products with vectors, magnitudes."""
    values = {}
    for name, update in updates.items():
        if isinstance(update, Whole):
            values[name] = update.value
            continue
        probe_I4 = mx.random.normal((update.shape[-1], 4), key=mx.random.key(0))
        a, b = update.a.astype(mx.float32), update.b.astype(mx.float32)
        values[name] = update.scale * (b @ (a @ probe_I4))
        if update.magnitude is not None:
            values[f"{name} magnitude"] = update.magnitude
    return values


def _require_same(
    found: Mapping[str, mx.array],
    wanted: Mapping[str, mx.array],
    what: str,
    tolerance: float = 0.0,
) -> None:
    """The same names and values; the tolerance is a share of an array's largest value."""
    problems = mismatches(shapes_of(found), shapes_of(wanted))
    for name in sorted(found.keys() & wanted):
        one, other = found[name].astype(mx.float32), wanted[name].astype(mx.float32)
        if one.shape == other.shape:
            gap, largest = float(mx.abs(one - other).max()), float(mx.abs(other).max())
            problems += [] if gap <= tolerance * largest else [f"other values {name}"]
    if problems:
        raise ExportError(
            f"{len(problems)} tensors of {what} are not as they were trained:{listing(problems)}",
            wanted="exactly the trained adapter; the export was not kept",
            do="export it again, and report this if it stays",
        )


def check_logits(
    gemma: Gemma4,
    proof: Proof,
    library: Any,
    export: Path,
    *,
    held: Mapping[str, mx.array] | None = None,
    rounded: bool = False,
) -> Proof:
    """Load an export in the library that it is for, and compare.

    Args:
        gemma: the trained model.
        proof: with the format and the count of tensors; completed and returned.
        library: as in `lora.formats.format`; for a whole model `load` and `logits` are enough.
        export: the folder to load.
        held: of an adapter the tensors that the library must hold after loading it onto the base,
            by name; None for an export that is a model by itself.
        rounded: the export's weights are the trained ones to fewer digits, so its logits may
            differ by half of what it moves.

    Raises:
        ExportError: the library does not hold the tensors, computes other logits, or those of the
            base.
    """
    if why_not := _why_not(gemma, library, held is not None):
        return replace(proof, why_not=why_not)
    by = _name(library)
    prompts, ours, base = _our_logits(gemma)
    base_model = _attempt(library.load, resolve(gemma.name))
    if isinstance(base_model, str):
        return replace(proof, why_not=f"{by} does not load the base: {base_model}")
    their_base = [library.logits(base_model, tokens) for tokens in prompts]
    attach = (library.load, export) if held is None else (library.attach, base_model, export)
    loaded = _attempt(*attach)
    if isinstance(loaded, str):
        # Which is not the export's fault where the library cannot even begin.
        if held is not None and (reason := _attempt(library.prepare, base_model)):
            return replace(proof, why_not=f"{by} takes no adapter for this base: {reason}")
        why = f"{by} does not load {export}: {loaded}"
        raise ExportError(why, wanted="that it does", do="report this")
    if held is not None:
        # What else the library made for the adapter must be zero.
        made_up = (".lora_b", ".B", ".lora_B.weight")
        found = {
            name: value
            for name, value in library.holds(loaded).items()
            if name in held or (name.endswith(made_up) and value.any())
        }
        _require_same(found, held, f"the adapter in {by}")
    theirs = [library.logits(loaded, tokens) for tokens in prompts]
    gap, moved_by = _gap(theirs, ours), _gap(theirs, their_base)
    proof = replace(proof, by=by, difference=gap, moved_by=moved_by)
    return _judged(proof, _gap(their_base, base), rounded)


def _judged(proof: Proof, base_gap: float, rounded: bool) -> Proof:
    """A base that differs by itself, as one of low precision does, lets the export differ more."""
    if not proof.moved_by:
        raise ExportError(
            f"in {proof.by} the export changes no logit", wanted="a change", do="train it first"
        )
    allowed = max(EXACT, 3 * base_gap, proof.moved_by / 2 if rounded else 0)
    lost = base_gap > max(EXACT, proof.moved_by)
    if lost or not proof.difference <= allowed:
        raise ExportError(
            f"in {proof.by} logits differ from the trained model's by {proof.difference:.2e}, "
            f"and the base's by {base_gap:.2e}; the export moves them by {proof.moved_by:.2e}",
            wanted=f"at most {allowed:.2e}, and a base that differs less than the export moves it",
            do="report this; --no-verify exports all the same",
        )
    return proof


def _our_logits(gemma: Gemma4) -> tuple[list[list[int]], list[np.ndarray], list[np.ndarray]]:
    """Token ids of the prompts, and (T, V) for each by the trained model and by its base."""
    # A tokenizer may know more tokens than the model.
    known = [
        [token for token in gemma.tokenizer.encode(prompt) if token < gemma.plan.vocab_size]
        for prompt in PROMPTS
    ]
    prompts = [tokens[:_MOST_TOKENS] for tokens in known if tokens]

    def logits(model: Gemma4) -> list[np.ndarray]:
        return [np.array(model.logits(mx.array([tokens]))[0]) for tokens in prompts]

    gemma.backbone.eval()
    ours = logits(gemma)
    if gemma.lora is None:
        return prompts, ours, logits(load(gemma.name))
    with without_lora(gemma.backbone):
        return prompts, ours, logits(gemma)


def _name(library: Any) -> str:
    package = library.packages[-1]
    return f"{package.replace('_', '-')} {importlib.metadata.version(package)}"


def _why_not(gemma: Gemma4, library: Any, is_adapter: bool) -> str:
    """Why the library cannot be tried, if so."""
    if gemma.loaded.packings:
        return "the base was quantized while it was loaded: export from its --save-quantized"
    if missing := [name for name in library.packages if not find_spec(name)]:
        return f"{' and '.join(missing)} not installed"
    unfit = is_adapter and library.unfit()
    return f"{_name(library)} is installed, and {unfit}" if unfit else ""


def _attempt(action: Callable[..., Any], *arguments: Any) -> Any:
    """What an upstream function gives, or in one line why it fails."""
    try:
        return action(*arguments)
    except Gemma4Error:
        raise
    except Exception as error:  # anything: it is another library's
        text = str(error).strip() or type(error).__name__
        return f"{type(error).__name__}: {text.splitlines()[0]}"[:200]


def _gap(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    gaps = [np.abs(a - b).max() for a, b in zip(one, other)]
    return float(max(gaps)) if np.isfinite(gaps).all() else float("inf")
