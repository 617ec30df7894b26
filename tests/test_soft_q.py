"""soft_q.py against recursions over prefixes in plain floats, and its own fixed points."""

import itertools

import pytest
import torch
from test_exact import STOP, make, near, rng, table

from nanokl import exact, soft_q

WORLDS = [(3, 3, 0.5, None, None, 1), (3, 3, 0.3, STOP, 3, 2), (2, 4, 0.2, None, None, 7)]
each_world = pytest.mark.parametrize("world", WORLDS, ids=lambda w: "V{}-T{}-beta{}".format(*w))


def gap(policy, ref, r, beta):
    return exact.kl(exact.joint(policy), exact.posterior(exact.joint(ref), r, beta)[0]).item()


def mean_below(ref, r):
    """E_ref[r | s a] of each prefix s and token a, in plain floats: {(prefix, token): mean}."""
    V, T, p = ref[0].shape[1], len(ref), table(ref)
    value = dict(zip(itertools.product(range(V), repeat=T), r.tolist(), strict=True))
    for t in reversed(range(T)):
        for s in itertools.product(range(V), repeat=t):
            value[s] = sum(p[s][a] * value[(*s, a)] for a in range(V))
    return {(s[:-1], s[-1]): x for s, x in value.items() if s}


@each_world
@pytest.mark.parametrize("own", [True, False], ids=["own texts", "the reference's"])
def test_soft_q_reaches_the_posterior(world, own):
    """From its own texts sooner: it tries what looks good, as what has not been tried does.

    What is rare under the reference stays untried for long in the reference's texts.
    """
    ref, _, r, beta = make(world)
    start, some, later = (soft_q.soft_q(ref, r, beta, episodes=n, rng=rng(0), own=own)
                          for n in (0, 15, 3000))
    near(exact.joint(start).exp(), exact.joint(ref).exp())
    gaps = [gap(x, ref, r, beta) for x in (start, some, later)]
    assert gaps[0] > 0.3 and gaps[1] > 1e-3 and gaps[2] < gaps[0] / 20, gaps
    assert not own or gaps[2] < gaps[0] / 500, gaps


def test_exact_once_every_text_was_seen():
    """16 texts, the reference uniform: 400 draws miss one with odds of 16 (15/16)^400 = 1e-10."""
    r = torch.randn(16, generator=rng(3), dtype=torch.float64)
    ref = [torch.zeros(2**t, 2, dtype=torch.float64).log_softmax(1) for t in range(4)]
    found = soft_q.soft_q(ref, r, 0.5, episodes=400, rng=rng(1), own=False)
    near(exact.joint(found), r / 0.5 - (r / 0.5).logsumexp(0))  # softmax(r / beta), by hand
    assert gap(soft_q.soft_q(ref, r, 0.5, episodes=8, rng=rng(1), own=False), ref, r, 0.5) > 0.01


def test_each_text_once_is_enough(monkeypatch):
    """In any order, the last token of each text first; a text left out keeps its high hopes."""
    r = torch.randn(16, generator=rng(3), dtype=torch.float64)
    ref = [torch.zeros(2**t, 2, dtype=torch.float64).log_softmax(1) for t in range(4)]
    order = iter(2 * torch.randperm(16, generator=rng(4)).tolist())

    def replay(logits, V, T, rng):
        y = next(order)
        return [(y >> (T - t), y >> (T - t - 1) & 1) for t in range(T)]

    monkeypatch.setattr(soft_q, "draw", replay)
    wanted = (r / 0.5).softmax(0)  # r / beta
    near(exact.joint(soft_q.soft_q(ref, r, 0.5, episodes=16, rng=rng(0))).exp(), wanted)
    found = exact.joint(soft_q.soft_q(ref, r, 0.5, episodes=15, rng=rng(0)))
    left_out = next(order)
    assert left_out != r.argmax() and found[left_out].exp() > 1.05 * wanted[left_out]


