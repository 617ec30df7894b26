"""ngrams.py against a slow list of strings, counts by hand, and closed forms of the score."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl.ngrams import NOTHING, PIECES, SCALE, NgramScore, Vocabulary, ngrams, pieces, vocabulary

TEXTS = ["A bad film", "", "it's   SO bad!!", "é", "a bad film", "bad bad bad",
         "Don't miss: not a bad film"]
TOKENS = [[1, 5, 6, 2], [1, 2], [1, 7, 5, 2], [1, 9, 2], [1, 5, 6, 2], [1, 5, 5, 5, 2],
          [1, 3, 2]]
DOMAINS = [0, 1, 2, 0, 1, 3, 0]


def slow(words, tokens):
    """The n-grams of a text's words and tokens, as strings."""
    pieces = ["#" + f"<{w}>"[i:j] for w in words for i in range(len(w) + 2)
              for j in range(i + 3, min(i + 5, len(w) + 2) + 1)]
    edged, units = ["^", *words, "$"], [f"@{t}" for t in tokens]
    denied = ["¬" + words[j] for i, w in enumerate(words) for j in range(i + 1, len(words))
              if j < i + 4 and (w in ("not", "never") or w[-3:] == "n't")]
    pairs = [f"{row[i]} {row[i + 1]}" for row in (edged, units) for i in range(len(row) - 1)]
    return [*words, *pieces, *units, *denied, *pairs]


def grams(texts, tokens, domains):
    """`ngrams` of rows of tokens, padded with a token of its own."""
    T = max(map(len, tokens), default=0)
    idx = torch.tensor([[*row, *[99] * (T - len(row))] for row in tokens]).view(len(tokens), T)
    return ngrams(texts, idx, idx != 99, domains)


def crc(text):
    return zlib.crc32(text.encode())


def split(hashes, start):
    ends = [*start.tolist()[1:], len(hashes)]
    return [hashes[a:b].tolist() for a, b in zip(start.tolist(), ends, strict=True)]


