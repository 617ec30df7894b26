"""Learning a byte-level BPE vocabulary: train_bpe beside a trainer in Rust and one that recounts.

All get the same text and the same pattern to cut it with, and learn as many tokens; case["data"] is
a folder that data/shakespeare/prepare.py has filled (1.1 MB, put together again) or a text file.
`tokenizers` takes the text line by line, which is when it is fastest, and every core; train_bpe
takes one. tiktoken's educational trainer counts all pairs of the text anew for each merge, as
minbpe does: its time is that of the first merges, with its start, so a merge is a unit here, and
the ratio is an extrapolation (upwards: late merges, when words are short, cost some 40 % less).
Checks: the share of the text's cuts into tokens that differ from those of train_bpe; for train_bpe
itself, the merges out of some that were not a most frequent pair, counted from scratch.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from nanokl.bench import Ready
from nanokl.data import Shard
from nanokl.tokenizer import PATTERN, Tokenizer, _count_chunks, train_bpe

CASES = ({"name": "4,096 tokens", "vocab_size": 4096},
         {"name": "tiny", "vocab_size": 300, "extra": True})  # fmt: skip
RECOUNTED = 5  # merges that the educational trainer is given
CHECKED = 20  # merges of train_bpe that are looked at, evenly spread


def _text(data: str) -> str:
    path = Path(data)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    tokenizer, parts = Tokenizer.load(path), []
    for name in ("train", "val"):  # the first nine tenths of the text and the last
        shard = Shard.open(path / f"{name}.bin", tokenizer)
        parts += [shard.tokens[a + 1 : b] for a, b in pairwise(shard.starts)]
    return tokenizer.decode(np.concatenate(parts))


def _ready(run, case: dict, check: dict, merges: int | None = None) -> Ready:
    return Ready(run, merges or case["vocab_size"] - 256, "merge", check)


def _nanokl(case: dict) -> Ready:
    text = _text(case["data"])
    tokens = train_bpe(text, case["vocab_size"], specials=()).tokens
    stages = np.linspace(256, len(tokens) - 1, CHECKED).astype(int).tolist()
    chunks = _count_chunks([text], PATTERN)
    wrong = sum(not _is_most_frequent(tokens, stage, chunks) for stage in stages)
    cuts = _cuts(tokens, text)
    return _ready(lambda: train_bpe(text, case["vocab_size"], specials=()), case,
                  {"merges not most frequent": wrong, "bytes per token": cuts[-1] / len(cuts)})


def _encoding(tokens: tuple[bytes, ...]) -> tiktoken.Encoding:
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def _cuts(tokens: tuple[bytes, ...], text: str) -> np.ndarray:
    """Where tiktoken, with these tokens, ends each token of the text, in bytes."""
    return np.cumsum([len(tokens[i]) for i in _encoding(tokens).encode_ordinary(text)])


def _is_most_frequent(tokens: tuple[bytes, ...], stage: int, chunks: Counter[str]) -> bool:
    """Whether tokens[stage] joins a pair that no pair outnumbers in what was there before it."""
    encoding, count = _encoding(tokens[:stage]), Counter()
    for chunk, n in chunks.items():
        for pair in pairwise(encoding.encode_ordinary(chunk)):
            count[pair] += n
    best = max(count.values())
    return any(n == best and tokens[a] + tokens[b] == tokens[stage]
               for (a, b), n in count.items())


def _tokenizers(case: dict) -> Ready:
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Peer

    text = _text(case["data"])
    lines = text.splitlines(keepends=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()

    def run() -> Peer:
        peer = Peer(models.BPE())
        peer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        trainer = trainers.BpeTrainer(vocab_size=case["vocab_size"], min_frequency=2,
                                      initial_alphabet=alphabet, show_progress=False)
        peer.train_from_iterator(lines, trainer)
        return peer

    theirs = np.cumsum([len(token) for token in run().encode(text).tokens])  # a character a byte
    ours = _cuts(train_bpe(text, case["vocab_size"], specials=()).tokens, text)
    return _ready(run, case, {"cuts that differ": len(np.setxor1d(ours, theirs)) / len(ours),
                              "bytes per token": theirs[-1] / len(theirs)})


def _educational(case: dict) -> Ready:
    from tiktoken._educational import bpe_train

    text = _text(case["data"])
    size = 256 + RECOUNTED
    run = lambda: bpe_train(text, size, PATTERN, visualise=None)  # noqa: E731
    theirs = list(run())[256:]
    ours = train_bpe(text, size, specials=()).tokens[256:]
    return _ready(run, case, {"tokens that differ": len(set(theirs) ^ set(ours))}, RECOUNTED)


VARIANTS = {"nanokl": _nanokl, "tokenizers": _tokenizers, "tiktoken educational": _educational}
ENVIRONMENT = {"tokenizers": "peers"}
