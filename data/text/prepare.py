"""Your own texts: any UTF-8 files, a document each or documents between blank lines.

The last tenth of the documents, or of the one document's characters, is the val split. Files are
read a megabyte at a time, several times over, and may be larger than memory. The BPE learns from at
most 16 million characters, spread over the train split.
"""

import codecs
import hashlib
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import UserError
from nanokl.corpus import Corpus, prepare_corpus, read_blocks, without_blanks
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


@dataclass(frozen=True)
class Stream:
    """Texts that can be read again and again, without ever being in memory together."""

    make: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.make()


# ---------------------------------------------------------------------------- text


def stream_text(path) -> Iterator[str]:
    """A file's text in parts of about a megabyte; UserError when it is no UTF-8 text."""
    decoder, at, blank = codecs.getincrementaldecoder("utf-8-sig")(), 0, True
    for block in chain(read_blocks(path), [b""]):
        if (nul := block.find(b"\0")) >= 0:
            raise UserError(f"{path} has a NUL byte at {at + nul}, it is no text: give a UTF-8 "
                            "text file")
        at, blank = at + len(block), blank and not block.strip()
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = at - len(error.object) + error.start  # what is left of the last block counts
            raise UserError(f"{path} is not UTF-8 at byte {place} of {path.stat().st_size} "
                            f"({error.reason}): convert it to UTF-8 first") from None
        if text:
            yield text
    if blank:
        raise UserError(f"{path} is empty: give a file with text in it")


def sha256(path: Path) -> str:
    """Of a file's text."""
    digest = hashlib.sha256()
    for text in stream_text(path):
        digest.update(text.encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------- documents


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


# ---------------------------------------------------------------------------- splits


def holdout(docs: Iterable[str]) -> dict[str, Stream]:
    """The last tenth of the documents, or of a single document's characters, for validation."""
    starts, n = array("q"), 0  # in characters
    for text in without_blanks(docs):
        if not isinstance(text, Rest):
            starts.append(n)
        n += len(text)
    cut = starts[-max(1, len(starts) // 10)] if len(starts) > 1 else n * 9 // 10
    return {"train": Stream(lambda: _between(docs, 0, cut)),
            "val": Stream(lambda: _between(docs, cut, n))}


def _between(docs: Iterable[str], first: int, end: int) -> Iterator[str]:
    """What the documents hold from character `first` up to `end`."""
    at = 0
    for text in without_blanks(docs):
        if at >= end:
            return
        if part := text[max(0, first - at) : max(0, end - at)]:
            yield Rest(part) if isinstance(text, Rest) and at > first else part
        at += len(text)


if __name__ == "__main__":
    run_program(main)
