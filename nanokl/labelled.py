"""Labelled texts in a file: a line each, the text, a tab, its label.

Splits are by a hash of the text: a text that comes twice is in one split, and adding lines moves
nobody. Left out: quoting, several labels a text.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from nanokl import UserError

SPLITS = ("test", "val") + 8 * ("train",)  # a tenth each


class Labelled(NamedTuple):
    """A line of the file."""

    line: int
    text: str
    label: str
    split: str


def read_labelled(path: Path) -> list[Labelled]:
    """The lines of a file of labelled texts; UserError, with the line, for one that is not."""
    try:
        lines = Path(path).read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 in line {number}: convert it") from None
    rows = []
    for number, line in enumerate(lines, 1):
        text, tab, label = line.rstrip("\r").rpartition("\t")
        text, label = text.strip(), label.strip()
        if not line.strip():
            continue
        if not tab or not text or not label:
            raise UserError(f"{path} has no text<TAB>label in line {number}: write the text, a "
                            "tab and its label")
        digest = hashlib.sha256(text.encode()).digest()
        rows.append(Labelled(number, text, label, SPLITS[int.from_bytes(digest[:4], "big") % 10]))
    if missing := {"train", "val", "test"} - {row.split for row in rows}:
        raise UserError(f"{path} has {len(rows)} labelled texts, none of them in the split "
                        f"{min(missing)}, a tenth by chance: give some dozens at least")
    return rows


def as_number(row: Labelled, path: Path) -> float:
    """A row's label as a rating; UserError for words."""
    try:
        value = float(row.label)
        if abs(value) < float("inf"):
            return value
    except ValueError:
        pass
    raise UserError(f"{path} has the label {row.label!r} in line {row.line}: give numbers, or "
                    "learn --objective classes")
