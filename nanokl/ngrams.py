"""What words, pairs and pieces of words say of a text: a linear model of n-grams, and pieces.

With twenty thousand texts the linear model agrees with people better than a small encoder does, it
errs elsewhere, and it learns in seconds: reward.py weighs the two. Its n-grams are words, pairs of
neighbours, words that a negation stands up to three before (arXiv:cs/0205070), pieces of 3 to 5
characters, which rare words share, and the tokenizer's tokens and their pairs. Each counts once
however often it comes, so that repeating itself gains a policy nothing, and has two weights: for
its text's domain and for all (arXiv:0907.1815).
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEGATION = frozenset(("not", "no", "never", "nor", "neither", "none", "nothing", "nobody", "cannot",
                      "without", "hardly", "barely", "lack", "lacks"))  # and what ends in n't
WORD = re.compile(r"[\w']+|[^\w\s]+")
BOUND = 3.0  # of the score, in nats: a policy will look for texts far outside of those learnt from
SCALE = 10.0  # of the score: a step of AdamW moves a weight by about its rate, whatever it is for
DOMAIN = 0x9E3779B1  # far apart in any number of low bits
PIECES = 1 << 13  # rows that the pieces of an encoder's words share
HASHES = 1 << 32  # of a million n-grams one in 4,000 shares its hash with another


@lru_cache(1 << 17)
def _hash(text: str) -> int:
    return crc32(text.encode("utf-8", "replace"))


@lru_cache(1 << 17)
def _pair(a: str, b: str) -> int:
    return crc32(f"{a} {b}".encode("utf-8", "replace"))


def _pieces(w):
    """All pieces of 3 to 5 characters of a str, or bytes."""
    return [w[i : i + n] for n in (3, 4, 5) for i in range(len(w) - n + 1)]


@lru_cache(1 << 16)
def _word(word: str) -> list[int]:
    """The hashes of a word and its pieces, of which <b and d> are not those in the middle."""
    return [_hash(word), *(_hash("#" + piece) for piece in _pieces(f"<{word}>"))]


def _text(text: str, tokens: tuple[int, ...]) -> np.ndarray:
    """The hashes of a text's distinct n-grams, in order, int64."""
    words, units = WORD.findall(text.lower()), [f"@{token}" for token in tokens]
    denied = (f"¬{b}" for i, a in enumerate(words) if a in NEGATION or a.endswith("n't")
              for b in words[i + 1 : i + 4])
    hashes = {*map(_hash, units), *map(_hash, denied)}.union(*map(_word, words))
    for row in (["^", *words, "$"], units):
        hashes.update(map(_pair, row, row[1:]))
    return np.sort(np.fromiter(hashes, np.int64, len(hashes)))


_kept = lru_cache(1 << 15)(_text)


def ngrams(texts: Sequence[str], idx: Tensor, mask: Tensor,
           domain: Sequence[int], *, keep: bool = False) -> tuple[Tensor, Tensor]:
    """The n-grams of texts (B,), tokenised to idx (B, T) where mask is True, in domains (B,).

    Returns the hashes (N,) of them all, int64, and where those of each text start (B,). `keep`:
    they are remembered, for texts that come again, such as those of training.
    """
    read = _kept if keep else _text
    rows = [read(text, tuple(row[real].tolist()))
            for text, row, real in zip(texts, idx, mask, strict=True)]
    rows = [part for row, d in zip(rows, domain, strict=True)
            for part in (row, (row + DOMAIN * (int(d) + 1)) % HASHES)]
    length = np.array([len(row) for row in rows[::2]], np.int64) * 2
    hashes = np.concatenate(rows) if rows else length
    return torch.from_numpy(hashes), torch.from_numpy(length.cumsum() - length)


@lru_cache(1 << 16)
def _rows(word: bytes) -> np.ndarray:
    """The rows of a word and of its pieces; nothing has none."""
    w = b"<" + word + b">"
    parts = [w, *_pieces(w)] if word else []
    return np.array([crc32(part) % PIECES for part in parts], np.int64)


def pieces(tokens: Sequence[bytes], idx: Tensor) -> tuple[Tensor, Tensor]:
    """The pieces of the word that each token of idx (B, T) is part of; special tokens have none.

    tokens: the bytes of the tokenizer's. Returns the rows (N,) of all pieces, below PIECES, and
    where those of each position start (B T,).
    """
    rows = [np.zeros(0, np.int64)]
    for row in idx.tolist():
        text = [tokens[i] if i < len(tokens) else b"" for i in row]
        ends = [i for i in range(1, len(text)) if not (_inside(text[i - 1][-1:]) and
                                                       _inside(text[i][:1]))]
        for a, b in pairwise([0, *ends, len(text)]):
            rows += [_rows(b"".join(text[a:b]).strip())] * (b - a)
    length = np.array([len(row) for row in rows[1:]], np.int64)
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(length.cumsum() - length)


