"""Comparisons and the human ceiling against enumeration of all pairs of raters."""

import itertools
import json

import numpy as np
import pytest

from nanokl import UserError
from nanokl.judgements import Judgements, comparison_groups, human_pairs

RATINGS = {  # of different lengths, with many ties
    "film": [[3, 2, -1], [0, 1, 0, 2, -4], [-2, -2, 4], [1, 1, 1, 2]],
    "news": [[0, 0, 1], [0, -1], [0, 0, -3, 2, 0, 1]],
}


def judgements(folder, by_domain, split="train"):
    rows = [
        {"id": str(i), "domain": domain, "split": split, "text": f"text {i}", "ratings": ratings}
        for domain, lists in by_domain.items()
        for i, ratings in enumerate(lists)
    ]
    rows.append({"id": "0", "domain": "words", "split": "other", "text": "w", "ratings": [1, 2]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "judgements.jsonl").write_text(lines, encoding="utf-8")
    return Judgements.load(folder, split)


def test_ratings_of_conversations(tmp_path):
    """Each thing that was rated is a domain; talks without ratings, and other splits, are none."""
    say = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rated = (("train", {"witty": [7], "mood": [2]}), ("train", {}), ("train", {"mood": [5]}),
             ("test", {"interest": [1]}))
    rows = [{"id": str(i), "split": split, "messages": say, "ratings": ratings}
            for i, (split, ratings) in enumerate(rated)]
    (tmp_path / "conversations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    j = Judgements.load(tmp_path, "train")
    assert j.domain_names == ["interest", "mood", "witty"] and j.domains.tolist() == [1, 2, 1]
    assert j.ratings.tolist() == [[2], [7], [5]] and j.n_ratings.tolist() == [1, 1, 1]
    assert j.texts == 3 * ["<|user|> hi<|assistant|> hello"]
    assert j.ids == ["0 mood", "0 witty", "2 mood"]
    assert Judgements.load(tmp_path, "test").ids == ["3 interest"]
    with pytest.raises(UserError, match="raters is 'first', but .* one rating each: give all"):
        Judgements.load(tmp_path, "train", "first")
    with pytest.raises(UserError, match="no conversation of the split val .* has ratings"):
        Judgements.load(tmp_path, "val")


def test_load(tmp_path):
    j = judgements(tmp_path, RATINGS)
    flat = [ratings for lists in RATINGS.values() for ratings in lists]
    assert j.domain_names == ["film", "news", "words"] and j.domains.tolist() == [0] * 4 + [1] * 3
    assert j.ids == ["0", "1", "2", "3", "0", "1", "2"] and j.texts[4] == "text 0"
    for ratings, row, n in zip(flat, j.ratings, j.n_ratings, strict=True):
        assert row[:n].tolist() == ratings and n == len(ratings) and not row[n:].any()
    np.testing.assert_allclose(j.mean(), [np.mean(ratings) for ratings in flat], rtol=1e-6)


def test_halves_of_the_raters_are_disjoint_and_all(tmp_path):
    j = judgements(tmp_path, RATINGS)
    halves = [Judgements.load(tmp_path, "train", raters) for raters in ("first", "second")]
    for i, n in enumerate(j.n_ratings):
        a, b = (half.ratings[i, : half.n_ratings[i]].tolist() for half in halves)
        assert sorted(a + b) == sorted(j.ratings[i, :n]) and 0 <= len(a) - len(b) <= 1
    assert all(half.texts == j.texts for half in halves)


def test_load_complains(tmp_path):
    with pytest.raises(UserError, match="no human ratings"):
        Judgements.load(tmp_path, "train")
    judgements(tmp_path, RATINGS)
    with pytest.raises(UserError, match="split dev"):
        Judgements.load(tmp_path, "dev")
    content = (tmp_path / "judgements.jsonl").read_bytes()
    (tmp_path / "judgements.jsonl").write_bytes(content[:-20])
    with pytest.raises(UserError, match="broken in line 8"):
        Judgements.load(tmp_path, "train")


def test_groups_are_of_one_domain_and_of_different_snippets(tmp_path):
    """Domains of 12 and 3 snippets take turns 2 to 1, the square root of 4 to 1."""
    rng = np.random.default_rng(0)
    by_domain = {d: rng.integers(-4, 5, (n, 3)).tolist() for d, n in [("a", 12), ("b", 3)]}
    j = judgements(tmp_path, by_domain)
    rows = comparison_groups(j, 0, n_groups=6000, group_size=3, seed=7)[0].numpy()
    assert (j.domains[rows] == j.domains[rows[:, :1]]).all()
    assert all(len(set(row)) == 3 for row in rows.tolist())
    share = (j.domains[rows[:, 0]] == 0).cumsum() - 2 / 3 * np.arange(1, 6001)
    assert np.abs(share).max() < 3  # at any time


def test_no_snippet_comes_again_before_the_others_have_come(tmp_path):
    """Of 7 snippets three groups of 2 leave one out, each in turn: 1/7 of 2,000 epochs, +- 15.6.

    One of seven is 5.5 sd off once in 4 million runs.
    """
    j = judgements(tmp_path, {"film": [[i, i + 1] for i in range(7)]})
    rows = comparison_groups(j, 0, n_groups=6000, group_size=2, seed=7)[0].numpy()
    epochs = rows.reshape(2000, 6)
    assert all(len(set(epoch)) == 6 for epoch in epochs.tolist())
    left_out = 2000 - np.bincount(epochs.ravel())
    assert np.abs(left_out - 2000 / 7).max() < 5.5 * 15.6
    # one stream, however many groups a step takes of it; another one for each member
    later = comparison_groups(j, 3, n_groups=50, group_size=2, seed=7)[0].numpy()
    np.testing.assert_array_equal(later, rows[150:200])
    other = comparison_groups(j, 3, n_groups=50, group_size=2, seed=7, member=1)[0].numpy()
    assert (other != later).mean() > 0.5


def test_groups_are_functions_of_seed_and_step(tmp_path):
    j = judgements(tmp_path, RATINGS)

    def draw(step, seed=0):
        drawn = comparison_groups(j, step, n_groups=6, group_size=2, seed=seed)
        return [tensor.tolist() for tensor in drawn]

    first = [draw(step) for step in range(5)]
    assert [draw(step) for step in reversed(range(5))] == first[::-1]
    assert first[0] != first[1] and first[0] != draw(0, seed=1)


def test_comparisons_have_the_frequencies_of_rater_pairs(tmp_path):
    """6,000 judgements of one pair; each of 2 checks is off by 4.5 sd with odds of 7e-6."""
    one, two = [3, 0, 0, -1, 2], [0, 1, -1]
    j = judgements(tmp_path, {"film": [one, two]})
    rows, wins, valid = comparison_groups(j, 0, n_groups=6000, group_size=2, seed=0)
    swapped = rows[:, 0].numpy() == 1
    assert 0 < swapped.sum() < 6000
    valid, wins = valid[:, 0, 1].numpy(), wins[:, 0, 1].numpy()
    won = (np.where(swapped, 1 - wins, wins) * valid).sum()
    pairs = list(itertools.product(one, two))
    for count, p in [
        (valid.sum(), np.mean([x != y for x, y in pairs])),
        (won, np.mean([x > y for x, y in pairs])),
    ]:
        assert abs(count - 6000 * p) < 4.5 * (6000 * p * (1 - p)) ** 0.5


def test_each_pair_has_fresh_ratings(tmp_path):
    """The fickle snippet's two answers in a group agree half the time; 4.5 sd: odds of 7e-6."""
    j = judgements(tmp_path, {"film": [[4, -4], [0, 0], [0, 0]]})
    rows, wins, _ = comparison_groups(j, 0, n_groups=3000, group_size=3, seed=0)
    for place, one, other in [(0, (0, 1), (0, 2)), (2, (0, 2), (1, 2))]:
        drawn = wins[rows[:, place] == 0]
        same = (drawn[:, one[0], one[1]] == drawn[:, other[0], other[1]]).numpy()
        assert len(same) > 900 and abs(same.sum() - len(same) / 2) < 4.5 * len(same) ** 0.5 / 2


def test_ties_and_lower_triangle_are_dropped(tmp_path):
    j = judgements(tmp_path, {"film": [[1, 1]] * 4 + [[2, 2]] * 4})
    rows, wins, valid = comparison_groups(j, 0, n_groups=3, group_size=8, seed=0)
    ratings = j.ratings[rows.numpy(), 0]
    for g, a, b in itertools.product(range(3), range(8), range(8)):
        compared = a < b and ratings[g, a] != ratings[g, b]
        assert valid[g, a, b].item() == compared
        assert wins[g, a, b].item() == (compared and ratings[g, a] > ratings[g, b])


@pytest.mark.parametrize(("n_groups", "group_size"), [(0, 2), (1, 1), (1, 4)])
def test_groups_complain(tmp_path, n_groups, group_size):
    with pytest.raises(UserError, match="2 to 3"):
        comparison_groups(
            judgements(tmp_path, RATINGS), 0, n_groups=n_groups, group_size=group_size, seed=0
        )


def enumerated(lists):
    """Of all untied pairs of single ratings: (snippets, answer, the others' agreement, weight)."""
    for a, b in itertools.combinations(range(len(lists)), 2):
        A, B = lists[a], lists[b]
        for x, y in itertools.product(range(len(A)), range(len(B))):
            if A[x] != B[y]:
                others = np.mean(A[:x] + A[x + 1 :]) - np.mean(B[:y] + B[y + 1 :])
                sign = 0 if abs(others) < 1e-9 else np.sign(others)
                agree = 0.5 + 0.5 * sign * np.sign(A[x] - B[y])
                yield (a, b), A[x] > B[y], agree, 1 / len(A) / len(B)


def test_human_pairs_equal_enumeration(tmp_path):
    j = judgements(tmp_path, RATINGS)
    pairs = human_pairs(j)
    first = 0
    for domain, lists in enumerate(RATINGS.values()):
        answers = list(enumerated(lists))
        scale = sum(weight for *_, weight in answers) * len(RATINGS)
        mine = pairs.domain == domain
        assert mine.sum() == len(lists) * (len(lists) - 1) // 2
        for a, b, wins, loses, human in zip(*(x[mine] for x in (
                pairs.a, pairs.b, pairs.wins, pairs.loses, pairs.human)), strict=True):
            here = [row[1:] for row in answers if row[0] == (a - first, b - first)]
            expected = [sum(w for won, _, w in here if won == side) for side in (True, False)]
            expected.append(sum(agree * w for _, agree, w in here))
            np.testing.assert_allclose([wins, loses, human], np.array(expected) / scale, atol=1e-15)
        first += len(lists)
    assert (pairs.wins + pairs.loses).sum() == pytest.approx(1, abs=1e-12)


def test_human_pairs_in_clear_cases(tmp_path):
    j = judgements(tmp_path, {"film": [[4, 4], [-4, -4]], "news": [[3, -3], [0, 0], [1]]})
    pairs = human_pairs(j)
    assert (pairs.a.tolist(), pairs.b.tolist(), pairs.domain.tolist()) == ([0, 2], [1, 3], [0, 1])
    assert pairs.wins.tolist() == [0.5, 0.25] and pairs.loses.tolist() == [0, 0.25]
    assert pairs.human.tolist() == [0.5, 0]  # the other rater always says the contrary


def test_human_pairs_of_single_ratings_have_no_others(tmp_path):
    pairs = human_pairs(judgements(tmp_path, {"film": [[1], [2], [2]]}))
    assert pairs.loses.tolist() == [0.5, 0.5, 0] and not pairs.wins.any()
    assert np.isnan(pairs.human).all()
    many = {"film": [[i + 0.5] for i in range(2500)]}  # all different: not a loop over values
    pairs = human_pairs(judgements(tmp_path, many))
    assert len(pairs.a) == 2000 * 1999 // 2 and pairs.wins.sum() + pairs.loses.sum() == (
        pytest.approx(1))


@pytest.mark.parametrize("lists", [[[1, 2, 3]], [[1, 1], [1, 1]], [[1], [1]]])
def test_human_pairs_complain_when_nothing_compares(tmp_path, lists):
    with pytest.raises(UserError, match="too few different judgements"):
        human_pairs(judgements(tmp_path, {"film": lists}))
