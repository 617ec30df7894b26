"""Shards and batches against brute force on documents whose every token is a different number."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError
from nanokl.data import (
    BUCKET,
    Shard,
    eval_batches,
    lm_batch,
    mlm_batch,
    mlm_eval_batches,
    text_batch,
    write_shard,
)
from nanokl.tokenizer import SPECIALS, train_bpe


class Numbers:
    """Stands for a tokenizer of n ordinary tokens: all that shards and batches ask of one."""

    def __init__(self, n, name="numbers"):
        self.n, self.vocab_size, self.hash = n, n + len(SPECIALS), f"{name} {n}"

    def special(self, name):
        return self.n + SPECIALS.index(name)


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
