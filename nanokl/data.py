"""Corpora as shards of tokens, and batches that are pure functions of (seed, step).

A shard is `<|endoftext|> doc <|endoftext|> doc ... <|endoftext|>`: document i and its leading
separator are tokens[starts[i]:starts[i + 1]], and starts[-1] is the closing separator. A resumed
run needs the step only, no loader state. Tokens are read from the disk when a batch asks for them;
in memory are 8 bytes a document and 24 a window. Left out: mixing weights, shards of many files.
"""

import json
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanokl import UserError
from nanokl.runtime import generator
from nanokl.tokenizer import Tokenizer

# A file: MAGIC | header length, uint64 | JSON header, space-padded to 64 | starts, int64 | tokens
MAGIC = b"nanokl\x00\x01"  # the last byte is the version of the format
HEADER = {"dtype", "vocab_size", "tokenizer_hash", "n_tokens", "n_docs", "n_bytes"}
BUCKET = 16  # steps whose rows are sorted by length together, so that little is padding


@dataclass(frozen=True, eq=False)
class Shard:
    """The tokens of one split, mapped from its file."""

    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    starts: np.ndarray  # (n_docs + 1,) int64
    n_bytes: int  # UTF-8 bytes of the documents, for bits per byte

    @property
    def lengths(self) -> np.ndarray:
        """(n_docs,) tokens of each document with its leading separator."""
        return np.diff(self.starts)

    @classmethod
    def open(cls, path, tokenizer: Tokenizer) -> "Shard":
        """Map the shard at `path`; UserError when missing, cut short or of another tokenizer."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no shard at {path}: run the prepare.py of that data folder first")
        with path.open("rb") as file:
            head = file.read(16)
            if head[:8] != MAGIC:
                what = "is empty" if not head else "is not a nanokl shard"
                raise UserError(f"{path} {what}: run the prepare.py of that data folder with "
                                "--force")
            size = int.from_bytes(head[8:], "little")
            try:
                header = json.loads(file.read(min(size, 1 << 16)))
            except ValueError:
                raise UserError(f"{path} is truncated: prepare it again with --force") from None
        if missing := HEADER - header.keys():
            raise UserError(f"{path} has no {', '.join(sorted(missing))} in its header: prepare it "
                            "again with --force")
        if header["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"{path} was written with another tokenizer (vocabulary "
                            f"{header['vocab_size']}, this one has {tokenizer.vocab_size}): use "
                            "the one beside it, or prepare it again")
        after = 16 + size + 8 * (header["n_docs"] + 1)
        want = after + header["n_tokens"] * np.dtype(header["dtype"]).itemsize
        if (found := path.stat().st_size) != want:
            raise UserError(f"{path} is truncated: {found} bytes, not the {want} of its header; "
                            "prepare it again with --force")
        starts = np.memmap(path, "<i8", "r", 16 + size, header["n_docs"] + 1)
        tokens = np.memmap(path, header["dtype"], "r", after)
        return cls(tokens, np.asarray(starts), header["n_bytes"])


def write_parts(path, parts: Iterable[tuple[np.ndarray, int]], tokenizer: Tokenizer) -> dict:
    """Write a shard in parts of any length: ids with each document's separator, and UTF-8 bytes.

    Return its header. The tokens wait in a nameless file, since header and starts come first.
    """
    path, separator = Path(path), tokenizer.special("<|endoftext|>")
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    places, n_tokens, n_bytes = array("q"), 0, 0
    with tempfile.TemporaryFile(dir=path.parent) as tokens:
        for ids, size in chain(parts, [(np.array([separator]), 0)]):
            places.frombytes((np.flatnonzero(ids == separator) + n_tokens).astype("i8").tobytes())
            tokens.write(ids.astype(dtype).tobytes())
            n_tokens, n_bytes = n_tokens + len(ids), n_bytes + size
        starts = np.frombuffer(places, "i8")
        assert (np.diff(starts) > 1).all(), f"document {np.diff(starts).argmin()} is empty"
        header = {"dtype": dtype, "vocab_size": tokenizer.vocab_size,
                  "tokenizer_hash": tokenizer.hash, "n_tokens": n_tokens,
                  "n_docs": len(starts) - 1, "n_bytes": n_bytes}
        text = json.dumps(header).encode()
        text += b" " * (-(16 + len(text)) % 64)  # aligned, so that the map is read without copies
        with path.open("wb") as file:
            file.write(MAGIC + len(text).to_bytes(8, "little") + text)
            file.write(starts.astype("<i8", copy=False).data)
            tokens.seek(0)
            shutil.copyfileobj(tokens, file, 1 << 22)
    return header


@lru_cache(maxsize=2)
def _epoch(n: int, seed: int, stream: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's order of n windows and a uniform number for each; a memo of a pure function."""
    rng = generator(seed, stream, epoch)
    order = torch.randperm(n, generator=rng).to(torch.int32 if n < 1 << 31 else torch.int64)
    return order.numpy(), torch.rand(n, generator=rng, dtype=torch.float64).numpy()


