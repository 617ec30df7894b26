"""Human ratings of texts, and the comparisons that they imply.

Each snippet was rated by many people. One rating of one snippet against one rating of another is a
real judgement with its real noise: it trains the reward model. What the mean of all the other
raters would have answered is the human ceiling, the most that a model can hope to agree.

Left out: who rated what (the raters are anonymous) and comparisons across domains.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanokl import UserError, chat
from nanokl.labelled import as_number, read_labelled
from nanokl.runtime import generator

MOST = 2000  # snippets with one rating each, of a domain, that are compared: 2 million pairs


@dataclass(frozen=True)
class Judgements:
    """Texts with the individual ratings that people gave them."""

    ids: list[str]
    domains: np.ndarray  # (n,) int64, indices into domain_names
    domain_names: list[str]  # of the whole file: the same numbers in every split
    texts: list[str]
    ratings: np.ndarray  # (n, R) float32, padded with zeros at the right
    n_ratings: np.ndarray  # (n,) int64

    def mean(self) -> np.ndarray:
        """(n,) mean rating of each text."""
        return self.ratings.sum(1) / self.n_ratings

    @cached_property
    def standard(self) -> np.ndarray:
        """(n,) float32: the mean ratings in their domain's standard deviations from its mean."""
        y = self.mean()
        for d in np.unique(self.domains):
            mine = self.domains == d
            y[mine] = (y[mine] - y[mine].mean()) / max(y[mine].std(), 1e-6)
        return y.astype(np.float32)

    @cached_property
    def pairs(self) -> "HumanPairs":
        """All judgements to test a model on."""
        return human_pairs(self)

    @classmethod
    def load(cls, folder, split: str, raters: str = "all") -> "Judgements":
        """Read one split of folder/judgements.jsonl; UserError when it is missing or broken.

        A file of labelled texts in the place of a folder has one rating, a number, for each.
        `raters`: all, or first or second, disjoint halves of each text's ratings (every second).
        Raters are anonymous, so that one person may have given some of either half.
        """
        path = Path(folder)
        talks = (path / chat.FILE).is_file()
        if raters != "all" and (talks or path.is_file()):
            raise UserError(f"raters is {raters!r}, but what is rated in {path} has one rating "
                            "each: give all")
        if path.is_file():
            rows = [row for row in read_labelled(path) if row.split == split]
            values = np.array([[as_number(row, path)] for row in rows], np.float32)
            ids = [str(row.line) for row in rows]
            return cls(ids, np.zeros(len(rows), np.int64), ["text"], [row.text for row in rows],
                       values, np.ones(len(rows), np.int64))
        if talks:
            return cls.of_conversations(path, split)
        path = path / "judgements.jsonl"
        if not path.is_file():
            raise UserError(f"no human ratings at {path}: make them with data/hutto/prepare.py")
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append([row[key] for key in ("id", "domain", "split", "text", "ratings")])
            except (ValueError, KeyError, TypeError):
                problem = f"{path} is broken in line {number}: prepare it again with --force"
                raise UserError(problem) from None
        names = list(dict.fromkeys(row[1] for row in rows))
        rows = [row for row in rows if row[2] == split]
        if not rows:
            raise UserError(f"{path} has no ratings in the split {split}: prepare it again")
        ids, domains, _, texts, ratings = zip(*rows, strict=True)
        if raters != "all":
            ratings = [r[("first", "second").index(raters) :: 2] for r in ratings]
        n_ratings = np.array([len(r) for r in ratings])
        padded = np.zeros((len(rows), n_ratings.max()), np.float32)
        padded[np.arange(padded.shape[1]) < n_ratings[:, None]] = np.concatenate(ratings)
        numbers = np.array([names.index(domain) for domain in domains])
        return cls(list(ids), numbers, names, list(texts), padded, n_ratings)

    @classmethod
    def of_conversations(cls, folder: Path, split: str) -> "Judgements":
        """What people thought of whole conversations: a domain for each thing that they rated.

        A text is what `chat.spell` writes. One rating each, so that there is no ceiling.
        """
        talks = chat.load_conversations(folder, None)
        names = sorted({name for talk in talks for name in talk.ratings})
        rows = [(talk, name, x) for talk in talks if talk.split == split
                for name, values in sorted(talk.ratings.items()) for x in values]
        if not rows:
            raise UserError(f"no conversation of the split {split} in {folder} has ratings: give "
                            "data/chat, or another folder with ratings")
        texts = [chat.spell(talk.messages) for talk, *_ in rows]
        return cls([f"{talk.id} {name}" for talk, name, _ in rows],
                   np.array([names.index(name) for _, name, _ in rows]), names, texts,
                   np.array([[x] for *_, x in rows], np.float32), np.ones(len(rows), np.int64))


def _one_rating(j: Judgements, rows: np.ndarray, rng: torch.Generator):
    """The rating that one rater, drawn uniformly and afresh, gave to each of `rows`."""
    u = torch.rand(rows.shape, generator=rng, dtype=torch.float64).numpy()
    return j.ratings[rows, (u * j.n_ratings[rows]).astype(np.int64)]


def _which_groups(sizes: Tensor, first: int, n: int, u: float) -> tuple[Tensor, Tensor]:
    """Of the groups first, ..., first + n - 1: domain, and how many came before it there, (n,).

    Domains of `sizes` snippets take turns, by steps of the golden ratio from u on: at any time each
    has had its share, that of its size's square root, to a few groups.
    """
    turn = (u + torch.arange(first + n, dtype=torch.float64) * (5**0.5 - 1) / 2) % 1
    ends = sizes.double().sqrt().cumsum(0)
    domain = torch.searchsorted(ends[:-1] / ends[-1], turn, right=True)  # (first + n,)
    before = torch.nn.functional.one_hot(domain, len(sizes)).cumsum(0).gather(1, domain[:, None])
    return domain[first:], before[first:, 0] - 1


