"""Shares of a score, and each token's worth: loops, sums, exact worlds, where grad J may not move.

The world of 170 texts is that of test_ppo.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_ppo
import torch
from test_ppo import CONFIG, CPU, PROMPTS, V, everything, gradient, log_p, make_ref, nudge, scores

from nanokl import UserError, exact, ppo
from nanokl.rollout import Rollout
from nanokl.runtime import Runtime, generator
from nanokl.shaping import score_shares, token_worth
from nanokl.trainers import TrainerConfig

STOP = 0
TOKENIZER = SimpleNamespace(special=lambda name: STOP,
                            decode=lambda ids: " ".join(map(str, ids)))
RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def reward(ids, texts):
    """Of the order of the tokens, and of their number."""
    return [sum((i + 1) * float(w) for i, w in enumerate(text.split())) ** 0.5 for text in texts]


def ragged(seed: int = 0) -> Rollout:
    """Prompts of 2 or 3 tokens and responses of 1 to 6, some ended by the stop token."""
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(1, 7, (8, 9), generator=g)
    n_prompt, n = torch.randint(2, 4, (8,), generator=g), torch.randint(1, 7, (8,), generator=g)
    t = torch.arange(8)
    mask = (t >= n_prompt[:, None] - 1) & (t < (n_prompt + n)[:, None] - 1)
    stopped = torch.arange(8) % 2 == 0
    idx[stopped, (n_prompt + n)[stopped] - 1] = STOP
    return Rollout(idx, mask, torch.zeros(8, 8), n_prompt, stopped)


def score_of(rollout: Rollout) -> torch.Tensor:
    return ppo.score_rollouts(reward, rollout, TOKENIZER, RUNTIME)


def guess(ids, texts):
    """Another function than the reward."""
    return [0.3 * len(text) + 0.1 for text in texts]


@pytest.mark.parametrize("potential", [reward, guess])
def test_shares_by_hand(potential):
    """Token by token with slices; the last token brings the score itself."""
    rollout = ragged()
    score = score_of(rollout)
    shares = score_shares(potential, rollout, score, TOKENIZER, RUNTIME)
    expected = torch.zeros(8, 8)
    for i, (row, k) in enumerate(zip(rollout.rows(), rollout.n_prompt.tolist(), strict=True)):
        for end in range(k + 1, len(row) + 1):
            before, now = ppo.score_ids(potential, [row[: end - 1], row[:end]], TOKENIZER)
            now = score[i] if end == len(row) else now
            expected[i, end - 2] = now - before  # column t is token t + 1
    torch.testing.assert_close(shares, expected)
    assert not shares[~rollout.mask].any()


def test_shares_add_up_to_the_score_less_the_prompts():
    rollout = ragged(1)
    score = score_of(rollout)
    prompts = [row[:k] for row, k in zip(rollout.rows(), rollout.n_prompt.tolist(), strict=True)]
    shares = score_shares(guess, rollout, score, TOKENIZER, RUNTIME)
    torch.testing.assert_close(shares.sum(1), score - ppo.score_ids(guess, prompts, TOKENIZER))


def test_shaping_leaves_the_policy_gradient_as_it_is():
    """All 64 texts of a tree, weighed by their probability: E sum_t adv_t grad log pi is grad J.

    With value 0 and lam 1, or any lam and a critic that knows what is still to come, in float64;
    without shaping the same numbers come out.
    """
    V, T, beta, prompt = 4, 3, 0.5, [5, 6]
    g = torch.Generator().manual_seed(0)
    make = lambda: [torch.randn(V**t, V, generator=g, dtype=torch.float64)  # noqa: E731
                    .log_softmax(1) for t in range(T)]
    ref, texts = make(), exact.texts(V, T)
    logits = [x.clone().requires_grad_() for x in make()]
    idx = torch.cat([torch.tensor(prompt).expand(V**T, -1), texts + 1], dim=1)
    mask = torch.arange(4) >= 1
    rollout = Rollout(idx, mask.expand(V**T, -1), torch.zeros(V**T, 4),
                      torch.full((V**T,), 2), torch.zeros(V**T, dtype=torch.bool))
    r = score_of(rollout)

    def tokens(levels):
        """log p of each text's tokens, (V^T, T)."""
        spans = [texts[:, :t] @ (V ** torch.arange(t).flip(0)) for t in range(T)]
        return torch.stack([levels[t][s, texts[:, t]] for t, s in enumerate(spans)], dim=1)

    policy = [x.log_softmax(1) for x in logits]
    J = exact.objective(exact.joint(policy), exact.joint(ref), r.double(), beta)
    truth = torch.autograd.grad(J, logits, retain_graph=True)
    logp, logp_ref = (torch.nn.functional.pad(tokens(x), (1, 0)) for x in (policy, ref))
    p = exact.joint(policy).exp().detach()
    levels = exact.policy_values([x.detach() for x in policy], ref, r.double(), beta)[:-1]
    to_come = torch.stack([x.repeat_interleave(V**T // len(x)) for x in levels], dim=1)
    for potential in (None, reward, guess):
        paid, promised = r.double(), torch.zeros(V**T, T)
        if potential is not None:
            paid = score_shares(potential, rollout, paid, TOKENIZER, RUNTIME).double()
            promised = torch.stack([ppo.score_ids(potential, idx[:, : t + 2].tolist(), TOKENIZER)
                                    for t in range(T)], dim=1)
        true_critic = torch.nn.functional.pad(to_come - promised, (1, 0))
        rewards = ppo.kl_penalised_reward(logp.detach(), logp_ref, paid, rollout.mask, beta=beta)
        for lam, value in ((1.0, torch.zeros_like(rewards)), (0.7, true_critic), (0, true_critic)):
            adv, _ = ppo.gae(rewards, value, rollout.mask, gamma=1.0, lam=lam)
            surrogate = (p[:, None] * adv * logp).sum()
            ours = torch.autograd.grad(surrogate, logits, retain_graph=True)
            for a, b in zip(ours, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # scores are float32


def test_shaping_is_for_gamma_1():
    with pytest.raises(UserError, match="gamma is 0.9: shaping needs 1"):
        ppo.PPOConfig(shaping=True, gamma=0.9)


def test_worth_is_what_a_token_adds_on_average():
    """One prefix and one token after the other; the stop token is no part of a text."""
    prefixes = [[STOP, 3, 1], [STOP, 2], [4, 4, 4, 1]]
    worth = token_worth(reward, prefixes, 7, TOKENIZER)
    for a in range(7):
        added = [reward([], [" ".join(map(str, [i for i in [*p, a] if i != STOP]))])[0]
                 - reward([], [" ".join(map(str, [i for i in p if i != STOP]))])[0]
                 for p in prefixes]
        assert worth[a].item() == pytest.approx(sum(added) / 3, abs=1e-5)
    assert worth[STOP] == 0 < worth[6]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", [0.0, 0.3, 3.0])
def test_worth_leaves_the_policy_gradient_as_it_is_whatever_it_says(temperature, size):
    """Each response as a minibatch of its own, weighed by its probability and its tokens.

    A part that is left out shows: the sampled advantage, or the tilt of the reference.
    """
    ref, world, beta = make_ref(), everything(), 0.5
    policy, how = nudge(ppo.make_policy(ref)), replace(CONFIG, lam=1.0, value_coef=0.0,
                                                       temperature=temperature)
    worth = size * torch.randn(V, generator=generator(3))
    x = ppo.collect(policy, ref, world, scores(world), [torch.arange(170)], how, CPU, beta=beta,
                    worth=worth)
    weight = log_p(policy, world, temperature).detach().exp() * world.mask.sum(1) / len(PROMPTS)

    def miss(x):
        losses = [ppo.minibatch_loss(policy, policy, x, torch.tensor([i]), how, CPU)[0]
                  for i in range(170)]
        follows = -gradient((torch.stack(losses) * weight).sum(), policy) * x.unit
        return ((follows - expected).norm() / expected.norm()).item()

    expected = gradient(test_ppo.exact(policy, ref, beta, temperature)["objective"], policy)
    assert miss(x) < 2e-5
    assert miss(replace(x, adv=0 * x.adv)) > 0.1
    assert size == 0 or miss(replace(x, worth=0 * worth)) > 0.1


def test_worth_takes_the_noise_of_the_draw_away():
    """A score that is a sum over tokens, and their worth known: with a critic that knows the rest
    nothing is left to be learnt from which token was drawn, and only states scatter."""
    ref, how, beta = make_ref(), replace(CONFIG, lam=0.0), 0.5
    policy, each = ppo.make_policy(ref), torch.tensor([0.0, 2.0, -1.0, 0.5, -2.0])
    scatter = []
    for worth in (each, 0 * each):
        grads = []
        for step in range(40):
            rollout = ppo.sample_rollouts(policy, PROMPTS * 32, how, CPU, stop=STOP,
                                          rng=generator(2, step))
            shares = each[rollout.idx[:, 1:]] * rollout.mask
            x = ppo.collect(policy, ref, rollout, shares.sum(1), [torch.arange(64)], how, CPU,
                            beta=beta, shares=shares, worth=worth)
            loss, _ = ppo.minibatch_loss(policy, policy, x, torch.arange(64), how, CPU)
            grads.append(gradient(loss, policy) * x.unit)
        scatter.append(torch.stack(grads).var(0).sum().item())
    assert scatter[0] < 0.5 * scatter[1], scatter


def test_a_tokens_baseline_leaves_the_least_scatter():
    """Beside a grid of all (c, d), where the best d is inside its bounds, above them and below."""
    g = generator(6)
    worth, cost = (torch.randn(2, 40, 9, generator=g) * torch.tensor([2.0, 0.3])[:, None, None])
    mask, noise = torch.rand(40, 9, generator=g) < 0.7, 0.2 * torch.randn(40, 9, generator=g)
    c, d = torch.linspace(-1, 2, 61), torch.linspace(0, ppo.MOST, 20)
    for true in (0.4, 1.7, -0.6):
        adv = 0.5 * worth + true * (cost + 0.1 * worth) + noise + 3
        left = adv[mask] - c[:, None, None] * worth[mask] - d[:, None] * cost[mask]  # (c, d, N)
        i, j = divmod(left.var(2).argmin().item(), len(d))
        got = ppo.token_baseline(adv, worth, cost, mask)
        assert got == pytest.approx((c[i].item(), d[j].item()), abs=0.05)
        assert got == ppo.token_baseline(adv.masked_fill(~mask, 99), worth, cost, mask)
    nothing = torch.zeros(40, 9)
    assert ppo.token_baseline(adv, nothing, nothing, mask) == (0, 0)


def test_at_the_posterior_a_tokens_own_price_is_its_baseline_and_worth_is_not():
    """A critic that knows the posterior's values: there an advantage is beta log pi/ref, whatever
    was drawn, so that almost nothing is left to learn, and of worth nothing in the loss."""
    V, T, beta = 4, 3, 0.5
    ref = [torch.randn(V**t, V, generator=generator(7), dtype=torch.float64).log_softmax(1)
           for t in range(T)]
    r = torch.randn(V**T, generator=generator(8), dtype=torch.float64)
    values = exact.soft_values(ref, r, beta)
    posterior = exact.posterior_levels(ref, values, beta)
    texts = exact.texts(V, T)
    spans = [texts[:, :t] @ (V ** torch.arange(t).flip(0)) for t in range(T + 1)]
    pick = lambda levels: torch.stack([  # noqa: E731
        levels[t][spans[t], texts[:, t]] for t in range(T)], dim=1)
    cost = beta * (pick(posterior) - pick(ref))
    adv = torch.stack([values[t + 1][spans[t + 1]] - values[t][spans[t]] for t in range(T)], dim=1)
    torch.testing.assert_close(adv, cost)
    worth = torch.randn(V, generator=generator(9), dtype=torch.float64)[texts]
    mask = torch.ones(V**T, T, dtype=torch.bool)
    c, d = ppo.token_baseline(adv, worth, cost, mask)
    assert d == ppo.MOST and abs(c) < 0.05
    assert (adv - c * worth - d * cost).var() < 0.01 * (adv - worth).var()


def test_with_worth_two_ranks_average_to_the_gradient_of_one():
    ref = make_ref()
    policy = nudge(ppo.make_policy(ref))
    rollout = ppo.sample_rollouts(policy, PROMPTS * 8, CONFIG, CPU, stop=STOP, rng=generator(1))
    x = ppo.collect(policy, ref, rollout, scores(rollout), [torch.arange(16)], CONFIG, CPU,
                    beta=0.3, worth=torch.randn(V, generator=generator(4)))
    rows = torch.arange(15)
    one, *two = (gradient(ppo.minibatch_loss(policy, policy, x, rows, CONFIG, runtime)[0], policy)
                 for runtime in (CPU, replace(CPU, world=2), replace(CPU, rank=1, world=2)))
    torch.testing.assert_close(sum(two) / 2, one, rtol=0, atol=1e-6)


def test_where_a_run_uses_worth_and_says_so():
    uses = lambda beta=0.1, **flags: TrainerConfig(  # noqa: E731
        **{"worth": True, "shaping": True, **flags}).uses_worth(beta)
    assert uses() and not uses(worth=False) and not uses(shaping=False) and not uses(beta=0.0)
    assert not uses(method="rloo") and not uses(kl_estimator="exact", kl_place="both")
    own, plain = (TrainerConfig(worth=worth, shaping=True).kl_placement for worth in (True, False))
    assert own == plain + "; of its own step partly in the loss, exactly"
