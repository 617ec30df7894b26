"""Action values against sums over the vocabulary, and in a world of 170 texts: grad J is exact."""

from dataclasses import replace

import pytest
import torch
from test_ppo import (
    CONFIG,
    CPU,
    PROMPTS,
    STOP,
    everything,
    exact,
    log_p,
    make_ref,
    nudge,
    randn,
    scores,
)

from nanokl import actions, ppo
from nanokl.logprob import linear_logprob
from nanokl.runtime import generator
from nanokl.trainers import TrainerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def gradient(loss, policy):
    """Of the policy's own parameters, in one vector."""
    leaves = [p for name, p in policy.named_parameters() if not name.startswith(ppo.CRITIC)]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)]).double()


def make(ref, sd=0.2, **flags):
    return nudge(ppo.make_policy(ref, critic_layers=1, action_values=True, **flags), sd)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_improved_is_ref_tilted_by_the_action_values(temperature):
    """log softmax of (logits / T + Q / beta), and Q of the drawn tokens, by dense matrices."""
    B, T, C, V, beta = 2, 3, 4, 7, 0.3
    ref, q = ((randn(B, T, C, seed=s), randn(V, C, seed=s + 1)) for s in (1, 3))
    Q = q[0] @ q[1].T  # (B, T, V)
    want = (ref[0] @ ref[1].T / temperature + Q / beta).log_softmax(-1)
    h, weight = actions.improved(ref, q, beta=beta, temperature=temperature)
    got = (h @ weight.T / temperature).log_softmax(-1)
    torch.testing.assert_close(got, want)
    y = torch.arange(B * T).view(B, T)
    torch.testing.assert_close(actions.action_values(q, y).double(),
                               Q.gather(2, y[..., None])[..., 0], rtol=1e-5, atol=1e-5)
    h_pi, w_pi = randn(B, T, C, seed=5), randn(V, C, seed=6)
    pi = (h_pi @ w_pi.T / temperature).log_softmax(-1)
    kl = linear_logprob(h_pi, w_pi, y, ref=(h, weight), temperature=temperature).kl
    torch.testing.assert_close(kl, (pi.exp() * (pi - want)).sum(-1))


def test_regression_by_hand():
    Q, adv = torch.tensor([[1.0, 9.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [2.0, -1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    loss, info = actions.regression(Q, adv, mask)
    assert loss == pytest.approx((4 + 0 + 1) / 3 / 2)
    assert info["advantage_explained"] == pytest.approx(1 - 5 / 14)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sd", [0.0, 0.2, 0.4])
def test_the_policy_gradient_is_that_of_the_objective_whatever_q_says(temperature, sd):
    """Each response as a minibatch of its own, weighed by its probability and its tokens.

    With critics that know nothing (sd 0), or anything at all; a part that is left out shows: the
    advantage without Q taken off, or the KL to the reference that Q has not tilted.
    """
    ref, world, beta = make_ref(), everything(), 0.5
    policy = make(ref, sd)
    how = replace(CONFIG, lam=1.0, value_coef=0.0, temperature=temperature)
    x = ppo.collect(policy, ref, world, scores(world), [torch.arange(170)], how, CPU, beta=beta)
    weight = log_p(policy, world, temperature).detach().exp() * world.mask.sum(1) / len(PROMPTS)

    def follows(x):
        losses = [ppo.minibatch_loss(policy, policy, x, torch.tensor([i]), how, CPU)[0]
                  for i in range(170)]
        return -gradient((torch.stack(losses) * weight).sum(), policy) * x.unit

    expected = gradient(exact(policy, ref, beta, temperature)["objective"], policy)
    miss = (follows(x) - expected).norm() / expected.norm()
    assert miss < 2e-5, miss
    wrong = (follows(replace(x, adv=0 * x.adv)) - expected).norm() / expected.norm()
    assert wrong > 0.1, wrong


def test_action_values_take_the_noise_of_the_draw_away():
    """Q learnt on many texts of a policy: the gradients of fresh batches scatter .51 times as much.

    What is left is mostly that of the states, which Q cannot know.
    """
    ref, how, beta = make_ref(), replace(CONFIG, lam=0.0), 0.5
    policy = make(ref, 0.0)
    adam = torch.optim.Adam([p for name, p in policy.named_parameters()
                             if name.startswith(ppo.CRITIC)], lr=0.01)

    def batch(step):
        rng, rows = generator(1, step), torch.arange(128)
        rollout = ppo.sample_rollouts(policy, PROMPTS * 64, how, CPU, stop=STOP, rng=rng)
        x = ppo.collect(policy, ref, rollout, scores(rollout), [rows], how, CPU, beta=beta)
        return x, ppo.minibatch_loss(policy, policy, x, rows, how, CPU)

    for step in range(60):
        _, (loss, info) = batch(step)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert info["advantage_explained"] > 0.5, info
    scatter = []
    for known in (True, False):
        if not known:
            torch.nn.init.zeros_(policy.action.weight)
        g = torch.stack([gradient(loss, policy) * x.unit
                         for x, (loss, _) in (batch(step) for step in range(100, 130))])
        scatter.append(g.var(0).sum())
    assert scatter[0] < 0.7 * scatter[1], scatter


def test_they_start_at_0_and_their_gradient_leaves_the_policy_alone():
    ref, how, rows = make_ref(), replace(CONFIG, value_coef=1.0), torch.arange(32)
    policy = ppo.make_policy(ref, critic_layers=1, action_values=True)
    rollout = ppo.sample_rollouts(policy, PROMPTS * 16, how, CPU, stop=STOP, rng=generator(1))
    x = ppo.collect(policy, ref, rollout, scores(rollout), [rows], how, CPU, beta=0.5)
    _, info = ppo.minibatch_loss(policy, policy, x, rows, how, CPU)
    assert info["advantage_explained"] == 0
    q = policy.critique(rollout.idx, policy(rollout.idx))[1]
    assert not q[0].any() and q[1] is policy.critic.wte.weight
    torch.nn.init.normal_(policy.action.weight)
    q = policy.critique(rollout.idx, policy(rollout.idx))[1]
    actions.action_values(q, rollout.idx).square().sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(name.startswith(("critic.", "action.")) for name in moved), moved
    again = ppo.make_policy(policy)  # from a policy that has them: without
    assert not hasattr(again, "action") and not again.config.action_values


def test_two_ranks_average_to_the_gradient_of_one():
    ref = make_ref()
    policy = make(ref)
    rollout = ppo.sample_rollouts(policy, PROMPTS * 8, CONFIG, CPU, stop=STOP, rng=generator(1))
    x = ppo.collect(policy, ref, rollout, scores(rollout), [torch.arange(16)], CONFIG, CPU,
                    beta=0.3)
    rows = torch.arange(15)
    one, *two = (torch.cat([p.flatten() for p in torch.autograd.grad(
        ppo.minibatch_loss(policy, policy, x, rows, CONFIG, runtime)[0], policy.parameters())])
        for runtime in (CPU, replace(CPU, world=2), replace(CPU, rank=1, world=2)))
    torch.testing.assert_close(sum(two) / 2, one, rtol=0, atol=1e-6)


def test_where_a_run_has_them():
    has = lambda beta=0.1, **flags: TrainerConfig(  # noqa: E731
        **{"action_values": True, **flags}).foresees(beta)
    assert has() and not has(action_values=False)
    assert not has(beta=0.0) and not has(method="rloo") and not has(critic_layers=0)
    assert not has(kl_estimator="exact", kl_place="both")