@each_world
def test_a_slow_rate_gets_there_too(world):
    ref, _, r, beta = make(world)
    later = soft_q.soft_q(ref, r, beta, episodes=2000, rate=0.5, rng=rng(0))
    assert gap(later, ref, r, beta) < gap(ref, ref, r, beta) / 50


@each_world
def test_sarsas_target_under_its_own_policy_is_v(world):
    """Q(s, a) - beta log pi(a | s) / ref(a | s) = V(s) for all a, if pi is what Q stands for."""
    ref, _, _, beta = make(world)
    Q = [torch.randn(x.shape, generator=rng(t), dtype=torch.float64) for t, x in enumerate(ref)]
    for p, q, level in zip(soft_q.policy_of(ref, Q, beta), ref, Q, strict=True):
        target = level - beta * (p - q)
        V = beta * (q + level / beta).logsumexp(1, keepdim=True)
        possible = q > -torch.inf
        near(target[possible], V.expand_as(q)[possible])


@each_world
def test_exact_policy_iteration_takes_t_rounds(world):
    """With Q from exact.policy_values in SARSA's place: better each time, the posterior after T."""
    ref, _, r, beta = make(world)
    T, policy, gaps = len(ref), ref, []
    for _ in range(T):
        gaps.append(gap(policy, ref, r, beta))
        values = exact.policy_values(policy, ref, r, beta)
        policy = soft_q.policy_of(
            ref, [v.view_as(x) for v, x in zip(values[1:], ref, strict=True)], beta)
    gaps.append(gap(policy, ref, r, beta))
    assert all(b < a + 1e-14 for a, b in itertools.pairwise(gaps)), gaps
    assert gaps[0] / 10 > gaps[1] / 2 > 1e-4 and abs(gaps[-1]) < 1e-12, gaps


def test_one_round_of_sarsa_is_the_mean_reward_under_the_reference():
    """1,000 texts of a uniform reference, about 500 on each side of the difference (450 counted):

    off by 5 standard errors with odds of 6e-7. Of the last token nothing is left to chance.
    """
    r = torch.randn(16, generator=rng(3), dtype=torch.float64)
    ref = [torch.zeros(2**t, 2, dtype=torch.float64).log_softmax(1) for t in range(4)]
    for expected in (False, True):
        found = soft_q.sarsa(ref, r, 1.0, rounds=1, episodes=1000, rng=rng(0), expected=expected)
        mean = mean_below(ref, r)
        first = found[0][0, 1] - found[0][0, 0]
        se = (r[:8].var() / 450 + r[8:].var() / 450).sqrt()
        assert abs(first - (mean[(), 1] - mean[(), 0])) < 5 * se
        near(found[3][:, 1] - found[3][:, 0], r[1::2] - r[::2])


@pytest.mark.parametrize("world", WORLDS[:2], ids=["plain", "stops"])
@pytest.mark.parametrize("expected", [False, True], ids=["sampled", "expected"])
def test_sarsa_comes_near_the_posterior_round_by_round(world, expected):
    ref, _, r, beta = make(world)
    one, many = (soft_q.sarsa(ref, r, beta, rounds=n, episodes=800, rng=rng(0), expected=expected)
                 for n in (1, len(ref) + 1))
    gaps = [gap(x, ref, r, beta) for x in (ref, one, many)]
    assert gaps[2] < gaps[1] < gaps[0] and gaps[2] < gaps[0] / 20, gaps


def test_nothing_impossible_is_said():
    ref, _, r, beta = make(WORLDS[1])
    for policy in (soft_q.soft_q(ref, r, beta, episodes=100, rng=rng(0)),
                   soft_q.sarsa(ref, r, beta, rounds=2, episodes=100, rng=rng(0))):
        for p, q in zip(policy, ref, strict=True):
            near(p.logsumexp(1).exp(), torch.ones(len(q)))
            assert torch.equal(p == -torch.inf, q == -torch.inf)