def _inside(byte: bytes) -> bool:
    """Whether a word goes on at this byte: a letter, a digit, or one of several of a character."""
    return byte.isalnum() or byte >= b"\x80"


class Vocabulary(NamedTuple):
    """The n-grams that a model knows; the first stands for all others."""

    known: Tensor  # (V,) int64, hashes in order
    polarity: Tensor  # (V,) how far from the mean people rate texts with the n-gram, 1 on average
    valence: Tensor  # (V, 1) how people rate the word alone, 0 for what they did not


NOTHING = Vocabulary(torch.tensor([-1]), torch.zeros(1), torch.zeros(1, 1))


# polarity = |sum of y| / (count + 1), over the texts that have the n-gram, then scaled to a mean
# square of 1 over all that occurs. It is Wang & Manning's (2012) log-count ratio for ratings: a
# weight that is learnt in this unit needs no long way where a word is telling, and stays small
# where it is not.
def vocabulary(hashes: Tensor, start: Tensor, y: np.ndarray,
               valence: dict[str, float]) -> Vocabulary:
    """What texts (B,) with ratings y (B,), of mean 0 and sd 1, and words' valences say.

    hashes, start: of `ngrams`; an n-gram is known that comes in two texts.
    """
    length = torch.diff(start, append=start.new_tensor([len(hashes)])).numpy()
    known, which, count = np.unique(hashes.numpy(), return_inverse=True, return_counts=True)
    polarity = np.abs(np.bincount(which, np.repeat(y, length), len(known))) / (count + 1)
    polarity /= max((count * polarity**2).sum() / max(count.sum(), 1), 1e-12) ** 0.5
    keep = count > 1
    known, polarity = np.append(-1, known[keep]), np.append(0, polarity[keep])
    words = {_hash(word.lower()): x for word, x in valence.items() if WORD.fullmatch(word)}
    alone = np.array([words.get(h, 0.0) for h in known.tolist()])
    return Vocabulary(torch.from_numpy(known), torch.from_numpy(polarity).float(),
                      torch.from_numpy(alone)[:, None].float())


class NgramScore(nn.Module):
    """score = bound(SCALE / sqrt(n + 1) * sum over a text's n n-grams of p w + u l); 0 untrained.

    w: the n-gram's weight, p its polarity, l its valence, u the weight of valences in the domain;
    bound(x) = BOUND tanh(x / BOUND).
    """

    def __init__(self, n_ngrams: int, n_domain: int, dropout: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_ngrams, 1))
        self.u = nn.Parameter(torch.zeros(n_domain))
        self.register_buffer("known", torch.arange(-1, n_ngrams - 1))
        self.register_buffer("polarity", torch.zeros(n_ngrams))
        self.register_buffer("valence", torch.zeros(n_ngrams, 1))
        self.drop = nn.Dropout(dropout)  # of n-grams

    def forward(self, hashes: Tensor, start: Tensor, domain: Tensor) -> Tensor:
        """(N,), (B,) of `ngrams` and (B,) -> (B,)."""
        return self.score(self.look_up(hashes), start, domain)

    def look_up(self, hashes: Tensor) -> Tensor:
        """The places of n-grams (N,) among the known ones, 0 for others."""
        ids = torch.searchsorted(self.known, hashes).clamp(max=len(self.known) - 1)
        return torch.where(self.known[ids] == hashes, ids, 0)

    def score(self, ids: Tensor, start: Tensor, domain: Tensor) -> Tensor:
        """(N,) of `look_up`, starts (B,) and (B,) -> (B,)."""
        length = torch.diff(start, append=start.new_tensor([len(ids)]))
        text = torch.arange(len(start), device=ids.device).repeat_interleave(length)
        n = torch.zeros_like(start).index_add(0, text, (ids > 0).long())
        share = self.drop((n + 1).rsqrt()[text] * (ids > 0))  # (N,)
        w = F.embedding_bag(ids, self.weight, start, mode="sum",
                            per_sample_weights=share * self.polarity[ids])
        alone = F.embedding_bag(ids, self.valence, start, mode="sum", per_sample_weights=share)
        total = w[:, 0] + self.u[domain] * alone[:, 0]
        return BOUND * torch.tanh(SCALE / BOUND * total)
