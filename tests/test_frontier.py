"""The frontier and the samplers' laws against the exact world, chains by matrix, and draws."""

import math
from decimal import Decimal, localcontext

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
    ess = [sum(x) ** 2 / sum(y * y for y in x) for x in (r / beta).exp().tolist()]
    assert row["ess_median"] == pytest.approx(min(ess))  # torch's median of two is the lower
    assert row["trusted"] == (min(ess) >= 50)


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
    for kl, reward, *_ in points:
        assert reward.item() < frontier.most_reward(r, zero, kl.item(), betas)[0]
    star, _ = exact.posterior(uniform, r[0], 0.5)
    most, _ = frontier.most_reward(r, zero, exact.kl(star, uniform).item(), betas)
    assert most == pytest.approx(exact.expectation(star, r[0]).item(), abs=1e-3)


def test_frontier_from_a_proposal_is_that_of_the_reference():
    """Texts of another law, weighted, say the same: 200,000 of them, relative noise near .005."""
    g = torch.Generator().manual_seed(2)
    r = torch.randn(200_000, generator=g, dtype=torch.float64)
    far = r + 1.5  # q = N(1.5, 1) for ref = N(0, 1): log ref / q = 1.5^2 / 2 - 1.5 y
    ((kl, reward, _)) = frontier.tilted(far[None], (1.125 - 1.5 * far)[None], 0.5)
    assert reward.item() == pytest.approx(2.0, abs=0.03)  # N(0, 1): E*[r] = 1 / beta
    assert kl.item() == pytest.approx(2.0, abs=0.06)  # and KL = 1 / (2 beta^2)


def naive_best_of_n(p: list[float], r: list[float], n: int) -> list[float]:
    """The law of the best of n, a sum over levels with plain powers of plain sums."""
    F = lambda x, strict: sum(q for q, y in zip(p, r, strict=True) if y < x or (  # noqa: E731
        y == x and not strict))
    level = {x: sum(q for q, y in zip(p, r, strict=True) if y == x) for x in r}
    return [q / level[x] * (F(x, False) ** n - F(x, True) ** n) for q, x in
            zip(p, r, strict=True)]


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_that_of_its_powers(n, ties):
    """With weights, in an order that is not sorted, prompt by prompt; ties share their level."""
    r, log_q = rewards(), rewards(seed=7)
    r = r.round() if ties else r
    kl, reward, ess = frontier.best_of_n(r, n, log_q)
    for i in range(2):
        q = log_q[i].softmax(0).tolist()
        p = naive_best_of_n(q, r[i].tolist(), n)
        assert sum(p) == pytest.approx(1)
        nats = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert kl[i].item() == pytest.approx(nats, abs=1e-10)
        mean = sum(a * b for a, b in zip(p, r[i].tolist(), strict=True))
        assert reward[i].item() == pytest.approx(mean, abs=1e-10)
        assert ess[i].item() == pytest.approx(1 / sum(a * a for a in p))


def test_best_of_16_coins():
    """Half of the texts are good: no KL above log 2, whatever n; 1.835 is that without ties."""
    r = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(1, 500)
    kl, reward, ess = frontier.best_of_n(r, 16)
    p = 1 - 0.5**16
    assert reward.item() == pytest.approx(p) and ess.item() == pytest.approx(500, rel=1e-3)
    nats = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert kl.item() == pytest.approx(nats, abs=1e-12) and nats < 0.6931


@pytest.mark.parametrize("log_n", [0.5, 20.0, 60.0])
def test_best_of_huge_n_keeps_its_digits(log_n):
    """Weights from 1 to e^-30, the best the rarest, tied in pairs: beside 100 decimal digits."""
    r = torch.arange(40).double().repeat_interleave(2)
    log_q = -30 * r / 39 + torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(40)
    with localcontext() as context:
        context.prec = 100
        n, kl, reward, below = Decimal(math.exp(log_n)), Decimal(0), Decimal(0), Decimal(0)
        w = [Decimal(x).exp() for x in log_q.tolist()]
        mass = [(a + b) / sum(w) for a, b in zip(w[::2], w[1::2], strict=True)]
        for k, m in enumerate(mass):
            x = n * sum(mass[: k + 1]).ln() if k < 39 else Decimal(0)
            above = x.exp() if x > -10_000 else Decimal(0)  # F^n
            if p := above - below:
                kl, reward, below = kl + p * (p / m).ln(), reward + p * k, above
    now = frontier.best_of_n(r[None], math.exp(log_n), log_q[None])
    assert now[0].item() == pytest.approx(float(kl), rel=1e-9)
    assert now[1].item() == pytest.approx(float(reward), rel=1e-9)


