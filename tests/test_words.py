"""The field's standard words, in the package and in its documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").iterdir()),
    *sorted((ROOT / "mlx_gemma4").rglob("*.py")),
]
INSTEAD = {
    r"towers?": "encoder",
    r"forged": "marker in the row's own text",
    r"tamed?": "what is done to the text",
    r"receivers?": "library",
    r"survivals?": "what is kept of the update",
    r"held-out": "validation",
    r"who sees whom": "attention mask",
}
OLD_NAME = ("gemma.py", "towers")
"""`load` refuses the old name of a setting by that name."""


def findings(path: Path) -> list[str]:
    text = path.read_text("utf-8")
    found = []
    for word, better in INSTEAD.items():
        # Names of tensors and classes of other libraries are theirs: vision_tower.
        for match in re.finditer(rf"(?<![a-z]_)(?<![a-z]){word}(?![a-z])", text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            if (path.name, match[0]) != OLD_NAME:
                found.append(f"{path.name}:{line}: {match[0]!r}, say {better}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_words(path):
    assert not findings(path)


def test_words_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Towers, _tame, Receiver\nvision_tower and contamed, held out, held-out\n")
    assert [line.split(",")[0].split(": ")[1] for line in findings(page)] == [
        "'Towers'",
        "'tame'",
        "'Receiver'",
        "'held-out'",
    ]
