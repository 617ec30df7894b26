"""Embeddings of n-grams: what the last n tokens mean together is looked up, not computed.

A small model's first layers learn which tokens follow which; a table of the n-grams that occur at
least twice in training says it at the cost of a look-up (the idea: hash embeddings of n-grams, as
in fastText, arXiv:1607.04606). n-grams outside the table, and positions with fewer than n tokens
before them, add 0. Left out: hashing, n-grams across the rows of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

COUNTED = 1 << 24  # tokens of a corpus, from its beginning, whose n-grams are counted


# key(t) = sum_{k < n} (idx[t - k] + 1) (V + 1)^k  mod 2^64: a number of its own for each n-gram, as
# long as (V + 1)^n < 2^63; beyond that two n-grams share one with odds of about 2^-64.
def ngram_keys(idx: Tensor, n: int, vocab_size: int) -> Tensor:
    """The key of the n tokens that end at each position of idx (..., T): (..., T - n + 1)."""
    keys, T = torch.zeros_like(idx[..., n - 1 :]), idx.shape[-1]
    for k in reversed(range(n)):  # Horner's rule; int64 wraps around
        keys = keys * (vocab_size + 1) + idx[..., n - 1 - k : T - k] + 1
    return keys


def frequent_ngrams(tokens: np.ndarray, longest: int, vocab_size: int, *,
                    least: int = 2) -> list[Tensor]:
    """Sorted keys of the n-grams that occur `least` times in tokens (N,), for n = 2 to longest.

    Fewer lists where no n-gram of some length does.
    """
    idx, found = torch.from_numpy(tokens[:COUNTED].astype(np.int64)), []
    for n in range(2, longest + 1):
        keys, counts = ngram_keys(idx, n, vocab_size).unique(return_counts=True)
        if not (counts >= least).any():
            break  # nor does a longer one
        found.append(keys[counts >= least])
    return found


class NgramEmbedding(nn.Module):
    """The sum of the embeddings of the 2-, 3-, ... grams that end at a position."""

    def __init__(self, config):
        super().__init__()
        self.vocab_size, self.dropout = config.vocab_size, config.ngram_dropout
        self.longest = len(config.ngram_rows) + 1
        # row 0 is for what is not in the table, and stays 0
        self.tables = nn.ModuleList(nn.Embedding(rows + 1, config.n_embd, padding_idx=0)
                                    for rows in config.ngram_rows)
        for n, rows in enumerate(config.ngram_rows, 2):
            self.register_buffer(f"keys_{n}", torch.zeros(rows, dtype=torch.int64))

    def know(self, keys: Sequence[Tensor]) -> None:
        """Takes the keys of `frequent_ngrams`, as many as the config has rows."""
        for n, mine in enumerate(keys, 2):
            getattr(self, f"keys_{n}").copy_(mine)

    def zero_unknown(self) -> None:
        """Row 0 of each table to 0, where its gradient keeps it; call it after any initialiser."""
        for table in self.tables:
            table.weight.data[0] = 0.0

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) -> (B, T, C). In training n-grams are dropped at random, position by position:

        a new text lacks some of them, and shorter ones must do there.
        """
        total = 0.0
        for n, table in enumerate(self.tables, 2):
            known = getattr(self, f"keys_{n}")
            # before the beginning is -1, a digit 0 of the key, which no n-gram has
            keys = ngram_keys(F.pad(idx, (n - 1, 0), value=-1), n, self.vocab_size)  # (B, T)
            row = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
            row = torch.where(known[row] == keys, row + 1, 0)
            kept = F.dropout(torch.ones_like(row, dtype=torch.float32), self.dropout, self.training)
            total = total + table(row) * kept[..., None]
        return total