def test_best_of_many_from_weighted_texts():
    """r ~ N(0, 1), half of the texts from N(4, 1): the mean of F^n by numbers, the KL's formula."""
    g, n = torch.Generator().manual_seed(5), 20_000
    r = 4 + torch.randn(1, 400_000, generator=g, dtype=torch.float64)
    own = torch.randn(1, 400_000, generator=g, dtype=torch.float64)
    score = torch.cat([r, own], 1)
    log_q = -torch.logaddexp(torch.zeros_like(score), 4 * score - 8) + math.log(2)
    kl, reward, _ = frontier.best_of_n(score, n, log_q)
    x = torch.linspace(-8, 12, 200_001, dtype=torch.float64)
    cdf = torch.special.log_ndtr(x).mul(n).exp()
    mean = 12 - torch.trapezoid(cdf, x).item()  # E[x] = b - integral of F up to b
    assert reward.item() == pytest.approx(mean, abs=0.02)
    assert kl.item() == pytest.approx(math.log(n) - 1 + 1 / n, abs=0.05)
    found = frontier.best_of_n_at(score, log_q, kl.item())
    assert found["n"] == pytest.approx(n, rel=1e-6) and found["trusted"]
    assert found["reward_mean"] == pytest.approx(reward.item(), abs=1e-9)


def test_what_too_few_texts_say_of_a_kl_is_not_trusted():
    """r ~ N(0, 1): R*(k) = sqrt(2 k), of 4,096 texts right at 1 nat and too low at 12."""
    g = torch.Generator().manual_seed(8)
    r = torch.randn(3, 4096, generator=g, dtype=torch.float64)
    zero, betas = torch.zeros_like(r), frontier.prices()
    most, trusted = frontier.most_reward(r, zero, 1.0, betas)
    assert trusted and most == pytest.approx(math.sqrt(2), abs=0.05)
    most, trusted = frontier.most_reward(r, zero, 12.0, betas)
    assert not trusted and most < math.sqrt(24) - 0.5
    assert frontier.best_of_n_at(r, zero, 1.0)["trusted"]
    assert not frontier.best_of_n_at(r, zero, 7.0)["trusted"]
    ess = frontier.tilted(r, zero, 0.7)[2]
    (row,) = frontier.frontier(r, zero, [0.7])
    assert row["trusted"] and ess.min() > 50
    r[0] *= 10  # one prompt of three, which the median does not see
    (row,) = frontier.frontier(r, zero, [0.7])
    assert not row["trusted"] and row["ess_median"] > 50


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


def limit(r: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and E[r] where the price is 0: the best of m."""
    return frontier.best_of_n(r, m)[:2]


def check_chain(r: torch.Tensor, beta: float) -> None:
    """Five steps of metropolis against powers of the chain's matrix, weights as differences."""
    kl, reward = frontier.metropolis(r, beta, 5)
    for i in range(2):
        move = ((r[i][None] - r[i][:, None]) / beta).clamp(max=0).exp() / 60
        move += torch.diag(1 - move.sum(1))
        p = torch.full((60,), 1 / 60, dtype=torch.float64) @ torch.linalg.matrix_power(move, 5)
        assert kl[i].item() == pytest.approx((p * (60 * p).log()).sum().item(), abs=1e-9)
        assert reward[i].item() == pytest.approx((p @ r[i]).item(), abs=1e-9)


@pytest.mark.parametrize("beta", [5e-3, 1e-4])
def test_laws_at_small_prices_are_not_lost(beta):
    """exp(r / beta) has no float below beta .005: SIR and a chain are then the best of m.

    A chain of m - 1 steps keeps the best that it has met. SIR: the noise of 20,000 sets.
    """
    r = rewards()
    for kl, reward in (limit(r, 6), frontier.metropolis(r, 1e-9, 5)):
        assert kl.tolist() == pytest.approx(limit(r, 6)[0].tolist(), abs=1e-9)
        assert reward.tolist() == pytest.approx(limit(r, 6)[1].tolist(), abs=1e-9)
    g = torch.Generator().manual_seed(6)
    kl, reward = frontier.sir(r, beta, 6, rng=g, n_sets=20_000)
    assert kl.tolist() == pytest.approx(limit(r, 6)[0].tolist(), abs=0.03)
    assert reward.tolist() == pytest.approx(limit(r, 6)[1].tolist(), abs=0.03)
    check_chain(r, beta)


def test_ties_do_not_disturb_chains_and_resampling():
    """Five levels of reward: the matrix of a chain, and the limit of a small price."""
    r, beta = rewards().round(), 0.4
    check_chain(r, beta)
    g = torch.Generator().manual_seed(9)
    kl, reward = frontier.sir(r, 1e-3, 6, rng=g, n_sets=20_000)
    assert reward.tolist() == pytest.approx(limit(r, 6)[1].tolist(), abs=0.03)
    assert kl.tolist() == pytest.approx(limit(r, 6)[0].tolist(), abs=0.03)
