"""agreement.py against loops over pairs, all resamples, and scorers whose numbers are known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl.agreement import bootstrap_se, calibration, pair_report
from nanokl.judgements import Judgements


def make_judgements(ratings, domains=None, names=("film", "news"), texts=None):
    n = [len(r) for r in ratings]
    padded = np.zeros((len(ratings), max(n)), np.float32)
    for row, r in zip(padded, ratings, strict=True):
        row[: len(r)] = r
    domains = np.array([0] * len(n) if domains is None else domains)
    texts = texts or [f"text {i}" for i in range(len(n))]
    return Judgements([str(i) for i in range(len(n))], domains, list(names), texts, padded,
                      np.array(n))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 999))
def test_calibration_equals_a_loop(n, n_bins, seed):
    rng = np.random.default_rng(seed)
    margin, (wins, loses) = 3 * rng.standard_normal(n), rng.random((2, n))
    bins = {}
    for m, win, lose in zip(*(x.tolist() for x in (margin, wins, loses)), strict=True):
        p = max(1 / (1 + math.exp(-m)), 1 / (1 + math.exp(m)))
        low = max(k for k in range(n_bins) if 0.5 + k / (2 * n_bins) <= p + 1e-15)
        bins.setdefault(low, []).append(np.array([1, p, 0]) * (win + lose))
        bins[low].append(np.array([0, 0, win if m > 0 else lose]))
    right = [win if m > 0 else lose for m, win, lose in zip(margin, wins, loses, strict=True)]
    got = calibration(margin, np.array(right), wins + loses, n_bins)
    for b, k in zip(got, sorted(bins), strict=True):
        weight, predicted, observed = sum(bins[k])
        assert b == pytest.approx({"predicted": predicted / weight, "observed": observed / weight,
                                   "share": weight / (wins + loses).sum()})


def test_calibration_of_answers_drawn_from_the_model():
    """Within 5 standard errors in each of 10 bins: by chance once in 150,000 seeds."""
    rng = np.random.default_rng(0)
    margin = 2 * rng.standard_normal(40_000)
    won = rng.random(40_000) < 1 / (1 + np.exp(-margin))
    for b in calibration(margin, 1.0 * (won == (margin > 0)), np.ones(40_000)):
        assert abs(b["predicted"] - b["observed"]) < 5 * (0.25 / (40_000 * b["share"])) ** 0.5
    right = np.array([1.0, 1.0, 0.0])
    sure = calibration(np.array([50.0, -50.0, 1000.0]), right, np.ones(3))
    assert sure == [pytest.approx({"predicted": 1, "observed": 2 / 3, "share": 1})]


def test_bootstrap_equals_all_resamples():
    """5 snippets, their 10 pairs: all 3,125 resamples. 20,000 draws leave .5 % of noise."""
    a, b = (np.array(x) for x in zip(*itertools.combinations(range(5), 2), strict=True))
    right = np.array([1, 0, 1, 1, 0.5, 1, 0, 1, 1, 0.5])
    means = []
    for drawn in itertools.product(range(5), repeat=5):
        times = [drawn.count(i) for i in range(5)]
        weight = [times[i] * times[j] for i, j in zip(a, b, strict=True)]
        means.append(sum(w * r for w, r in zip(weight, right, strict=True)) / max(sum(weight), 1))
    se = bootstrap_se(right, np.ones(10), a, b, seed=0, repeats=20_000)
    assert se == pytest.approx(np.std(means), rel=0.03)
    where = np.array([3, 8, 11, 20, 21])  # as rows of a longer list, with others in between
    same = bootstrap_se(right, np.ones(10), where[a], where[b], seed=0, repeats=20_000)
    assert same == se
    half = bootstrap_se(right / 2, np.ones(10) / 2, a, b, seed=0, repeats=20_000)
    assert half == pytest.approx(se)


def test_bootstrap_of_pairs_that_share_nothing():
    """Its square is 3 p (1 - p) / n: with products of Poisson(1) weights Var(w_a w_b) = 2^2 - 1.

    So it errs on the safe side by sqrt(3) where snippets are not shared (and by ever less where
    they are). 400 repeats leave 3.5 % of noise: a fifth is more than 5 standard deviations.
    """
    n = 1000
    right = np.arange(n) % 10 < 7  # p = .7
    pairs = np.arange(2 * n).reshape(n, 2)
    se = bootstrap_se(right, np.ones(n), pairs[:, 0], pairs[:, 1], seed=1, repeats=400)
    assert se / (3 * 0.7 * 0.3 / n) ** 0.5 == pytest.approx(1, abs=0.2)


def test_bootstrap_of_pairs_that_share_snippets():
    """Against the spread of the accuracy over fresh snippets, which ignores nothing.

    Each snippet has its own luck, and is in 40 pairs: counting pairs as independent says a
    quarter of the truth. 300 fresh sets leave 4 % of noise on the truth, and the mean of 20
    bootstraps 4 % or so: a quarter is more than 4 standard deviations.
    """
    rng, n = np.random.default_rng(2), 60
    accuracy, se = [], []
    for k in range(300):
        luck = rng.choice([0.0, 0.45], n)
        a = rng.integers(n, size=20 * n)
        b = (a + rng.integers(1, n, size=20 * n)) % n
        right = rng.random(20 * n) < 0.05 + luck[a] + luck[b]
        accuracy.append(right.mean())
        if k < 20:
            se.append(bootstrap_se(right, np.ones(20 * n), a, b, seed=k))
    assert np.mean(se) / np.std(accuracy) == pytest.approx(1, abs=0.25)
    assert np.mean(se) > 2.5 * (0.25 / (20 * n)) ** 0.5


def noiseless(n=24):
    """Raters of two domains who all agree, and the ratings that they give."""
    level = np.random.default_rng(0).permutation(n) / 4 - 3
    return make_judgements([[x] * (3 + i % 3) for i, x in enumerate(level)],
                           [i % 2 for i in range(n)]), level


def test_report_of_a_perfect_and_of_an_anti_perfect_scorer():
    j, level = noiseless()
    good, bad = (pair_report(s * level, j) for s in (50.0, -50.0))
    assert good["pair_accuracy"] == pytest.approx(1) and bad["pair_accuracy"] == 0
    assert good["pair_accuracy_se"] < 1e-12 > bad["pair_accuracy_se"]
    assert good["nats_per_pair"] < 1e-4 and bad["nats_per_pair"] > 10
    assert good["calibration_error"] < 1e-3 and bad["calibration_error"] > 0.99
    for name in ("film", "news"):
        assert good["pearson_r"][name] == pytest.approx(1) == -bad["pearson_r"][name]
        assert good["human_r"][name] == pytest.approx(1)  # any rater of each, against the others
        part = good["domains"][name]
        assert (part["n_pairs"], part["n_snippets"]) == (66, 12)
        assert part["human_ceiling"] == pytest.approx(1)
    timid = pair_report(1e-30 * level, j)
    assert timid["pair_accuracy"] == pytest.approx(1)
    assert timid["nats_per_pair"] == pytest.approx(math.log(2))


def test_report_equals_loops_over_human_pairs():
    rng = np.random.default_rng(3)
    n = 30
    latent = rng.standard_normal(n)
    j = make_judgements([np.rint(2 * x + 1.5 * rng.standard_normal(5 + i % 4)).clip(-4, 4)
                         for i, x in enumerate(latent)], [i % 2 for i in range(n)])
    score = np.round(latent + 0.5 * rng.standard_normal(n), 1)  # rounded: some ties
    pairs, report = j.pairs, pair_report(score, j)
    rows = []  # of each answer: weight, right, nats, predicted, the others', a, b, domain
    for a, b, d, wins, loses, human in zip(*vars(pairs).values(), strict=True):
        for sign, weight in ((1, wins), (-1, loses)):
            m = sign * (score[a] - score[b])
            rows.append((weight, 1.0 if m > 0 else 0.5 if m == 0 else 0.0,
                         math.log1p(math.exp(-m)), 1 / (1 + math.exp(-abs(m))),
                         human / (wins + loses) if wins + loses else 0, a, b, d))
    weight, right, nats, predicted, human, *_, domain = rows = np.array(rows).T
    assert 0.5 in right
    assert report["pair_accuracy"] == pytest.approx(weight @ right)
    assert report["nats_per_pair"] == pytest.approx(weight @ nats)
    assert report["human_ceiling"] == pytest.approx(weight @ human)
    for number, name in enumerate(("film", "news")):
        part, w = report["domains"][name], weight * (domain == number)
        assert part["pair_accuracy"] == pytest.approx(w @ right / w.sum())
        assert part["human_ceiling"] == pytest.approx(w @ human / w.sum())
        mine = pairs.domain == number
        both = pairs.wins[mine] + pairs.loses[mine]
        se = bootstrap_se((weight * right).reshape(-1, 2).sum(1)[mine], both, pairs.a[mine],
                          pairs.b[mine], seed=0)
        assert part["pair_accuracy_se"] == pytest.approx(se)  # over the domain's own snippets
        here = j.domains == number
        mean = [r[:k].mean() for r, k in zip(j.ratings[here], j.n_ratings[here], strict=True)]
        assert report["pearson_r"][name] == pytest.approx(np.corrcoef(mean, score[here])[0, 1])
        assert 0 < part["human_r"] < 1 and 0.005 < part["pair_accuracy_se"] < 0.1
        assert (part["n_pairs"], part["n_snippets"]) == (105, 15)
    se = [part["pair_accuracy_se"] for part in report["domains"].values()]
    assert report["pair_accuracy_se"] == pytest.approx(math.hypot(*se) / 2)
    error = sum(b["share"] * abs(b["predicted"] - b["observed"]) for b in report["calibration"])
    assert report["calibration_error"] == pytest.approx(error)
    assert sum(b["share"] for b in report["calibration"]) == pytest.approx(1)
    near = predicted < 0.55
    assert report["calibration"][0]["predicted"] == pytest.approx(
        np.average(predicted[near], weights=weight[near]))
