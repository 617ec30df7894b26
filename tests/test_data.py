"""Shards and batches against brute force on documents whose every token is a different number."""

import json
import multiprocessing
import tracemalloc
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError, data
from nanokl.data import (
    BUCKET,
    MAGIC,
    Shard,
    eval_batches,
    lm_batch,
    mlm_batch,
    mlm_eval_batches,
    text_batch,
    write_parts,
)
from nanokl.runtime import generator
from nanokl.tokenizer import SPECIALS, train_bpe


class Numbers:
    """Stands for a tokenizer of n ordinary tokens: all that shards and batches ask of one."""

    def __init__(self, n, name="numbers"):
        self.n, self.vocab_size, self.hash = n, n + len(SPECIALS), f"{name} {n}"

    def special(self, name):
        return self.n + SPECIALS.index(name)


def write_shard(path, docs, tokenizer, n_bytes):
    """Writes documents (token ids) one by one; the number of tokens."""
    separator = [tokenizer.special("<|endoftext|>")]
    parts = ((np.concatenate((separator, doc)), 0) for doc in docs)
    return write_parts(path, chain([(np.array([], int), n_bytes)], parts), tokenizer)["n_tokens"]


def make_shard(folder, lengths, n=None):
    """Documents of these lengths; all their tokens differ, unless n of them are drawn at random."""
    total = sum(lengths)
    tokenizer = Numbers(n or total)
    ids = np.arange(total) if n is None else np.random.default_rng(0).integers(0, n, total)
    docs = np.split(ids, np.cumsum(lengths)[:-1])
    write_shard(folder / "x.bin", docs, tokenizer, n_bytes=7)
    return Shard.open(folder / "x.bin", tokenizer), tokenizer, docs