def test_a_text_is_its_words_pairs_pieces_and_tokens_alone_and_in_its_domain():
    words = [["a", "bad", "film"], [], ["it's", "so", "bad", "!!"], ["é"], ["a", "bad", "film"],
             ["bad"] * 3, ["don't", "miss", ":", "not", "a", "bad", "film"]]
    rows = split(*grams(TEXTS, TOKENS, DOMAINS))
    for row, expected in zip(rows, map(slow, words, TOKENS), strict=True):
        assert row[: len(row) // 2] == sorted({crc(gram) for gram in expected})
    assert slow(["bad"], [1, 2]) == ["bad", "#<ba", "#<bad", "#<bad>", "#bad", "#bad>", "#ad>",
                                     "@1", "@2", "^ bad", "bad $", "@1 @2"]
    assert [gram for gram in slow(words[-1], []) if gram[0] == "¬"] == [
        "¬miss", "¬:", "¬not", "¬a", "¬bad", "¬film"]
    shared, own = zip(*((set(r[: len(r) // 2]), set(r[len(r) // 2 :])) for r in rows), strict=True)
    assert shared[0] == shared[4] and not own[0] & own[4]  # the same words in two domains
    assert not any(a & b for a in shared for b in own)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), st.lists(st.integers(0, 9), max_size=9)),
                max_size=4), st.integers(0, 9))
def test_texts_do_not_depend_on_their_batch(rows, domain):
    texts, tokens = [r[0] for r in rows], [r[1] for r in rows]
    hashes, start = grams(texts, tokens, [domain] * len(rows))
    assert hashes.dtype == start.dtype == torch.int64 and len(start) == len(rows)
    assert ((hashes >= 0) & (hashes < 2**32)).all()
    alone = [grams([t], [row], [domain])[0].tolist() for t, row in rows]
    assert (split(hashes, start) if rows else []) == alone and all(alone)


def test_vocabulary_is_what_comes_twice_with_polarity_and_valence():
    """Four texts by hand: counts, |sum of y| / (count + 1), scaled to a mean square of 1."""
    texts, y = ["x good", "x good", "x bad", "once"], np.array([1.5, 0.5, -1.0, -1.0])
    hashes, start = grams(texts, [[]] * 4, [0] * 4)
    found = vocabulary(hashes, start, y, {"Good": 2.5, "bad": -2.0, ":-) x": 3.0})
    assert found.known[0] == -1 and found.polarity[0] == found.valence[0] == 0
    assert found.known.tolist() == sorted(found.known.tolist())
    known = dict(zip(found.known.tolist(), zip(found.polarity.tolist(), found.valence[:, 0]
                                               .tolist(), strict=True), strict=True))
    assert crc("once") not in known and crc("bad") not in known and crc("x bad") not in known
    counts = {}
    for text, rating in zip(texts, y, strict=True):
        for h in grams([text], [[]], [0])[0].tolist():
            counts.setdefault(h, []).append(rating)
    raw = {h: abs(sum(ys)) / (len(ys) + 1) for h, ys in counts.items()}
    square = sum(len(ys) * raw[h] ** 2 for h, ys in counts.items()) / sum(map(len, counts.values()))
    assert set(known) == {-1} | {h for h, ys in counts.items() if len(ys) > 1}
    for h, (polarity, _) in known.items():
        assert h == -1 or polarity == pytest.approx(raw[h] / square**0.5, rel=1e-6)
    assert raw[crc("good")] == pytest.approx(2 / 3) and raw[crc("x")] == pytest.approx(1 / 4)
    valence = {h: v for h, (_, v) in known.items() if v}
    assert valence == {crc("good"): 2.5}  # of the word in any domain, not of its pieces
    nothing = vocabulary(*grams(["a", "b"], [[], []], [0, 0]), np.zeros(2), {})
    assert not nothing.polarity.any()  # ratings that say nothing are no error


def model_of(texts=TEXTS, tokens=TOKENS, domains=DOMAINS, dropout=0.0):
    """A model that knows two thirds of the n-grams of texts, with random weights."""
    rng = torch.Generator().manual_seed(0)
    known = grams(texts, tokens, domains)[0].unique()
    known = torch.cat((torch.tensor([-1]), known[known % 3 > 0]))
    polarity, valence = (torch.rand(len(known), generator=rng) for _ in range(2))
    polarity[0] = valence[0] = 0
    model = NgramScore(len(known), 4, dropout)
    model.load_state_dict(Vocabulary(known, polarity, valence[:, None])._asdict(), strict=False)
    return model


def test_score_and_gradient_are_those_of_the_formula():
    model, (hashes, start) = model_of(), grams(TEXTS, TOKENS, DOMAINS)
    domain = torch.tensor(DOMAINS)
    assert torch.equal(model(hashes, start, domain), torch.zeros(7))
    with torch.no_grad():
        model.weight.copy_(0.3 * torch.randn(model.weight.shape, generator=torch.manual_seed(0)))
        model.u.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
    score = model(hashes, start, domain)
    table = {h: (i, p, v) for i, (h, p, v) in enumerate(zip(
        model.known.tolist(), model.polarity.tolist(), model.valence[:, 0].tolist(), strict=True))}
    rows = [[table[h] for h in row if h in table] for row in split(hashes, start)]
    assert sum(map(len, rows)) < len(hashes)
    w, u = model.weight.detach()[:, 0].tolist(), model.u.tolist()
    free = [SCALE * sum(w[i] * p + u[d] * v for i, p, v in row) / math.sqrt(len(row) + 1)
            for row, d in zip(rows, DOMAINS, strict=True)]
    expected = [3 * math.tanh(x / 3) for x in free]
    assert score.tolist() == pytest.approx(expected, abs=1e-4) and max(map(abs, free)) > 1
    score[2].backward()
    slope = (1 - (expected[2] / 3) ** 2) * SCALE / math.sqrt(len(rows[2]) + 1)
    gradient = torch.zeros(len(w))
    for i, p, _ in rows[2]:
        gradient[i] += slope * p
    torch.testing.assert_close(model.weight.grad[:, 0], gradient)
    by_domain = [0.0, 0.0, slope * sum(v for *_, v in rows[2]), 0.0]
    assert model.u.grad.tolist() == pytest.approx(by_domain, rel=1e-4)
    torch.nn.init.constant_(model.weight, 1e3)  # whatever a policy finds
    assert (model(hashes, start, domain) - 3).abs().max() < 1e-6


def test_what_is_not_known_says_nothing():
    model = model_of()
    torch.nn.init.normal_(model.weight)
    strange = grams(["zyx wvu"], [[40, 41]], [0])
    assert model(*strange, torch.tensor([0])) == 0
    empty = NgramScore(len(NOTHING.known), 4, 0.0)
    empty.load_state_dict(NOTHING._asdict(), strict=False)
    torch.nn.init.normal_(empty.weight)
    assert not empty(*grams(TEXTS, TOKENS, DOMAINS), torch.tensor(DOMAINS)).any()


def test_dropout_hides_ngrams_in_training_alone_and_keeps_the_mean():
    """The mean of 20,000 draws is off by 5 of its standard errors with odds of 6e-7."""
    hashes, start = grams(["a"], [[1]], [0])
    model, n = NgramScore(len(hashes) + 1, 1, 0.4), len(hashes)
    model.known.copy_(torch.cat((torch.tensor([-1]), hashes.sort().values)))
    torch.nn.init.constant_(model.weight, 1e-4)  # so little that there is no bound to feel
    torch.nn.init.ones_(model.polarity)
    full = 1e-4 * SCALE * n / math.sqrt(n + 1)
    assert model.eval()(hashes, start, start).item() == pytest.approx(full, rel=1e-4)
    torch.manual_seed(0)
    model.train()
    many = hashes.repeat(20_000), torch.arange(20_000) * n, torch.zeros(20_000, dtype=torch.int64)
    draws = model(*many).detach() / full
    assert len(set(draws.round(decimals=4).tolist())) == n + 1  # 0 to n of them are left
    sd = math.sqrt(0.4 / 0.6 / n)
    assert abs(draws.mean() - 1) < 5 * sd / math.sqrt(20_000)


def test_a_token_has_the_pieces_of_its_whole_word():
    tokens = [b" un", b"fun", b"ny", b" caf", b"\xc3", b"\xa9", b"!", b" 's"]
    idx = torch.tensor([[8, 0, 1, 2, 3, 4, 5, 9], [6, 1, 9, 2, 7, 1, 8, 8]])  # 8, 9 are special
    rows, start = pieces(tokens, idx)
    unfunny, cafe = b"unfunny", "caf\u00e9".encode()
    words = [b"", unfunny, unfunny, unfunny, cafe, cafe, cafe, b"",
             b"!", b"fun", b"", b"ny", b"'sfun", b"'sfun", b"", b""]
    found = split(rows, start)
    assert len(found) == idx.numel()
    for row, word in zip(found, words, strict=True):
        w = b"<" + word + b">"
        parts = [w[i:j] for i in range(len(w)) for j in range(i + 3, min(i + 5, len(w)) + 1)]
        assert sorted(row) == sorted(zlib.crc32(x) % PIECES for x in [w, *parts] if word)
    assert pieces(tokens, idx[:0])[0].numel() == 0