def comparison_groups(j: Judgements, step: int, *, n_groups: int, group_size: int, seed: int,
                      member: int = 0):
    """Training comparisons: rows (G, K) int64, wins (G, K, K) float32, valid (G, K, K) bool.

    A group is K different snippets of one domain, each of which comes once before any comes again,
    but for the rest that makes no group. A domain's share is between equal snippets and equal
    domains. Each pair a < b compares one fresh rating of a with one of b: wins[a, b] is 1 where a
    is higher, valid is False for ties and elsewhere. Each member has an order of its own.
    """
    counts = torch.from_numpy(np.bincount(j.domains))
    smallest = int(counts[counts > 0].min())
    if n_groups < 1 or not 2 <= group_size <= smallest:
        raise UserError(f"n_groups is {n_groups} and group_size {group_size}: give at least 1, and "
                        f"2 to {smallest} (the snippets of the smallest domain)")
    u = torch.rand((), generator=generator(seed, "domains", member)).item()
    rows = []
    for d, before in zip(*_which_groups(counts, step * n_groups, n_groups, u), strict=True):
        of_domain = np.flatnonzero(j.domains == int(d))
        epoch, place = divmod(int(before), len(of_domain) // group_size)
        order = torch.randperm(len(of_domain),
                               generator=generator(seed, "order", member, int(d), epoch))
        rows.append(of_domain[order[place * group_size :][:group_size].numpy()])
    rows, rng = np.stack(rows), generator(seed, "groups", step, member)
    square = (n_groups, group_size, group_size)
    rating_a = _one_rating(j, np.broadcast_to(rows[:, :, None], square), rng)
    rating_b = _one_rating(j, np.broadcast_to(rows[:, None, :], square), rng)
    upper = np.triu(np.ones((group_size, group_size), bool), 1)
    wins = upper & (rating_a > rating_b)
    valid = upper & (rating_a != rating_b)
    return torch.from_numpy(rows), torch.from_numpy(wins).float(), torch.from_numpy(valid)


@dataclass(frozen=True)
class HumanPairs:
    """Every comparison of two snippets of one domain that raters imply, (P,) arrays.

    The weights are the odds of drawing that answer: the domains have equal shares, and in each a
    pair of snippets, and one rater of either, are drawn uniformly, ties dropped. They sum to 1.
    """

    a: np.ndarray  # rows of two snippets, a < b
    b: np.ndarray
    domain: np.ndarray
    wins: np.ndarray  # weight of the answer that a is higher
    loses: np.ndarray  # and that b is
    human: np.ndarray  # of both, times the odds that the other raters' means agree; ties count 1/2


def human_pairs(j: Judgements) -> HumanPairs:
    """`HumanPairs` of judgements; UserError when no two snippets of a domain can be compared.

    Snippets with one rating are left out, for nobody else rated them; where all have one, they stay
    (at most MOST of them, drawn by a fixed seed) and `human` is NaN.
    """
    parts, present = [], np.unique(j.domains)
    for d in present:
        rows = np.flatnonzero(j.domains == d)
        single = j.n_ratings[rows].max() == 1
        if single:
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:MOST])
        else:
            rows = rows[j.n_ratings[rows] > 1]
        a, b = np.triu_indices(len(rows), 1)
        wins, loses, human = (_single_odds if single else _odds)(j, rows, a, b)
        scale = (wins + loses).sum() * len(present)
        if not scale:
            raise UserError(f"the ratings of the domain {j.domain_names[d]} hold too few different "
                            "judgements to compare: give more snippets or raters")
        parts.append((rows[a], rows[b], np.full(len(a), d), *(w / scale for w in
                                                               (wins, loses, human))))
    return HumanPairs(*map(np.concatenate, zip(*parts, strict=True)))


# With s the sum of a snippet's n ratings and x the one drawn, the others' mean is (s - x)/(n - 1).
# For two snippets the sign of the difference of their others' means is that of
#
#     (s_a - x_a)(n_b - 1) - (s_b - x_b)(n_a - 1),        exact for whole ratings
#
def _odds(j: Judgements, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple:
    """The odds that a rater has row a higher, or row b, and that the others agree, (P,) each."""
    values, n = np.unique(j.ratings), j.n_ratings[rows]
    total = j.ratings[rows].sum(1, dtype=np.float64)
    seen = np.arange(j.ratings.shape[1]) < n[:, None]
    odds = np.stack([((j.ratings[rows] == x) & seen).sum(1) for x in values], 1) / n[:, None]
    higher, agree = np.zeros((2, len(rows), len(rows)))  # x_a > x_b, and the others say so
    for u, x_a in enumerate(values):
        for v, x_b in enumerate(values[:u]):
            both = np.outer(odds[:, u], odds[:, v])
            gap = np.outer(total - x_a, n - 1) - np.outer(n - 1, total - x_b)
            higher += both
            agree += both * (1 + np.sign(gap)) / 2
    return higher[a, b], higher[b, a], agree[a, b] + agree[b, a]


def _single_odds(j: Judgements, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple:
    """The same where a text has one rating: there are no others, and values may be any."""
    x = j.ratings[rows, 0]
    return (x[a] > x[b]).astype(float), (x[a] < x[b]).astype(float), np.full(len(a), np.nan)
