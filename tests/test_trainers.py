"""trainers.py against loops, exact gradients over enumerated batches, and runs towards pi*.

The gradients are in a world of 7 texts in float64, where every group of two can be listed. The
runs are those of train_rlhf.py, from a reference 1.35 nats away from its posterior over 85 texts.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_rlhf
from nanokl import UserError, exact, metrics, optim, ppo
from nanokl.evaluation import Stage
from nanokl.gpt import GPT
from nanokl.rollout import Rollout
from nanokl.runtime import Runtime, generator
from nanokl.trainers import (
    TrainerConfig,
    collect,
    dpg_weight,
    dpo_loss,
    grpo_advantage,
    grpo_loss,
    minibatch_loss,
    rloo_advantage,
    sir_weight,
)

CPU = Runtime(torch.device("cpu"), torch.float32)
STOP, PROMPT = 0, [0, 1]
OTHERS = ("rloo", "grpo", "dpo", "dpg", "sft")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def double():
    """Everything in float64: identities hold to 1e-10 and not to 1e-5."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def nudge(model: GPT, sd: float, rng=None) -> GPT:
    """Moves all weights."""
    rng = rng or generator(9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(sd * torch.randn(p.shape, generator=rng))
    return model


def make_gpt(V: int, C: int, *, sd: float = 0.3) -> GPT:
    """A tiny GPT that is far from uniform: all its weights are random, projections included."""
    rng = torch.Generator().manual_seed(0)
    gpt = GPT(GPT.Config(vocab_size=V, block_size=8, n_layer=1, n_head=1, n_embd=C), rng)
    return nudge(gpt.requires_grad_(False).eval(), sd, rng)


# ------------------------------------------------------------------- advantages, weights, losses
def test_rloo_advantage_by_hand():
    """R = 1, 3, 8 - 2 [0, 1, 1] = 1, 1, 6: less the mean of the other two."""
    got = rloo_advantage(torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[0.0, 1.0, 1.0]]), beta=2)
    torch.testing.assert_close(got, torch.tensor([[1 - 3.5, 1 - 3.5, 6 - 1.0]]))


