"""From texts to a data folder: tokenizer, a shard for each split, meta.json; or nothing at all.

A folder is whole or absent: made beside itself, renamed file by file, meta.json last, whose
settings say whether to make it again. Left out: where texts come from, those larger than memory.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanokl import UserError, __version__
from nanokl.data import write_shard
from nanokl.tokenizer import CHAR_PATTERN, PATTERN, train_bpe


def read_bytes(path, sha256: str | None = None) -> bytes:
    """A file's content; UserError when it is missing, empty or not of this sha256."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}: give the path of a file that exists")
    content = path.read_bytes()
    if not content.strip():
        raise UserError(f"{path} is empty: give a file with text in it")
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(f"{path} ({len(content)} bytes) has sha256 {found}, not {sha256}: it is "
                        "truncated or another version, fetch it again")
    return content


def read_text(path, sha256: str | None = None) -> str:
    """A file's text; UserError too when it is not UTF-8 text."""
    content = read_bytes(path, sha256)
    if (at := content.find(b"\0")) >= 0:
        raise UserError(f"{path} has a NUL byte at {at}, it is no text: give a UTF-8 text file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start} of {len(content)} "
                        f"({error.reason}): convert it to UTF-8 first") from None


def holdout(docs: list[str]) -> dict[str, list[str]]:
    """The last tenth of the documents, or of a single document's characters, for validation."""
    if len(docs) == 1:
        cut = len(docs[0]) * 9 // 10
        return {"train": [docs[0][:cut]], "val": [docs[0][cut:]]}
    cut = len(docs) - max(1, len(docs) // 10)
    return {"train": docs[:cut], "val": docs[cut:]}


@dataclass(frozen=True)
class Corpus:
    """What a source gives: documents by split, files to write beside them, facts for meta.json."""

    splits: dict[str, list[str]]  # train and val at least; each becomes SPLIT.bin
    files: dict[str, str] = field(default_factory=dict)  # name: text
    info: dict = field(default_factory=dict)  # source, licence, citation, counts


def prepare_corpus(out, source: Callable[[], Corpus], *, settings: dict, level: str = "bpe",
                   vocab_size: int = 4096, force: bool = False) -> str:
    """Make the data folder `out`: tokenizer, SPLIT.bin, meta.json; return one line on it.

    `settings` say what the source is (hashes, seeds) and must survive JSON; level is bpe or char.
    The BPE is learnt from the train split only. Nothing is done, `source` not called, if `out` has
    the same settings; UserError for others without `force`. A failure leaves `out` as it was.
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


def _write_corpus(folder: Path, corpus: Corpus, settings: dict) -> dict:
    """Write every file into the fresh `folder` and return what meta.json holds."""
    splits = {name: [doc for doc in docs if doc.strip()] for name, docs in corpus.splits.items()}
    if empty := [name for name, docs in splits.items() if not docs]:
        raise UserError(f"no text for the {empty[0]} split: the corpus is too small, give more")
    pattern = {"bpe": PATTERN, "char": CHAR_PATTERN}[settings["level"]]
    tokenizer = train_bpe(splits["train"], settings["vocab_size"], pattern=pattern,
                          lowercase=settings.get("lowercase", False))
    tokenizer.save(folder)
    counts = {}
    for name, docs in splits.items():
        n_bytes, ids = sum(len(doc.encode()) for doc in docs), map(tokenizer.encode, docs)
        n_tokens = write_shard(folder / f"{name}.bin", ids, tokenizer, n_bytes)
        counts[name] = {"documents": len(docs), "tokens": n_tokens, "bytes": n_bytes}
    for name, text in corpus.files.items():
        (folder / name).write_bytes(text.encode())  # bytes: the same line ends anywhere
    content = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    meta = {"nanokl": __version__, "settings": settings, **corpus.info, "splits": counts,
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash},
            "files": {name: {"bytes": len(x), "sha256": hashlib.sha256(x).hexdigest()}
                      for name, x in content.items()}}
    (folder / "meta.json").write_bytes((json.dumps(meta, indent=2) + "\n").encode())
    return meta
