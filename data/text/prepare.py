"""Your own texts: any UTF-8 files, a document each or documents between blank lines.

The last tenth of the documents, or of the one document's characters, is the val split.
"""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import UserError
from nanokl.corpus import Corpus, Stream, holdout, prepare_corpus, stream_text
from nanokl.runtime import parse_flags, run_program
from nanokl.tokenizer import Rest

HERE = Path(__file__).resolve().parent
BLANK_LINES = re.compile(r"\n(?:[ \t]*\r?\n)+")  # what comes before may end in a \r


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
    docs = Stream(lambda: documents(flags.files, flags.split_on_blank_lines))
    line = prepare_corpus(
        flags.out,
        lambda: Corpus(holdout(docs)),
        level=flags.level,
        vocab_size=flags.vocab_size,
        settings={
            "corpus": "text",
            "sha256": [sha256(path) for path in flags.files],
            "split_on_blank_lines": flags.split_on_blank_lines,
        },
        force=flags.force,
    )
    print(line)


def sha256(path: Path) -> str:
    """Of a file's text."""
    digest = hashlib.sha256()
    for text in stream_text(path):
        digest.update(text.encode())
    return digest.hexdigest()


def documents(files: Iterable[Path], split_on_blank_lines: bool) -> Iterator[str]:
    """One document for each file, or for each part of it between blank lines."""
    for path in files:
        if split_on_blank_lines:
            yield from between_blank_lines(stream_text(path))
        else:
            yield from (Rest(text) if i else text for i, text in enumerate(stream_text(path)))


def between_blank_lines(texts: Iterable[str]) -> Iterator[str]:
    """The documents of one file, which comes in texts cut anywhere."""
    held, kind = "", str
    for text in chain(texts, [None]):
        held += text or ""
        # white space at the end may go on in the next text
        end = len(held) if text is None else len(held.rstrip(" \t\r\n"))
        docs = BLANK_LINES.split(held[:end])
        docs[:-1] = [doc.removesuffix("\r") for doc in docs[:-1]]
        yield kind(docs[0])
        yield from docs[1:]
        held, kind = held[end:], Rest


if __name__ == "__main__":
    run_program(main)