def test_grpo_advantage_by_hand():
    got = grpo_advantage(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    sd = math.sqrt((4 + 1 + 9) / 2)
    want = torch.tensor([[-2 / sd, -1 / sd, 3 / sd], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_dpg_weight_equals_a_loop_and_may_be_huge():
    score, log_ratio = randn(3, 5), randn(3, 5, seed=1)
    got = dpg_weight(score, log_ratio, beta=0.5)
    for g, i in itertools.product(range(3), range(5)):
        w = [math.exp(score[g, j] / 0.5 - log_ratio[g, j]) for j in range(5)]
        assert got[g, i].item() == pytest.approx(4 * w[i] / (sum(w) - w[i]), rel=1e-10)
    assert torch.allclose(dpg_weight(score, score / 0.5, beta=0.5), torch.ones(3, 5).double())
    huge = dpg_weight(torch.tensor([[0.0, 5000.0]]), torch.zeros(1, 2), beta=1.0)
    assert huge.tolist() == [[0.0, math.inf]]  # collect bounds it


def test_sir_weights_are_the_posterior_of_what_was_drawn():
    """Each text as often as its share of the prior: the weights of its copies are its posterior."""
    counts, r = torch.tensor([1, 2, 5, 8]), randn(4)
    which = torch.arange(4).repeat_interleave(counts)
    got = sir_weight(r[which][None], beta=0.3)[0] / 16
    got = torch.zeros(4).double().index_add(0, which, got)
    want = exact.posterior((counts.double() / 16).log(), r, 0.3)[0].exp()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_grpo_loss_equals_a_loop(double):
    """Per response the mean over its tokens, of clipped surrogate and k3; junk outside the mask."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]]).bool()
    logp, old, ref = (randn(3, 4, seed=i) * 0.3 for i in range(3))
    adv, total = torch.tensor([1.5, -1.0, 0.5]).double(), 0.0
    for i in range(3):
        terms = []
        for t in mask[i].nonzero()[:, 0].tolist():
            rho, d = math.exp(logp[i, t] - old[i, t]), (ref[i, t] - logp[i, t]).item()
            surrogate = min(rho * adv[i].item(), min(max(rho, 0.8), 1.2) * adv[i].item())
            terms.append(-surrogate + 0.7 * (math.exp(d) - d - 1))
        total += sum(terms) / len(terms) / 3
    junk = torch.where(mask, 0, 50.0)
    got, _ = grpo_loss(logp + junk, old, ref, adv[:, None] * mask, mask, clip=0.2, beta=0.7)
    assert got.item() == pytest.approx(total, rel=1e-10)


def test_grpo_loss_has_digits_near_the_reference():
    """exp(d) - 1 - d itself would be off by a tenth in float32."""
    d = torch.tensor([[1e-3, -1e-3]])
    nothing, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = grpo_loss(nothing, nothing, d, nothing, mask, clip=0.2, beta=1.0)
    assert loss.item() == pytest.approx(5e-7, rel=1e-3)


def test_dpo_loss_equals_a_loop_over_pairs():
    log_ratio, score, losses = randn(2, 4), randn(2, 4, seed=1), []
    for g in range(2):
        for i, j in itertools.combinations(range(4), 2):
            p = 1 / (1 + math.exp(score[g, j] - score[g, i]))
            q = 1 / (1 + math.exp(0.3 * (log_ratio[g, j] - log_ratio[g, i])))
            losses.append(-p * math.log(q) - (1 - p) * math.log(1 - q))
    got = dpo_loss(log_ratio, score, beta=0.3).item()
    assert got == pytest.approx(sum(losses) / len(losses), rel=1e-10)


@pytest.mark.parametrize("law", ["ref", "other"])
def test_dpo_on_all_pairs_is_least_at_the_posterior(law):
    """Each pair as often as a law draws it: Newton's method from the reference ends at pi*."""
    r, beta, N = randn(7), 0.3, 7
    ref, other = randn(N, seed=1).log_softmax(0), randn(N, seed=2).log_softmax(0)
    weight = {"ref": ref, "other": other}[law].exp()
    pairs = list(itertools.combinations(range(N), 2))

    def loss(theta):
        log_ratio = theta.log_softmax(0) - ref
        return sum(weight[i] * weight[j] * dpo_loss(log_ratio[None, [i, j]], r[None, [i, j]],
                                                    beta=beta) for i, j in pairs)

    theta = ref.clone()
    for _ in range(20):
        theta.requires_grad_()
        slope = torch.autograd.grad(loss(theta), theta)[0]
        curvature = torch.autograd.functional.hessian(loss, theta.detach())
        theta = theta.detach() - torch.linalg.pinv(curvature, rtol=1e-9) @ slope
    pi, want = theta.log_softmax(0), exact.posterior(ref, r, beta)[0]
    assert exact.kl(ref, want) > 0.5 and exact.kl(pi, want) < 1e-12
    assert slope.norm() < 1e-10 and torch.linalg.eigvalsh(curvature)[1] > 0  # no other minimum


# ------------------------------------------------------- expected gradients, every batch listed
V, T = 3, 2
RESPONSES = [[STOP], *([a, b] for a in (1, 2) for b in range(V))]  # 7 of them


def listed(rows: list[int]) -> Rollout:
    """These responses, junk right of a stop token."""
    idx = torch.full((len(rows), len(PROMPT) + T), 2)
    mask = torch.zeros(len(rows), len(PROMPT) + T - 1, dtype=torch.bool)
    for i, y in enumerate(RESPONSES[row] for row in rows):
        idx[i, : 2 + len(y)] = torch.tensor([*PROMPT, *y])
        mask[i, 1 : 1 + len(y)] = True
    return Rollout(idx, mask, torch.zeros(mask.shape), torch.full((len(rows),), 2),
                   torch.tensor([RESPONSES[row][-1] == STOP for row in rows]))


def law(model) -> torch.Tensor:
    """log p of all responses (7,), with gradients, by way of all the logits."""
    world = listed(range(7))
    logp = F.log_softmax(model.head(model(world.idx)), dim=-1)[:, :-1]
    return (logp.gather(2, world.idx[:, 1:, None])[..., 0] * world.mask).sum(1)


class World:
    """Reference, a policy that has left it, and scores; `at_posterior` makes it their posterior."""

    def __init__(self, beta: float, *, at_posterior: bool = False):
        self.beta = beta
        self.ref = make_gpt(V, 8)
        self.policy = nudge(ppo.make_policy(self.ref).requires_grad_(False), 0.25)
        for p in self.policy.blocks.parameters():
            p.requires_grad_()
        self.logp_ref, self.logp = law(self.ref).detach(), law(self.policy).detach()
        self.r = randn(7, seed=3)
        if at_posterior:
            self.r = beta * (self.logp - self.logp_ref) + 5
        self.log_post, self.log_z = exact.posterior(self.logp_ref, self.r, beta)

    def gradient(self, loss) -> torch.Tensor:
        leaves = list(self.policy.blocks.parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    def batch(self, method: str, group: list[int]) -> tuple[ppo.Experience, TrainerConfig]:
        config = TrainerConfig(method=method, group=len(group), minibatch=len(group),
                               max_new_tokens=T)
        order, score = [torch.arange(len(group))], self.r[list(group)]
        return collect(self.policy, self.ref, listed(group), score, order, config, CPU,
                       beta=self.beta), config

    def update(self, x: ppo.Experience, config: TrainerConfig) -> torch.Tensor:
        """The gradient of the loss on one batch of one group."""
        rows = torch.arange(len(x.score))
        return self.gradient(minibatch_loss(self.policy, self.policy, x, rows, config, CPU,
                                            beta=self.beta)[0])

    def expected(self, method: str) -> torch.Tensor:
        """The mean gradient over all groups of two, each as often as its sampler draws it."""
        p = (self.logp_ref if method == "sft" else self.logp).exp()
        total = 0.0
        for i, j in itertools.product(range(7), repeat=2):
            x, config = self.batch(method, [i, j])
            if method == "dpg":  # without the bound, which two samples always meet
                w = dpg_weight(x.score[None], (x.logp - x.logp_ref).sum(1)[None], beta=self.beta)
                x = replace(x, adv=(w.T - 1) * x.rollout.mask)
            total = total + p[i] * p[j] * self.update(x, config)
        return total


def close(x, y, tolerance=1e-10):
    assert y.norm() > 1e-3
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * y.norm().item())


@pytest.fixture
def world(double):
    world = World(0.5)
    assert exact.gap(world.logp, world.logp_ref, world.r, 0.5) > 0.3
    assert exact.kl(world.logp, world.logp_ref) > 0.1
    return world


def test_rloo_follows_the_gradient_of_the_objective(world):
    """In the mean over all batches, for every token of a response and per token of T."""
    logp = law(world.policy)
    J = (logp.exp() * (world.r - world.beta * (logp - world.logp_ref))).sum()
    close(world.expected("rloo"), -world.gradient(J) / T)


def test_dpg_follows_the_gradient_of_the_forward_kl(world):
    """In direction, exactly; its length is E[Z / Zhat] times as large."""
    w = (world.r / world.beta - world.logp + world.logp_ref).exp()
    length = world.log_z.exp() * (world.logp.exp() / w).sum()
    forward = (world.log_post.exp() * (world.log_post - law(world.policy))).sum()
    close(world.expected("dpg"), length * world.gradient(forward) / T)


def test_sft_on_exact_weights_follows_the_gradient_of_the_forward_kl(world):
    x, config = world.batch("sft", range(7))
    weight = 7 * world.log_post.exp()
    forward = (world.log_post.exp() * (world.log_post - law(world.policy))).sum()
    x = replace(x, adv=weight[:, None] * x.rollout.mask)
    close(world.update(x, config), world.gradient(forward) / T)


def test_dpo_learns_from_every_pair(world):
    """Its update is the gradient of the loss, written out, over the pairs of a group."""
    x, config = world.batch("dpo", [0, 3, 5, 6])
    D = (law(world.policy) - world.logp_ref)[[0, 3, 5, 6]][None]
    close(world.update(x, config), world.gradient(dpo_loss(D, x.score[None], beta=world.beta)))


def test_at_the_posterior_every_response_has_gradient_0_but_grpo(double):
    """score = beta log pi/ref + 5 makes the policy its own posterior. No noise is left for RLOO,
    DPO and KL-DPG; GRPO would leave it, also in the mean over all batches."""
    world = World(0.5, at_posterior=True)
    assert exact.kl(world.logp, world.log_post).abs() < 1e-12 < world.r.std()
    elsewhere = World(0.5)
    for method in ("rloo", "dpo", "dpg"):
        group = [0, 2, 3, 6]
        assert world.update(*world.batch(method, group)).norm() < 1e-10
        assert elsewhere.update(*elsewhere.batch(method, group)).norm() > 1e-2
    assert world.expected("grpo").norm() > 1e-2


def test_a_weight_of_dpg_is_at_most_its_group(double):
    world = World(0.01)
    x, _ = world.batch("dpg", [0, 1, 2, 3])
    assert x.adv.max() == 4 - 1 and x.adv.min() >= -1 and x.adv[~x.rollout.mask].abs().max() == 0


# ----------------------------------------------------------------- groups, minibatches, processes
class Tokens:
    """Stands in for a tokenizer: the reward goes by ids."""

    def special(self, _) -> int:
        return STOP

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("world", [1, 2])
def test_minibatches_keep_groups_whole_in_every_process(world):
    stage = Stage(TrainerConfig(method="dpo", group=4, minibatch=16), CPU, Tokens(), None, None, 0)
    seen = []
    for rank in range(world):
        stage.runtime = replace(CPU, rank=rank, world=world)
        for rows in stage.minibatches(40, generator(1), 4):
            columns = stage.runtime.shard(rows).view(4, -1)
            assert (columns // 4 == columns[0] // 4).all() and len(rows) in (16, 8)
            seen += columns.flatten().tolist()
    assert sorted(seen) == list(range(40)) != seen
    one = stage.minibatches(40, generator(1))
    assert torch.equal(torch.cat(one), torch.randperm(40, generator=generator(1)))
    stage.runtime = replace(CPU, world=3)
    with pytest.raises(UserError, match="--group 4 times the 3 processes"):
        stage.minibatches(48, generator(1), 4)


@pytest.mark.parametrize("method", OTHERS)
def test_two_processes_average_to_the_gradient_of_one(method, double):
    world = World(0.5)
    x, config = world.batch(method, [0, 3, 5, 6, 0, 1, 2, 3])  # other numbers of tokens
    config = replace(config, group=2)
    x = collect(world.policy, world.ref, x.rollout, x.score, [torch.arange(8)], config, CPU,
                beta=0.5)
    nudge(world.policy, 0.05)  # so that some tokens are clipped
    rows = torch.arange(8).view(4, 2).T.flatten()  # as Stage.minibatches has them
    one, *two = (world.gradient(minibatch_loss(world.policy, world.policy, x, rows, config,
                                               runtime, beta=0.5)[0])
                 for runtime in (CPU, replace(CPU, world=2), replace(CPU, rank=1, world=2)))
    close(sum(two) / 2, one)


def test_config_says_what_is_wrong():
    assert TrainerConfig().group == 1 and TrainerConfig(method="dpo").group == 8
    for flags, says in (({"method": "rloo", "group": 1}, "rloo needs at least 2"),
                        ({"group": 0}, "ppo needs at least 1"),
                        ({"method": "sft", "group": 7}, "a multiple of group, 7")):
        with pytest.raises(UserError, match=says):
            TrainerConfig(**flags)
    given = {"data": Path(), "out": Path(), "policy": Path(), "reward": "", "beta": 0.0}
    for method in ("dpo", "dpg", "sft"):
        with pytest.raises(UserError, match=f"{method} divides by it"):
            train_rlhf.PPOFlags(method=method, **given)
    assert train_rlhf.PPOFlags(method="rloo", **given).batch == 256


# -------------------------------------------------------------------------------- runs towards pi*
# The score of every text of 3 tokens.
TABLE = torch.randn(5**3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_table(ids, _texts) -> torch.Tensor:
    """Scores: what comes after a stop token is 0, as exact.texts counts."""
    rows = [[*row[len(PROMPT) :], 0, 0, 0][:3] for row in ids]
    return TABLE[[25 * a + 5 * b + c for a, b, c in rows]]


def exact_law(model) -> torch.Tensor:
    return exact.joint(exact.levels_of(model, PROMPT, 3, stop=STOP))


def start(method: str, *, beta=0.7, steps=60, lr=7e-3, **flags) -> Stage:
    flags = {"batch": 512, "minibatch": 128, "n_epoch": 2, **flags}
    config = train_rlhf.PPOFlags(
        data=Path(), out=Path(), policy=Path(), reward="", method=method, beta=beta, steps=steps,
        lr=lr, muon_lr=lr, min_prompt=1, max_prompt=1, max_new_tokens=3, n_eval=64, **flags)
    return Stage(config, CPU, Tokens(), make_gpt(5, 16), by_table, 0, guess=by_table)


def train(stage: Stage, decay: float = 0.8) -> GPT:
    """The steps of train_rlhf.py, with one prompt, and a rate that falls to 0 at the end."""
    flags = stage.config
    critic = flags.method == "ppo"
    policy = ppo.make_policy(stage.ref, critic_layers=int(critic))
    policy.value.requires_grad_(critic)
    stage.worth = stage.token_worth([[1, 1]]) if flags.uses_worth(flags.beta) else None
    optimizers = train_rlhf.policy_optimizers(policy, flags, CPU)
    for step in range(1, flags.steps + 1):
        optim.set_lr(optimizers, optim.lr_scale(step - 1, flags.steps, warmup=2, decay=decay))
        row = train_rlhf.ppo_batch(stage, policy, policy, optimizers, [[1, 1]], step, flags.beta)
        assert row["first_ratio_max_deviation"] == 0
        assert step > 1 or row["kl_nats_per_sequence"] == 0
    return policy


def gap(policy, stage: Stage) -> float:
    return exact.gap(exact_law(policy), exact_law(stage.ref), TABLE, stage.config.beta).item()


# Method, flags and the gap that it must get below. With seeds 0 to 2 it was at most: rloo .022,
# dpo .025, dpg .027, sft .025.
RUNS = {
    "dpo": ({}, 0.04),
    "dpg": ({}, 0.05),
    "sft": ({"batch": 1024, "minibatch": 512, "group": 512, "n_epoch": 4, "steps": 40,
             "lr": 1.5e-2}, 0.04),
}  # fmt: skip


@pytest.mark.parametrize("method", RUNS)
def test_training_reaches_the_posterior(method):
    flags, bound = RUNS[method]
    stage = start(method, **flags)
    policy = train(stage)
    assert gap(stage.ref, stage) > 1.3
    assert 0 < gap(policy, stage) < bound, gap(policy, stage)
    if method == "dpo":  # its implicit reward is the reward, less beta log Z
        log_pi, log_ref = exact_law(policy), exact_law(stage.ref)
        implicit = torch.where(log_ref > -torch.inf, 0.7 * (log_pi - log_ref), 0)
        assert exact.expectation(log_ref, (implicit / 0.7).exp()).item() == pytest.approx(1)
        log_post, log_z = exact.posterior(log_ref, TABLE, 0.7)
        error = exact.expectation(log_post, (implicit - TABLE + 0.7 * log_z).abs())
        assert error < 0.15 < exact.expectation(log_post, (TABLE - 0.7 * log_z).abs())


def test_ppo_as_the_program_has_it_reaches_the_posterior():
    """Its own settings, with a rate that falls over half of the run: from 1.35 nats to below .02.

    100 batches of 1,024 take 12 seconds of one core. At momentum .5: .013 to .015 (3 seeds). A
    critic that errs biases lam < 1; that cannot be seen here: at lam 1 and 0 it is much the same.
    """
    stage = start("ppo", batch=1024, n_epoch=1, steps=100, lr=1e-2)
    flags = stage.config
    assert (flags.lam, flags.shaping, flags.critic_lr, flags.clip) == (0.8, True, 5.0, 0.2)
    assert flags.worth and flags.momentum == 0.8
    assert gap(stage.ref, stage) > 1.3
    assert 0 < gap(train(stage, decay=0.5), stage) < 0.02


def test_rloo_reaches_the_posterior_and_grpo_does_not():
    """The same world, seed, batches and rates. With seeds 0 to 2 the gaps were .017 and .19 to
    .23 nats; after a third of the steps, when the rate was still large, GRPO's were the same."""
    rloo, grpo = ((train(stage), stage) for stage in (start("rloo"), start("grpo")))
    assert gap(*rloo) < 0.04 < 0.12 < gap(*grpo)


class Lines(metrics.Log):
    """Keeps what is printed."""

    def line(self, text: str) -> None:
        self.__dict__.setdefault("lines", []).append(text)


def test_without_a_price_the_policy_collapses_onto_the_best_text_and_says_so(tmp_path):
    stage = start("ppo", beta=0.0, steps=40, lr=1e-2)
    policy = train(stage)
    logp, ref = exact_law(policy), exact_law(stage.ref)
    best = exact.posterior(ref, TABLE, 0.0)[0].argmax()
    assert logp[best].exp() > 0.99 > 0.5 > ref[best].exp()
    assert -exact.expectation(logp, logp) < 0.05 < 1 < -exact.expectation(ref, ref)
    for model, collapsed in ((policy, True), (ppo.make_policy(stage.ref), False)):
        stage.config.out = tmp_path / str(collapsed)
        with Lines(stage.config.out, total=1, unit="batch") as log:
            first = {"entropy_at_step_0": 1.2}
            train_rlhf.finish_ppo(stage, model, [[1, 1]], log, first, beta=0.0)
        summary = json.loads((stage.config.out / "summary.json").read_text())
        assert summary["collapsed"] is collapsed
        assert any(line.startswith("collapsed: ") for line in log.lines) is collapsed
