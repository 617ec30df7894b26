"""How far scores agree with people, beside how far people agree with each other.

Pair accuracy with the human ceiling, calibration, correlation with the mean rating; standard errors
by resampling snippets, since two comparisons that share one are not independent. Left out: who
rated what (the raters are anonymous).
"""

import numpy as np

from nanokl.judgements import Judgements


def calibration(margin: np.ndarray, right: np.ndarray, weight: np.ndarray,
                n_bins: int = 10) -> list[dict]:
    """Predicted and observed frequency of the likelier answer, in bins of equal width.

    margin, and of the comparisons' weights the part that went as predicted, and all: (P,).
    share is a bin's part of the weights.
    """
    p = 1 / (1 + np.exp(-np.abs(margin)))  # of the answer that the model prefers, .5 to 1
    which = np.minimum(((p - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    share, predicted, observed = (np.bincount(which, x, n_bins) for x in
                                  (weight, weight * p, right))
    return [{"predicted": predicted[b] / share[b], "observed": observed[b] / share[b],
             "share": share[b] / share.sum()} for b in np.flatnonzero(share)]


def bootstrap_se(right: np.ndarray, weight: np.ndarray, a: np.ndarray, b: np.ndarray, *,
                 seed: int, repeats: int = 200) -> float:
    """Standard error of sum(right) / sum(weight), (P,) of pairs a, b: the snippets are resampled.

    A pair weighs the product of its snippets' multiplicities (dyadic): if anything, too wide.
    """
    rng, snippets = np.random.default_rng(seed), np.union1d(a, b)
    n, place = len(snippets), (np.searchsorted(snippets, a), np.searchsorted(snippets, b))
    times = rng.multinomial(n, np.full(n, 1 / n), size=repeats).astype(float)  # (repeats, n)
    sums = []
    for x in (right, weight):
        table = np.zeros((n, n))
        np.add.at(table, place, x)
        sums.append((times @ table * times).sum(1))
    return float(np.std(sums[0] / np.maximum(sums[1], np.finfo(float).tiny)))


def _known(x: float) -> float | None:
    return None if np.isnan(x) else float(x)


def pair_report(score: np.ndarray, j: Judgements) -> dict:
    """How far scores (n,) of snippets agree with single raters, beside how far other raters do.

    Exactly, over all pairs of snippets and of their raters: pair accuracy with human ceiling,
    pooled (equal shares of the domains) and by domain, nats per pair, and calibration of
    sigmoid(score_a - score_b). The standard errors are over snippets. Pearson r with the mean
    rating beside one rater's r with the others' mean. What others say is None where there are none.
    """
    pairs = j.pairs
    margin, weight = score[pairs.a] - score[pairs.b], pairs.wins + pairs.loses
    right = np.where(margin == 0, weight / 2, np.where(margin > 0, pairs.wins, pairs.loses))
    pick = np.random.default_rng(0).integers(j.n_ratings)
    one = j.ratings[np.arange(len(score)), pick]  # a random rater of each snippet
    with np.errstate(invalid="ignore"):  # where one rater rated a text there are no others
        others = (j.ratings.sum(1) - one) / (j.n_ratings - 1)
    domains = {}
    for d in np.unique(j.domains):
        rows, mine = pairs.domain == d, j.domains == d
        domains[j.domain_names[d]] = {
            "pair_accuracy": float(right[rows].sum() / weight[rows].sum()),
            "pair_accuracy_se": bootstrap_se(right[rows], weight[rows], pairs.a[rows],
                                             pairs.b[rows], seed=0),
            "human_ceiling": _known(pairs.human[rows].sum() / weight[rows].sum()),
            "pearson_r": float(np.corrcoef(score[mine], j.mean()[mine])[0, 1]),
            "human_r": _known(np.corrcoef(one[mine], others[mine])[0, 1]),
            "n_pairs": int(rows.sum()), "n_snippets": int(mine.sum()),
        }
    bins = calibration(margin, right, weight)
    miss = sum(b["share"] * abs(b["predicted"] - b["observed"]) for b in bins)
    se = sum(d["pair_accuracy_se"] ** 2 for d in domains.values()) ** 0.5 / len(domains)
    nats = pairs.wins @ np.logaddexp(0, -margin) + pairs.loses @ np.logaddexp(0, margin)
    return {
        "pair_accuracy": float(right.sum()), "pair_accuracy_se": se,
        "human_ceiling": _known(pairs.human.sum()), "nats_per_pair": float(nats),
        "pearson_r": {name: d["pearson_r"] for name, d in domains.items()},
        "human_r": {name: d["human_r"] for name, d in domains.items()},
        "domains": domains, "calibration": bins, "calibration_error": float(miss),
    }