lists_of_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@pytest.mark.parametrize(("n", "dtype"), [(100, "uint16"), (65_531, "uint16"), (65_532, "uint32")])
def test_shard_round_trip(tmp_path, n, dtype):
    tokenizer, docs = Numbers(n), [[0, n - 1], [5], [7, 8, 9]]
    assert write_shard(tmp_path / "x.bin", iter(docs), tokenizer, n_bytes=12) == 10
    shard = Shard.open(tmp_path / "x.bin", tokenizer)
    assert shard.tokens.tolist() == [n, 0, n - 1, n, 5, n, 7, 8, 9, n]
    assert shard.tokens.dtype == dtype and isinstance(shard.tokens, np.memmap)
    assert shard.starts.tolist() == [0, 3, 5, 9] and shard.n_bytes == 12
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def shard_bytes(docs, tokenizer, n_bytes):
    """The oracle: a whole shard made in memory."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    separator = tokenizer.special("<|endoftext|>")
    tokens = np.array([token for doc in docs for token in (separator, *doc)] + [separator], dtype)
    starts = np.cumsum([0, *(len(doc) + 1 for doc in docs)])
    header = {"dtype": dtype, "vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash,
              "n_tokens": len(tokens), "n_docs": len(docs), "n_bytes": n_bytes}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-(16 + len(text)) % 64)
    return MAGIC + len(text).to_bytes(8, "little") + text + starts.tobytes() + tokens.tobytes()


@settings(max_examples=25, deadline=None)
@given(lengths=lists_of_lengths, n=st.sampled_from([50, 70_000]), seed=st.integers(0, 99))
def test_streamed_shards_have_the_same_bytes(tmp_path_factory, lengths, n, seed):
    path, tokenizer = tmp_path_factory.mktemp("x") / "x.bin", Numbers(n)
    rng = np.random.default_rng(seed)
    docs = [rng.integers(0, n, length).tolist() for length in lengths]
    write_shard(path, (np.array(doc) for doc in docs), tokenizer, n_bytes=70)
    assert path.read_bytes() == shard_bytes(docs, tokenizer, 70)
    ids = np.concatenate([[n, *doc] for doc in docs])  # cut anywhere, empty parts among them
    cuts = np.sort(rng.integers(0, len(ids) + 1, 6))
    sizes = [10, 9, 8, 7, 6, 25, 5]
    header = write_parts(path, zip(np.split(ids, cuts), sizes, strict=True), tokenizer)
    assert path.read_bytes() == shard_bytes(docs, tokenizer, 70)
    assert (header["n_docs"], header["n_tokens"]) == (len(docs), len(ids) + 1)
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("docs", [[[1], [], [2]], [[]]])
def test_no_shard_with_an_empty_document(tmp_path, docs):
    with pytest.raises(AssertionError, match="is empty"):
        write_shard(tmp_path / "x.bin", docs, Numbers(5), n_bytes=1)
    assert not any(tmp_path.iterdir())


def grown(call) -> float:
    """MiB by which the process grows at most in a call."""

    def status(key):
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith(key)) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def write_and_read(path):
    """MiB for 100 MB of tokens in 20,000 documents: to write them, to open them, to draw 3 rows."""
    rng, tokenizer = np.random.default_rng(0), Numbers(60_000)
    docs = (rng.integers(0, 60_000, 2499) for _ in range(20_000))
    write = grown(lambda: write_shard(path, docs, tokenizer, n_bytes=1))
    size = {"batch_size": 3, "block_size": 64, "seed": 0}
    opened = grown(lambda: Shard.open(path, tokenizer))
    drawn = grown(lambda: lm_batch(Shard.open(path, tokenizer), 0, **size))
    return path.stat().st_size / 2**20, write, opened, drawn


def test_memory_does_not_grow_with_the_shard(tmp_path):
    """In a process of its own: forks of this one may hold more than they report."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size, write, opened, drawn = pool.apply(write_and_read, (tmp_path / "x.bin",))
    assert size > 95 and write < 12 and opened < 2 and drawn < 32


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: None, "no shard at"),
        (lambda b: b"", "is empty"),
        (lambda b: b"just some text, not a shard", "not a nanokl shard"),
        (lambda b: b[:12], "truncated"),
        (lambda b: b[:40], "truncated"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"\0", "not the"),
        (lambda b: b.replace(b"n_docs", b"n_dogs"), "has no n_docs in its header"),
    ],
)
def test_broken_shard(tmp_path, damage, says):
    _, tokenizer, _ = make_shard(tmp_path, [3, 4])
    content = damage((tmp_path / "x.bin").read_bytes())
    (tmp_path / "x.bin").unlink()
    if content is not None:
        (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        Shard.open(tmp_path / "x.bin", tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [Numbers(8), Numbers(7, "same size")])
def test_shard_of_another_vocabulary(tmp_path, other):
    make_shard(tmp_path, [3, 4])
    with pytest.raises(UserError, match="another tokenizer"):
        Shard.open(tmp_path / "x.bin", other)


@settings(max_examples=25, deadline=None)
@given(lengths=lists_of_lengths, block_size=st.integers(1, 12), seed=st.integers(-3, 3))
def test_lm_epoch_starts_at_each_document_once(tmp_path_factory, lengths, block_size, seed):
    shard, _, docs = make_shard(tmp_path_factory.mktemp("x"), lengths)
    ring = shard.tokens[:-1].tolist() * (block_size + 2)
    at = {start: i for i, start in enumerate(shard.starts[:-1].tolist())}
    per_epoch = sum(-(-(n + 1) // block_size) for n in lengths)  # windows, separators counted
    separator = shard.tokens[0]
    for epoch in range(2):
        begun = []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            (row,) = lm_batch(shard, step, batch_size=1, block_size=block_size, seed=seed).tolist()
            assert len(row) == block_size + 1
            # tokens differ, so that the row's place follows from its first ordinary token
            skip = int(row[0] == separator)
            place = ring.index(row[skip]) - skip if row[skip] != separator else None
            assert place is not None and row == ring[place : place + block_size + 1]
            if place in at:
                begun.append(at[place])
        # a long document's other windows are drawn anywhere in it, its start included
        assert set(begun) == set(range(len(docs)))
        short = [i for i in begun if lengths[i] + 1 <= block_size]
        assert len(short) == len(set(short))


def test_lm_long_document_is_covered_evenly(tmp_path):
    shard, _, _ = make_shard(tmp_path, [999])
    rows = lm_batch(shard, 0, batch_size=100, block_size=10, seed=0)
    first, *others = sorted(0 if row[0] == 999 else row[0].item() + 1 for row in rows)
    assert first == 0  # the document's separator
    stratum = (1000 - 10 + 1) / 99  # of the places where a window of 10 fits
    for k, place in enumerate(others):
        assert int(k * stratum) <= place < (k + 1) * stratum
    again = lm_batch(shard, 1, batch_size=100, block_size=10, seed=0)[:, 0].tolist()
    assert len({*again} & {*rows[:, 0].tolist()}) < 50  # other places in the next epoch


def test_batches_are_functions_of_seed_and_step(tmp_path):
    shard, tokenizer, _ = make_shard(tmp_path, [5, 9, 3, 14, 2, 8, 40])
    again = Shard.open(tmp_path / "x.bin", tokenizer)

    def draw(shard, step, seed=0):
        batch = mlm_batch(shard, tokenizer, step, batch_size=4, block_size=12, seed=seed)
        return [lm_batch(shard, step, batch_size=4, block_size=8, seed=seed), *vars(batch).values()]

    first = {step: draw(shard, step) for step in range(6)}
    for step in reversed(range(6)):
        assert all(map(torch.equal, draw(again, step), first[step]))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], draw(shard, 0, seed=1)[0])


def windows_one_by_one(lengths, size, seed, stream):
    """The oracle: (document, offset) of each window of an epoch 0, cut and drawn one by one."""
    cut = [(doc, k, n) for doc, length in enumerate(lengths)
           for n in [max(1, -(-length // size))] for k in range(n)]  # fmt: skip
    rng = generator(seed, stream, 0)
    order = torch.randperm(len(cut), generator=rng).tolist()
    u = torch.rand(len(cut), generator=rng, dtype=torch.float64).tolist()
    for window in order:
        doc, k, n = cut[window]
        place = (k - 1 + u[window]) / max(n - 1, 1) * max(lengths[doc] - size + 1, 1)
        yield doc, int(max(0.0, place))


@settings(max_examples=25, deadline=None)
@given(lengths=lists_of_lengths, block_size=st.integers(3, 12), seed=st.integers(-3, 3))
def test_batches_are_those_of_windows_one_by_one(tmp_path_factory, lengths, block_size, seed):
    """The order of batches that any earlier run had: with it, a run can be made again."""
    shard, tokenizer, _ = make_shard(tmp_path_factory.mktemp("x"), lengths)
    ring = shard.tokens[:-1].tolist() * (block_size + 2)
    epoch = list(windows_one_by_one([n + 1 for n in lengths], block_size, seed, "lm"))
    rows = lm_batch(shard, 0, batch_size=len(epoch), block_size=block_size, seed=seed).tolist()
    places = [int(shard.starts[doc]) + offset for doc, offset in epoch]
    assert rows == [ring[place : place + block_size + 1] for place in places]
    epoch = list(windows_one_by_one(lengths, block_size - 2, seed, "mlm"))
    batches = [mlm_batch(shard, tokenizer, step, batch_size=len(epoch), block_size=block_size,
                         seed=seed) for step in range(BUCKET)]  # fmt: skip
    drawn = Counter(row[1] for batch in batches for row in batch.targets.tolist())
    places = [int(shard.starts[doc]) + 1 + offset for doc, offset in epoch]
    assert not Counter(shard.tokens[places].tolist()) - drawn


def test_a_batch_does_not_look_at_every_document(tmp_path):
    """A million documents: a batch allocates less than a bit for each, after the first."""
    n = 1_000_000
    tokenizer, ids = Numbers(9), np.tile([9, 1, 2], n)
    write_parts(tmp_path / "x.bin", [(ids, 1)], tokenizer)
    shard = Shard.open(tmp_path / "x.bin", tokenizer)

    def peak(call):
        tracemalloc.start()
        call()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    size = {"batch_size": 8, "block_size": 8, "seed": 0}
    assert peak(lambda: shard.lengths) >= 8 * n  # what is looked for is seen
    lm_batch(shard, 0, **size), mlm_batch(shard, tokenizer, 0, **size)
    assert peak(lambda: [lm_batch(shard, step, **size) for step in range(1, 21)]) < n // 8
    assert peak(lambda: [mlm_batch(shard, tokenizer, s, **size) for s in range(1, 21)]) < n // 8
    assert data._first_windows.cache_info().maxsize <= 4  # a memo that cannot pile up


@settings(max_examples=25, deadline=None)
@given(lengths=lists_of_lengths, block_size=st.integers(1, 12), batch_size=st.integers(1, 7))
def test_eval_scores_each_token_once(tmp_path_factory, lengths, block_size, batch_size):
    shard, tokenizer, docs = make_shard(tmp_path_factory.mktemp("x"), lengths)
    separator, scored, closings = tokenizer.special("<|endoftext|>"), Counter(), 0
    for idx, mask in eval_batches(shard, block_size=block_size, batch_size=batch_size):
        assert idx.shape[1] == mask.shape[1] + 1 <= block_size + 1 and len(idx) <= batch_size
        assert mask.any(0).all() and mask.any(1).all()  # no column and no row of padding only
        assert (mask[:, :-1] >= mask[:, 1:]).all()  # padding at the right
        for row, t in mask.nonzero().tolist():
            context, target = idx[row, t].item(), idx[row, t + 1].item()
            scored[target] += 1
            closings += target == separator
            if target != separator:  # the token before it in its document, or the separator
                first = any(doc[0] == target for doc in docs)
                assert context == (separator if first else target - 1)
    assert closings == len(docs) and sum(scored.values()) == len(shard.tokens) - 1
    assert all(scored[token] == 1 for token in range(sum(lengths)))


def test_mlm_masking_rates(tmp_path):
    """100,000 tokens; each of 5 checks is off by 5 sd with odds of 6e-7."""
    n = 50
    shard, tokenizer, _ = make_shard(tmp_path, [62] * 1664, n)
    parts = [
        mlm_batch(shard, tokenizer, s, batch_size=104, block_size=64, seed=0) for s in range(16)
    ]
    idx, targets, predict = (
        torch.cat([getattr(b, name) for b in parts]) for name in ("idx", "targets", "predict")
    )
    tokens, chosen = 62 * len(idx), int(predict.sum())
    masked = (idx == tokenizer.special("[MASK]"))[predict].sum().item()
    kept = (idx == targets)[predict].sum().item()

    def check(count, total, p):
        assert abs(count - total * p) < 5 * (total * p * (1 - p)) ** 0.5, (count, total, p)

    assert tokens > 100_000
    check(chosen, tokens, 0.15 + 0.85**62 / 62)  # one is chosen where chance chose none
    check(masked, chosen, 0.8)
    check(kept, chosen, 0.1 + 0.1 / n)  # a random token can be the token itself
    check(chosen - masked - kept, chosen, 0.1 - 0.1 / n)
    random = idx[predict & (idx != targets) & (idx < n)]
    check((random < n // 2).sum().item(), len(random), 0.5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=lists_of_lengths, step=st.integers(0, 99), mask_prob=st.sampled_from([0.0, 0.15, 1.0])
)
def test_mlm_rows(tmp_path_factory, lengths, step, mask_prob):
    shard, tokenizer, docs = make_shard(tmp_path_factory.mktemp("x"), lengths)
    pad, cls, sep = (tokenizer.special(s) for s in ("[PAD]", "[CLS]", "[SEP]"))
    batch = mlm_batch(
        shard, tokenizer, step, batch_size=5, block_size=10, seed=1, mask_prob=mask_prob
    )
    texts = [doc.tolist() for doc in docs]
    for idx, mask, targets, predict in zip(*vars(batch).values(), strict=True):
        row = targets[mask].tolist()
        assert row[0] == cls and row[-1] == sep and (targets[~mask] == pad).all()
        doc = next(text for text in texts if row[1] in text)
        place = doc.index(row[1])
        assert row[1:-1] == doc[place : place + min(8, len(doc))]  # whole, or a window of 8
        special = targets >= tokenizer.n
        assert not (predict & special).any() and predict.any()
        assert torch.equal(idx[~predict], targets[~predict])
        if mask_prob == 1:
            assert torch.equal(predict, ~special)
        changed = idx[predict]
        assert ((changed < tokenizer.n) | (changed == tokenizer.special("[MASK]"))).all()
    assert batch.mask.any(0).all()  # no wider than the longest row


def test_mlm_epoch_covers_each_document_once_with_little_padding(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 30, 4 * BUCKET).tolist()
    shard, tokenizer, docs = make_shard(tmp_path, lengths)
    for epoch in range(2):
        steps = range(epoch * BUCKET, (epoch + 1) * BUCKET)
        batches = [
            mlm_batch(shard, tokenizer, step, batch_size=4, block_size=32, seed=3) for step in steps
        ]
        firsts = sorted(first for batch in batches for first in batch.targets[:, 1].tolist())
        assert firsts == sorted(doc[0] for doc in docs)
        assert np.mean([b.mask.float().mean() for b in batches]) > 0.85


def test_mlm_eval_is_the_same_for_any_batch_size(tmp_path):
    shard, tokenizer, _ = make_shard(tmp_path, [5, 9, 3, 14, 2, 8, 40, 1, 22])

    def rows(batch_size):
        out = []
        for batch in mlm_eval_batches(
            shard, tokenizer, block_size=12, batch_size=batch_size, seed=0
        ):
            for idx, mask, targets, predict in zip(*vars(batch).values(), strict=True):
                assert predict.any()
                out.append((idx[mask].tolist(), targets[mask].tolist(), predict[mask].tolist()))
        return out

    assert rows(1) == rows(4) == rows(100)
    text = sorted(t for _, targets, _ in rows(3) for t in targets if t < tokenizer.n)
    assert text == list(range(tokenizer.n))


def test_mlm_eval_masks_15_percent(tmp_path):
    """10,000 tokens; off by 5 sd with odds of 6e-7."""
    shard, tokenizer, _ = make_shard(tmp_path, [50] * 200)
    batches = mlm_eval_batches(shard, tokenizer, block_size=52, batch_size=64, seed=0)
    chosen = sum(int(batch.predict.sum()) for batch in batches)
    assert abs(chosen - 1500) < 5 * (10_000 * 0.15 * 0.85) ** 0.5


def test_text_batch():
    tokenizer = train_bpe(["ab ab cd"], 300)
    pad, cls, sep = (tokenizer.special(s) for s in ("[PAD]", "[CLS]", "[SEP]"))
    idx, mask = text_batch(tokenizer, ["", "xyz", "[MASK]vwxyz"], block_size=6)
    assert idx[0].tolist() == [cls, *b" ", sep, pad, pad, pad]
    assert idx[1].tolist() == [cls, *b" xyz", sep]
    assert idx[2].tolist() == [cls, *b" [MA", sep]  # special-looking text is text
    assert mask.sum(1).tolist() == [3, 6, 6] and mask.dtype == torch.bool
    spaced, plain = (text_batch(tokenizer, [text], block_size=9)[0] for text in (" ab\n", "ab"))
    assert torch.equal(spaced, plain) and plain[0, 1:-1].tolist() == tokenizer.encode(" ab")


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t: lm_batch(s, 0, batch_size=0, block_size=4, seed=0),
        lambda s, t: lm_batch(s, 0, batch_size=1, block_size=0, seed=0),
        lambda s, t: next(eval_batches(s, block_size=0, batch_size=1)),
        lambda s, t: mlm_batch(s, t, 0, batch_size=1, block_size=2, seed=0),
        lambda s, t: next(mlm_eval_batches(s, t, block_size=0, batch_size=1, seed=0)),
        lambda s, t: text_batch(t, [], block_size=0),
    ],
)
def test_sizes_too_small(tmp_path, call):
    shard, tokenizer, _ = make_shard(tmp_path, [3, 4])
    with pytest.raises(UserError, match="give at least"):
        call(shard, tokenizer)
