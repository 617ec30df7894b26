"""ngrams.py against a slow list of strings, and closed forms of the linear score."""

import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl.ngrams import SCALE, NgramScore, ngrams

TEXTS = ["A bad film", "", "it's   SO bad!!", "é", "a bad film", "bad bad bad"]
DOMAINS = [0, 1, 2, 0, 1, 3]


def slow(words):
    """The n-grams of a text's words, as strings."""
    pieces = ["#" + f"<{w}>"[i:j] for w in words for i in range(len(w) + 2)
              for j in range(i + 3, min(i + 5, len(w) + 2) + 1)]
    edged = ["^", *words, "$"]
    return [*words, *pieces, *(f"{edged[i]} {edged[i + 1]}" for i in range(len(edged) - 1))]


def split(ids, start):
    ends = [*start.tolist()[1:], len(ids)]
    return [ids[a:b].tolist() for a, b in zip(start.tolist(), ends, strict=True)]


def test_a_text_is_its_words_pairs_and_pieces_alone_and_in_its_domain():
    words = [["a", "bad", "film"], [], ["it's", "so", "bad", "!!"], ["é"], ["a", "bad", "film"],
             ["bad"] * 3]
    rows = split(*ngrams(TEXTS, DOMAINS, 2**62))
    for row, expected in zip(rows, map(slow, words), strict=True):
        half = len(row) // 2
        assert sorted(row[:half]) == sorted({zlib.crc32(g.encode()) for g in expected})
    assert slow(["bad"]) == ["bad", "#<ba", "#<bad", "#<bad>", "#bad", "#bad>", "#ad>", "^ bad",
                             "bad $"]
    shared, own = zip(*((set(r[: len(r) // 2]), set(r[len(r) // 2 :])) for r in rows), strict=True)
    assert shared[0] == shared[4] and not own[0] & own[4]  # the same words in two domains
    assert not any(a & b for a in shared for b in own)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=4), st.integers(1, 50))
def test_texts_do_not_depend_on_their_batch_and_ids_stay_in_range(texts, buckets):
    ids, start = ngrams(texts, [1] * len(texts), buckets)
    assert ids.dtype == start.dtype == torch.int64 and len(start) == len(texts)
    assert ((ids >= 0) & (ids < buckets)).all()
    rows = split(ids, start) if texts else []
    assert rows == [ngrams([t], [1], buckets)[0].tolist() for t in texts]
    assert all(rows)  # an empty text has its edges, so that no score divides by 0


def test_score_and_gradient_are_those_of_the_formula():
    model = NgramScore(1000, dropout=0.0)
    ids, start = ngrams(TEXTS, DOMAINS, 1000)
    assert torch.equal(model(ids, start), torch.zeros(6))
    with torch.no_grad():
        model.weight.copy_(0.1 * torch.randn(1000, 1, generator=torch.manual_seed(0)))
    score, w = model(ids, start), model.weight.detach()[:, 0].tolist()
    rows = split(ids, start)
    free = [SCALE * sum(w[i] for i in row) / math.sqrt(len(row)) for row in rows]
    expected = [3 * math.tanh(x / 3) for x in free]
    assert score.tolist() == pytest.approx(expected, abs=1e-4) and max(map(abs, free)) > 1
    score[2].backward()
    count = torch.bincount(torch.tensor(rows[2]), minlength=1000)
    slope = 1 - (expected[2] / 3) ** 2
    torch.testing.assert_close(model.weight.grad[:, 0],
                               slope * SCALE * count / math.sqrt(len(rows[2])))
    torch.nn.init.constant_(model.weight, 1e3)  # whatever a policy finds
    assert torch.equal(model(ids, start), torch.full((6,), 3.0))


def test_dropout_hides_ngrams_in_training_alone_and_keeps_the_mean():
    """The mean of 20,000 draws is off by 5 of its standard errors with odds of 6e-7."""
    model, (ids, start) = NgramScore(10**6, dropout=0.4), ngrams(["a"], [0], 10**6)
    n = len(ids)
    assert len(set(ids.tolist())) == n
    torch.nn.init.constant_(model.weight, 1e-4)  # so little that there is no bound to feel
    full = 1e-4 * SCALE * math.sqrt(n)
    assert model.eval()(ids, start).item() == pytest.approx(full, rel=1e-4)
    torch.manual_seed(0)
    model.train()
    many = ids.repeat(20_000), torch.arange(20_000) * n
    draws = model(*many).detach() / full
    assert len(set(draws.round(decimals=4).tolist())) == n + 1  # 0 to n of them are left
    sd = math.sqrt(0.4 / 0.6 / n)
    assert abs(draws.mean() - 1) < 5 * sd / math.sqrt(20_000)
