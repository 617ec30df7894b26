"""The frontier and the samplers' laws against the exact world, chains by matrix, and draws."""

import math

import pytest
import torch

from nanokl import exact, frontier


def rewards(P: int = 2, K: int = 60, seed: int = 0) -> torch.Tensor:
    """Scores (P, K) float64 without ties."""
    return torch.randn(P, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.1, 0.7, 5.0])
def test_frontier_is_the_posterior_of_equally_likely_texts(beta):
    r = rewards()
    uniform = torch.full((60,), -math.log(60), dtype=torch.float64)
    (row,) = frontier.frontier(r, torch.zeros_like(r), [beta])
    kl = reward = 0.0
    for one in r:
        star, _ = exact.posterior(uniform, one, beta)
        kl += exact.kl(star, uniform).item() / 2
        reward += exact.expectation(star, one).item() / 2
    assert row["kl_nats"] == pytest.approx(kl, abs=1e-10)
    assert row["reward_mean"] == pytest.approx(reward, abs=1e-10)
    assert row["trusted"] == (row["ess_median"] >= 50)


def test_no_law_lies_above_the_frontier():
    """Random laws, best-of-n, SIR and chains, each below R*(its KL) = inf_b b k + b log Z_b."""
    r, betas = rewards(1), frontier.prices(400)
    uniform = torch.full((60,), -math.log(60), dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    points = [frontier.best_of_n(r, 8), frontier.metropolis(r, 0.5, 7),
              frontier.sir(r, 0.5, 8, rng=g)]
    for scale in (0.3, 1.0, 3.0):
        law = (scale * (torch.randn(60, generator=g, dtype=torch.float64) + r[0])).log_softmax(0)
        points.append((exact.kl(law, uniform)[None], exact.expectation(law, r[0])[None]))
    zero = torch.zeros_like(r)
    for kl, reward in points:
        assert reward.item() < frontier.most_reward(r, zero, kl.item(), betas)
    star, _ = exact.posterior(uniform, r[0], 0.5)
    most = frontier.most_reward(r, zero, exact.kl(star, uniform).item(), betas)
    assert most == pytest.approx(exact.expectation(star, r[0]).item(), abs=1e-3)


def test_frontier_from_a_proposal_is_that_of_the_reference():
    """Texts of another law, weighted, say the same: 200,000 of them, relative noise near .005."""
    g = torch.Generator().manual_seed(2)
    r = torch.randn(200_000, generator=g, dtype=torch.float64)
    far = r + 1.5  # q = N(1.5, 1) for ref = N(0, 1): log ref / q = 1.5^2 / 2 - 1.5 y
    ((kl, reward, _)) = frontier.tilted(far[None], (1.125 - 1.5 * far)[None], 0.5)
    assert reward.item() == pytest.approx(2.0, abs=0.03)  # N(0, 1): E*[r] = 1 / beta
    assert kl.item() == pytest.approx(2.0, abs=0.06)  # and KL = 1 / (2 beta^2)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_best_of_n_is_that_of_the_exact_world(n):
    r = rewards()
    uniform = torch.full((60,), -math.log(60), dtype=torch.float64)
    kl, reward = frontier.best_of_n(r, n)
    for i in range(2):
        law = exact.best_of_n(uniform, r[i], n)
        assert kl[i].item() == pytest.approx(exact.kl(law, uniform).item(), abs=1e-10)
        assert reward[i].item() == pytest.approx(exact.expectation(law, r[i]).item(), abs=1e-10)


def test_best_of_many_from_weighted_texts():
    """r ~ N(0, 1), half of the texts from N(4, 1): the mean of F^n by numbers, the KL's formula."""
    g, n = torch.Generator().manual_seed(5), 20_000
    r = 4 + torch.randn(1, 400_000, generator=g, dtype=torch.float64)
    own = torch.randn(1, 400_000, generator=g, dtype=torch.float64)
    score = torch.cat([r, own], 1)
    log_q = -torch.logaddexp(torch.zeros_like(score), 4 * score - 8) + math.log(2)
    kl, reward = frontier.best_of_n(score, n, log_q)
    x = torch.linspace(-8, 12, 200_001, dtype=torch.float64)
    cdf = torch.special.log_ndtr(x).mul(n).exp()
    mean = 12 - torch.trapezoid(cdf, x).item()  # E[x] = b - integral of F up to b
    assert reward.item() == pytest.approx(mean, abs=0.02)
    assert kl.item() == pytest.approx(math.log(n) - 1 + 1 / n, abs=0.05)
    found, same = frontier.best_of_n_at(score, log_q, kl.item())
    assert found == pytest.approx(n, rel=1e-6) and same == pytest.approx(reward.item(), abs=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 5, 40])
def test_metropolis_is_the_chain_of_its_matrix(steps):
    r, beta = rewards(), 0.4
    kl, reward = frontier.metropolis(r, beta, steps)
    for i in range(2):
        w = (r[i] / beta).exp()
        move = torch.minimum(torch.ones_like(w), w[None] / w[:, None]) / 60
        move += torch.diag(1 - move.sum(1))
        p = torch.full((60,), 1 / 60, dtype=torch.float64)
        for _ in range(steps):
            p = p @ move
        assert kl[i].item() == pytest.approx((p * (60 * p).log()).sum().item(), abs=1e-9)
        assert reward[i].item() == pytest.approx((p @ r[i]).item(), abs=1e-9)


def test_sir_is_what_drawing_gives():
    """400,000 draws: the mean reward's se is .0015, here within 6 of them (2e-9)."""
    r, beta, m = rewards(1), 0.4, 6
    kl, reward = frontier.sir(r, beta, m, rng=torch.Generator().manual_seed(3), n_sets=20_000)
    g = torch.Generator().manual_seed(4)
    sets = torch.randint(60, (400_000, m), generator=g)
    pick = torch.multinomial((r[0] / beta).exp()[sets], 1, generator=g)
    drawn = sets.gather(1, pick)[:, 0]
    p = torch.bincount(drawn, minlength=60) / len(drawn)
    assert reward.item() == pytest.approx(r[0, drawn].mean().item(), abs=0.009)
    assert kl.item() == pytest.approx(torch.special.xlogy(p, 60 * p).sum().item(), abs=0.01)