def shuffled(n: int, first: int, count: int, *, seed: int, stream: str) -> Tensor:
    """Places first, ..., first + count - 1 of the endless shuffle of n things: all, then again."""
    places = np.arange(first, first + count)
    return torch.tensor([_epoch(n, seed, stream, int(p) // n)[0][p % n] for p in places])


@lru_cache(maxsize=2)
def _first_windows(shard: Shard, skip: int, size: int) -> np.ndarray:
    """(n_docs + 1,) the number of each document's first window; a memo, being O(n_docs).

    A document, less its first `skip` tokens, is cut into ceil(length / size) windows.
    """
    n = np.maximum(1, -(-(shard.lengths - skip) // size))
    return np.concatenate(([0], np.cumsum(n)))


def _draw(shard: Shard, skip: int, size: int, rows: np.ndarray, seed: int, stream: str):
    """Starts and lengths of the windows at places `rows` of the endless shuffle; O(rows)."""
    first = _first_windows(shard, skip, size)
    window, u = np.empty_like(rows), np.empty(len(rows))
    for epoch in np.unique(rows // first[-1]):
        here = rows // first[-1] == epoch
        order, jitter = _epoch(int(first[-1]), seed, stream, int(epoch))
        window[here] = order[rows[here] % first[-1]]
        u[here] = jitter[window[here]]
    doc = np.searchsorted(first, window, side="right") - 1
    k, n = window - first[doc], first[doc + 1] - first[doc]
    start = shard.starts[doc] + skip
    length = shard.starts[doc + 1] - start
    # First windows start at 0, others at random in equal strata: an epoch covers all about once.
    room = np.maximum(length - size + 1, 1)
    offset = np.maximum(0, np.floor((k - 1 + u) / np.maximum(n - 1, 1) * room)).astype(np.int64)
    return start + offset, np.minimum(length, size)


def _gather(tokens: np.ndarray, start: np.ndarray, length: np.ndarray, fill: int):
    """Rows tokens[start:start + length], right-padded with `fill`, and their mask; both (B, T)."""
    column = np.arange(length.max())
    mask = column < length[:, None]
    idx = tokens[np.where(mask, start[:, None] + column, 0)].astype(np.int64)
    return np.where(mask, idx, fill), mask


def _cover(shard: Shard, skip: int, size: int, batch_size: int) -> Iterator[tuple]:
    """All windows once, as starts and lengths of each batch: the longest come first."""
    first = _first_windows(shard, skip, size)
    doc = np.repeat(np.arange(len(first) - 1), np.diff(first))
    offset = skip + size * (np.arange(first[-1]) - first[doc])
    start, length = shard.starts[doc] + offset, np.minimum(shard.lengths[doc] - offset, size)
    by_length = np.argsort(-length, kind="stable")  # so that little is padding
    for rows in np.split(by_length, range(batch_size, len(doc), batch_size)):
        yield start[rows], length[rows]


def _check_sizes(batch_size: int, block_size: int, least: int = 1) -> None:
    for name, value, bound in ("batch_size", batch_size, 1), ("block_size", block_size, least):
        if value < bound:
            raise UserError(f"{name} is {value}: give at least {bound}")


def lm_batch(shard: Shard, step: int, *, batch_size: int, block_size: int, seed: int) -> Tensor:
    """Training rows idx (B, block_size + 1) int64, from a document's window on past its end."""
    _check_sizes(batch_size, block_size)
    rows = np.arange(step * batch_size, (step + 1) * batch_size)
    start, _ = _draw(shard, 0, block_size, rows, seed, "lm")
    place = start[:, None] + np.arange(block_size + 1)
    # modulo n_tokens - 1: the closing separator is the first one, and the file a ring
    return torch.from_numpy(shard.tokens[place % shard.starts[-1]].astype(np.int64))


def eval_batches(shard: Shard, *, block_size: int, batch_size: int) -> Iterator:
    """Windows of T <= block_size, every token scored once: yields idx (B, T + 1), mask (B, T)."""
    _check_sizes(batch_size, block_size)
    for start, length in _cover(shard, 0, block_size, batch_size):
        idx, mask = _gather(shard.tokens, start, length + 1, shard.tokens[0])
        yield torch.from_numpy(idx), torch.from_numpy(mask[:, 1:])


@dataclass(frozen=True)
class MLMBatch:
    """A batch for the masked language model; all (B, T)."""

    idx: Tensor  # int64, [CLS] text [SEP] with some of the text masked
    mask: Tensor  # bool, real tokens
    targets: Tensor  # int64, the tokens before masking
    predict: Tensor  # bool, the positions to predict


def _masked(shard: Shard, tokenizer: Tokenizer, start, length, rng, mask_prob: float) -> MLMBatch:
    """[CLS] tokens[start:start + length] [SEP], masked as BERT does (arXiv:1810.04805, 3.1).

    Of the chosen tokens 80 % become [MASK], 10 % any ordinary token, 10 % stay. A row in which
    chance chose none predicts one all the same: a row without a prediction is wasted work.
    """
    pad, cls, sep, msk = (tokenizer.special(s) for s in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    targets, mask = _gather(shard.tokens, start - 1, length + 2, pad)
    rows = np.arange(len(start))
    targets[:, 0], targets[rows, length + 1] = cls, sep
    text = mask.copy()
    text[:, 0] = text[rows, length + 1] = False
    # two numbers for each token in row order: the masks do not depend on how rows are batched
    draws = torch.rand(int(length.sum()), 2, generator=rng, dtype=torch.float64).numpy()
    choice, fate = np.full((2, *mask.shape), 2.0)
    choice[text], fate[text] = draws.T
    predict = choice < mask_prob
    predict[rows, choice.argmin(1)] |= ~predict.any(1)
    # ordinary ids are those below the first special; fate is uniform on [.8, .9) where it counts
    ordinary = ((fate - 0.8) / 0.1 * tokenizer.special("<|endoftext|>")).astype(np.int64)
    idx = np.select([~predict | (fate >= 0.9), fate < 0.8], [targets, msk], ordinary)
    return MLMBatch(*map(torch.from_numpy, (idx, mask, targets, predict)))


@lru_cache(maxsize=1)
def _bucket(shard: Shard, size: int, batch_size: int, seed: int, bucket: int) -> np.ndarray:
    """Starts and lengths, (2, BUCKET, B), of a bucket's batches in their order; a memo."""
    rows = np.arange(bucket * BUCKET * batch_size, (bucket + 1) * BUCKET * batch_size)
    windows = np.stack(_draw(shard, 1, size, rows, seed, "mlm"))
    turns = torch.randperm(BUCKET, generator=generator(seed, "mlm-turns", bucket)).numpy()
    by_length = np.argsort(windows[1], kind="stable").reshape(BUCKET, batch_size)
    return windows[:, by_length[turns]]


def mlm_batch(shard: Shard, tokenizer: Tokenizer, step: int, *, batch_size: int, block_size: int,
              seed: int, mask_prob: float = 0.15) -> MLMBatch:
    """A training batch: rows of like length, T the longest of them (block_size at most)."""
    _check_sizes(batch_size, block_size, 3)
    bucket, turn = divmod(step, BUCKET)
    start, length = _bucket(shard, block_size - 2, batch_size, seed, bucket)[:, turn]
    rng = generator(seed, "mlm-mask", step)
    return _masked(shard, tokenizer, start, length, rng, mask_prob)


def mlm_eval_batches(shard: Shard, tokenizer: Tokenizer, *, block_size: int, batch_size: int,
                     seed: int) -> Iterator[MLMBatch]:
    """Every text token in exactly one row; 15 % masks fixed by the seed, whatever batch_size."""
    _check_sizes(batch_size, block_size, 3)
    rng = generator(seed, "mlm-eval")
    for start, length in _cover(shard, 1, block_size - 2, batch_size):
        yield _masked(shard, tokenizer, start, length, rng, 0.15)


def _between_separators(shard: Shard, start: np.ndarray, length: np.ndarray):
    """Rows <|endoftext|> tokens[start:start + length] <|endoftext|>, and their mask; (B, T)."""
    separator = shard.tokens[0]
    idx, mask = _gather(shard.tokens, start - 1, length + 2, separator)
    idx[:, 0] = idx[np.arange(len(idx)), length + 1] = separator
    return torch.from_numpy(idx), torch.from_numpy(mask)


def document_batch(shard: Shard, step: int, *, batch_size: int, block_size: int, seed: int):
    """Training rows, a document each, of like length: idx (B, T) with separators, mask (B, T).

    Of a document that is longer than block_size with them, a part.
    """
    _check_sizes(batch_size, block_size, 3)
    bucket, turn = divmod(step, BUCKET)
    return _between_separators(shard, *_bucket(shard, block_size - 2, batch_size, seed,
                                               bucket)[:, turn])


def document_eval_batches(shard: Shard, *, block_size: int, batch_size: int) -> Iterator:
    """All documents once, long ones in parts: yields idx (B, T), mask (B, T); the longest first."""
    _check_sizes(batch_size, block_size, 3)
    for start, length in _cover(shard, 1, block_size - 2, batch_size):
        yield _between_separators(shard, start, length)


def text_batch(tokenizer: Tokenizer, texts: Sequence[str], *, block_size: int):
    """Whole texts for an encoder: idx (B, T) as [CLS] ids [SEP] cut at block_size, mask (B, T).

    GPT-2's tokenizer has <|endoftext|> alone, which stands for all three.
    """
    _check_sizes(1, block_size, 2)
    names = ("[PAD]", "[CLS]", "[SEP]") if "[CLS]" in tokenizer.specials else 3 * ("<|endoftext|>",)
    pad, cls, sep = map(tokenizer.special, names)
    spaced = [" " + text.strip() for text in texts]  # first words as in mid-sentence
    rows = [[cls, *ids[: block_size - 2], sep] for ids in tokenizer.encode_batch(spaced)]
    length = np.array([len(row) for row in rows])
    idx, mask = _gather(np.concatenate(rows), np.cumsum(length) - length, length, pad)
    return torch.from_numpy(idx), torch.from_numpy(mask)
