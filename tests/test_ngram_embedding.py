"""ngram_embedding.py against dictionaries of tuples; its place in the GPT, cached and trained."""

from collections import Counter

import numpy as np
import pytest
import torch

from nanokl import UserError
from nanokl.generate import generate
from nanokl.gpt import GPT, GPTConfig
from nanokl.ngram_embedding import frequent_ngrams, ngram_keys

V = 7


def corpus(n=600, seed=0):
    return np.random.default_rng(seed).integers(0, V, n).astype("<u2")


def make(longest=4, dropout=0.5, seed=0, **sizes):
    keys = frequent_ngrams(corpus(), longest, V)
    config = GPTConfig(**{"vocab_size": V, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 8,
                          "ngram_rows": list(map(len, keys)), "ngram_dropout": dropout} | sizes)
    model = GPT(config, torch.Generator().manual_seed(seed))
    model.ngrams.know(keys)
    for p in model.parameters():  # zero_init would hide what attention sees
        if p.ndim == 2 and not (p == 0).all(1)[0]:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
    model.ngrams.zero_unknown()
    return model.eval()


def random_idx(B, T, seed=3):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_keys_tell_ngrams_apart(n):
    idx = random_idx(4, 60)
    keys = ngram_keys(idx, n, V)
    assert keys.shape == (4, 60 - n + 1)
    by_key = {}
    for row, row_keys in zip(idx.tolist(), keys.tolist(), strict=True):
        for t, key in enumerate(row_keys):
            assert by_key.setdefault(key, row[t : t + n]) == row[t : t + n]
    assert len(by_key) == len({tuple(x) for x in by_key.values()})


@pytest.mark.parametrize("least", [1, 2, 4])
def test_frequent_ngrams_are_those_that_a_counter_finds(least):
    tokens = corpus()
    found = frequent_ngrams(tokens, 4, V, least=least)
    for n in (2, 3, 4):
        counts = Counter(tuple(tokens[i : i + n].tolist()) for i in range(len(tokens) - n + 1))
        want = [g for g, count in counts.items() if count >= least]
        assert bool(want) == (n - 2 < len(found))
        if want:
            keys = ngram_keys(torch.tensor(want), n, V)[:, 0].tolist()
            assert found[n - 2].tolist() == sorted(keys)


def test_nothing_is_found_where_nothing_repeats():
    assert frequent_ngrams(np.arange(6, dtype="<u2"), 3, V) == []
    assert frequent_ngrams(np.arange(1, dtype="<u2"), 3, V) == []


def test_the_embedding_is_the_sum_over_known_ngrams():
    model, idx = make(), random_idx(3, 12)
    tokens, want = corpus().tolist(), torch.zeros(3, 12, 8)
    for n, table in enumerate(model.ngrams.tables, 2):
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        known = [g for g, count in counts.items() if count >= 2]
        known.sort(key=lambda g, n=n: ngram_keys(torch.tensor(g), n, V).item())
        for b in range(3):
            for t in range(n - 1, 12):
                gram = tuple(idx[b, t - n + 1 : t + 1].tolist())
                if gram in known:
                    want[b, t] += table.weight[1 + known.index(gram)].detach()
    with torch.no_grad():
        torch.testing.assert_close(model.ngrams(idx), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_texts_shorter_than_an_ngram(T):
    assert make()(random_idx(2, T)).shape == (2, T, 8)


@pytest.mark.parametrize("steps", [[1] * 12, [3, 1, 1, 7], [12]])
def test_cached_equals_whole(steps):
    model, idx = make(), random_idx(3, 12)
    cache, parts = model.new_cache(3, 12), []
    with torch.no_grad():
        for part in idx.split(steps, dim=1):
            parts.append(model(part, cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), model(idx), rtol=0, atol=1e-5)


def test_finished_rows_leave_their_tokens_behind():
    model, u = make(), torch.rand(8, 15, generator=torch.Generator().manual_seed(0))
    together = generate(model, [[1, 2]] * 8, 15, stop=3, u=u)
    assert len({len(row) for row in together.rows()}) > 2
    for i in range(8):
        alone = generate(model, [[1, 2]], 15, stop=3, u=u[i : i + 1])
        assert alone.rows()[0] == together.rows()[i]


def test_no_position_sees_the_future():
    model, idx = make(), random_idx(1, 10)
    other = idx.clone()
    other[0, 6:] = (other[0, 6:] + 1) % V
    with torch.no_grad():
        assert torch.equal(model(idx)[:, :6], model(other)[:, :6])


def test_dropout_drops_single_ngrams_in_training_only():
    """A share of 1/2 +- 5 standard errors of 2 x 3,000 draws: a false alarm in 10^6 seeds."""
    model, idx = make(longest=2, block_size=3001), random_idx(2, 3001)
    with torch.no_grad():
        whole, table = model.ngrams(idx), model.ngrams.tables[0].weight
        assert torch.equal(whole, model.ngrams(idx))
        model.train()
        torch.manual_seed(0)
        dropped = model.ngrams(idx)
    seen = whole.abs().sum(-1) > 0
    gone = (dropped.abs().sum(-1) == 0) & seen
    assert abs(gone[seen].float().mean() - 0.5) < 0.033
    kept = seen & ~gone
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert (table[0] == 0).all()


def test_unknown_ngrams_stay_at_zero_in_training():
    model = make(dropout=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        model.logits(model(random_idx(4, 20, seed=step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for table in model.ngrams.tables:
        assert (table.weight[0] == 0).all() and (table.weight[1:] != 0).any()


def test_saved_with_the_model(tmp_path):
    model, idx = make(), random_idx(2, 9)
    model.save_pretrained(tmp_path / "m")
    again = GPT.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(model(idx), again(idx))


def test_a_dropout_out_of_range_is_the_users():
    with pytest.raises(UserError, match="ngram_dropout is 1.0"):
        GPTConfig(ngram_dropout=1.0)
