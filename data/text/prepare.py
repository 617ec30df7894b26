"""Your own texts: any UTF-8 files, a document each or documents between blank lines.

The last tenth of the documents, or of the one document's characters, is the val split.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import UserError
from nanokl.corpus import Corpus, holdout, prepare_corpus, read_text
from nanokl.runtime import parse_flags, run_program

HERE = Path(__file__).resolve().parent


@dataclass
class Flags:
    """Tokenise your own texts."""

    files: Positional[tuple[Path, ...]]  # UTF-8 text files
    split_on_blank_lines: bool = False  # a document ends at a blank line, not at the file's end
    out: Path = HERE  # folder to write to
    level: Literal["bpe", "char"] = "bpe"  # tokens of many characters, or of one
    vocab_size: int = 4096  # at most, the 5 special tokens counted
    force: bool = False  # prepare again what has been prepared


def main() -> None:
    """Prepare the data folder, or say that it has been."""
    flags = parse_flags(Flags, prog="data/text/prepare.py", description=__doc__)
    if not flags.files:
        raise UserError("no FILE was given: name the UTF-8 text files to prepare")
    texts = [read_text(path) for path in flags.files]
    line = prepare_corpus(
        flags.out,
        lambda: make_corpus(texts, flags.split_on_blank_lines),
        level=flags.level,
        vocab_size=flags.vocab_size,
        settings={
            "corpus": "text",
            "sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
            "split_on_blank_lines": flags.split_on_blank_lines,
        },
        force=flags.force,
    )
    print(line)


def make_corpus(texts: list[str], split_on_blank_lines: bool) -> Corpus:
    """One document for each text, or for each part of it between blank lines."""
    if split_on_blank_lines:
        texts = [doc for text in texts for doc in re.split(r"\r?\n(?:[ \t]*\r?\n)+", text)]
    return Corpus(holdout([text for text in texts if text.strip()]))


if __name__ == "__main__":
    run_program(main)
