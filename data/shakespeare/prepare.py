"""Tiny Shakespeare: 1.1 MB of plays in one file, from its public address or a local copy.

One document; its last tenth is the val split.
"""

import http.client
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import UserError
from nanokl.corpus import Corpus, prepare_corpus, read_bytes
from nanokl.runtime import parse_flags, run_program

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class Flags:
    """Fetch and tokenise tiny Shakespeare."""

    file: Positional[Path | None] = None  # a local copy; without it, it is fetched
    out: Path = HERE  # folder to write to
    level: Literal["bpe", "char"] = "char"  # tokens of many characters, or of one
    vocab_size: int = 4096  # at most, the 5 special tokens counted
    force: bool = False  # prepare again what has been prepared


def main() -> None:
    """Prepare the data folder, or say that it has been."""
    flags = parse_flags(Flags, prog="data/shakespeare/prepare.py", description=__doc__)
    line = prepare_corpus(
        flags.out,
        lambda: make_corpus(plays(flags.file)),
        level=flags.level,
        vocab_size=flags.vocab_size,
        settings={"corpus": "shakespeare", "sha256": SHA256},
        force=flags.force,
    )
    print(line)


def make_corpus(text: str) -> Corpus:
    """One document in each split."""
    cut = len(text) * 9 // 10
    splits = {"train": [text[:cut]], "val": [text[cut:]]}
    return Corpus(splits, info={"source": URL, "licence": "public domain"})


def plays(file: Path | None) -> str:
    """The text, from a local copy or the network; UserError unless its sha256 is right."""
    if file:
        return read_bytes(file, SHA256).decode()
    print(f"fetching {URL}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "input.txt"
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                copy.write_bytes(response.read())
        except (OSError, http.client.HTTPException) as error:
            problem = f"could not fetch {URL} ({error}): connect, or give a local copy's path"
            raise UserError(problem) from error
        return read_bytes(copy, SHA256).decode()


if __name__ == "__main__":
    run_program(main)
