"""Text that is on every machine: the docstrings of the Python standard library, as chat rows.

The question is a function's signature, the answer the first paragraph of its docstring. Sources
are parsed, never imported. Modules are split, so that no function of the validation and test sets
shares a module with one that is trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LONGEST = 240


def docstrings() -> Iterator[tuple[str, str, str]]:
    """(module, signature, first paragraph) of every documented function and method."""
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names):
        for path in (root / f"{module}.py", *sorted((root / module).glob("*.py"))):
            yield from ((module, *pair) for pair in _documented(path))


def split_of(module: str) -> str:
    """The split that a module belongs to, by a hash of its name: 90% train, the rest halves."""
    bucket = hashlib.sha256(module.encode()).digest()[0]
    return "train" if bucket < 230 else "valid" if bucket < 243 else "test"


def write_chat_rows(folder: Path, most: int = 100) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl; the last two of at most `most` rows."""
    rows: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for module, signature, answer in docstrings():
        messages = [
            {"role": "user", "content": f"What does {signature} do?"},
            {"role": "assistant", "content": answer},
        ]
        rows[split_of(module)].append(json.dumps({"messages": messages}))
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        # Rows far apart, so that a few hundred speak of many modules.
        stride = max(1, len(lines) // most) if name != "train" else 1
        (folder / f"{name}.jsonl").write_text("\n".join(lines[::stride]) + "\n", "utf-8")


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            signature = f"{node.name}({ast.unparse(node.args)})"
            if 20 <= len(paragraph) <= _LONGEST and len(signature) <= 80:
                yield signature, paragraph
