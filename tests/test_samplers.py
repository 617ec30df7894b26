"""samplers.py and smc.py against a world that is listed: exact.py has its posterior in float64.

Four letters and a stop token, two prompts of different length, up to three new tokens: 85 texts a
prompt, whose scores are an arbitrary table. Statistical tests have a fixed seed; the odds given are
of a false alarm under a new one, and at the same size wrong targets are shown to be caught.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanokl import UserError, exact, ppo
from nanokl.evaluation import Stage
from nanokl.gpt import GPT
from nanokl.runtime import Runtime, generator
from nanokl.samplers import (
    Draws,
    Target,
    best_of_n,
    draw_texts,
    imh,
    log_probs,
    log_weights,
    pick,
    propose,
    rejection,
    sir,
)
from nanokl.smc import smc

CPU = Runtime(torch.device("cpu"), torch.float32)
V, STOP, NEW, BETA, R_MAX = 5, 4, 3, 0.5, 2.0
PROMPTS = [[STOP, 0], [STOP, 1, 3]]  # neither begins the other
CONFIG = ppo.PPOConfig(min_prompt=1, max_prompt=2, max_new_tokens=NEW, temperature=0.8)
ODDS = 1e-6

pytestmark = pytest.mark.usefixtures("one_thread")


def rng(seed=0):
    return generator(seed, "test_samplers")


def shake(model, sd, seed):
    """All weights moved at random, projections included."""
    g = rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(sd * torch.randn(p.shape, generator=g) * (0.5 if p.dim() == 1 else 1))
    return model.eval().requires_grad_(False)


@functools.cache
def reference():
    config = GPT.Config(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=16)
    return shake(GPT(config, rng()), 0.3, 9)


@functools.cache
def policy(critic_layers=1):
    """Far from both the reference and the posterior; its critic says anything."""
    model = shake(ppo.make_policy(reference(), critic_layers=critic_layers), 0.05, 22)
    torch.nn.init.normal_(model.value.weight, std=0.1, generator=rng(3))
    return model


@functools.cache
def table(levels=None):
    """A score for each row of up to 6 tokens; with `levels` few different ones, for ties."""
    x = torch.randn(6, *[V + 1] * 5, generator=rng(4)).clamp(-R_MAX, R_MAX).flatten()
    return x if levels is None else (x * levels).round() / levels


def score_ids(ids, levels=None):
    digits = [sum((token + 1) * (V + 1) ** k for k, token in enumerate(row)) for row in ids]
    return table(levels)[torch.tensor(digits) % len(table())]


def make(beta=BETA, policy=None, levels=None, chunk=1024, ref=None, **config):
    tokenizer = SimpleNamespace(special={"<|endoftext|>": STOP}.get, decode=str)
    stage = Stage(replace(CONFIG, **config), CPU, tokenizer, ref or reference(),
                  lambda ids, _: score_ids(ids, levels), 0)
    return Target(stage, beta, policy, chunk)


@functools.cache
def world(prompt=0, levels=None):
    """A prompt's reference levels, its law log ref (V^T,) and the scores r (V^T,)."""
    levels_ref = exact.levels_of(reference(), PROMPTS[prompt], NEW, stop=STOP,
                                 temperature=CONFIG.temperature)
    rows = [PROMPTS[prompt] + cut(y) for y in exact.texts(V, NEW).tolist()]
    return levels_ref, exact.joint(levels_ref), score_ids(rows, levels).double()


def cut(y):
    """A text without what follows its stop token."""
    return y[: y.index(STOP) + 1] if STOP in y else y


def numbers(rollout):
    """Which text of the world each response is, (B,)."""
    padded = [y + [STOP] * (NEW - len(y)) for y in rollout.responses()]
    return torch.tensor(padded) @ V ** torch.arange(NEW - 1, -1, -1)


def tail(drawn, logp):
    """P(chi-square is this large or larger) of drawn text numbers; rare texts are one cell."""
    p, n = logp.exp(), len(drawn)
    counts = torch.bincount(drawn, minlength=len(p)).double()
    if counts[p == 0].any():
        return 0.0
    common = p * n >= 8
    want = torch.cat([p[common] * n, (p[~common].sum() * n)[None]])
    got = torch.cat([counts[common], counts[~common].sum()[None]])
    x = ((got - want).square() / want)[want > 0].sum()
    return torch.special.gammaincc((want > 0).sum() / 2 - 0.5, x / 2).item()


def posterior(prompt=0, beta=BETA):
    _, ref, r = world(prompt)
    return exact.posterior(ref, r, beta)


def forgotten(prompt=0):
    """The posterior of somebody who leaves the stop token out of log p."""
    levels_ref, ref, r = world(prompt)
    free = [torch.where(torch.arange(V) == STOP, 0.0, level) for level in levels_ref]
    counts = ref > -torch.inf
    return torch.where(counts, exact.joint(free) + r / BETA, -torch.inf).log_softmax(0)


def is_posterior(draws, copies):
    """Holds the draws of `copies` of both prompts, in turn, against the posterior; and others."""
    n = len(draws.score) // (2 * copies)
    drawn = numbers(draws.rollout).view(copies, 2, n)
    for i in range(2):
        mine = drawn[:, i].flatten()
        assert tail(mine, posterior(i)[0]) > ODDS
        wrong = [posterior(i, 2 * BETA)[0], posterior(i, 0.7 * BETA)[0], forgotten(i), world(i)[1]]
        assert all(tail(mine, law) < ODDS for law in wrong), [tail(mine, w) for w in wrong]
        assert (world(i)[2][mine] == draws.score.view(copies, 2, n)[:, i].flatten()).all()


def worst(draws, copies, i, law):
    """The largest |z| of the mean of Z-hat / Z [event] from law(event), of some events.

    Z-hat [drawn text] has the mean Z pi*(text) with any number of proposals, even few. The events,
    first tokens, a stop, low and high scores, are frequent under every proposal, so that z is about
    normal.
    """
    n = len(draws.score) // (2 * copies)
    all_texts, r = exact.texts(V, NEW), world(i)[2][:, None]
    event = torch.cat([all_texts[:, :1] == torch.arange(V), (all_texts == STOP).any(1)[:, None],
                       r < 0, r < 0.5, r > 1], dim=1).double()  # (V^T, 9)
    weight = (draws.log_z.view(copies, 2)[:, i] - posterior(i)[1]).exp()
    x = weight[:, None] * event[numbers(draws.rollout)].view(copies, 2, n, -1)[:, i].mean(1)
    frequent = posterior(i)[0].exp() @ event > 0.04
    z = (x.mean(0) - law.exp() @ event) / (x.std(0) / copies**0.5)
    return z[frequent].abs().max()


def has_the_weighted_law(draws, copies):
    """No event is off by 5 standard errors, and under wrong laws one is: odds 1e-5 in all."""
    for i in range(2):
        assert worst(draws, copies, i, posterior(i)[0]) < 5
        for wrong in (posterior(i, 2 * BETA)[0], forgotten(i), world(i)[1]):
            assert worst(draws, copies, i, wrong) > 5
    assert torch.equal(draws.score, score_ids(draws.rollout.rows()))


# ------------------------------------------------------------------------------------ the world
def test_the_world_asks_for_something():
    """The posterior is far from the reference, texts stop early and late, prompts differ."""
    for i in range(2):
        law, log_z = posterior(i)
        assert exact.kl(law, world(i)[1]) > 0.5 and world(i)[2].max() <= R_MAX
        assert world(i)[1].exp().sum() == pytest.approx(1, abs=1e-9)
        stops = torch.tensor([STOP in y[:-1] for y in exact.texts(V, NEW).tolist()])
        assert 0.1 < law.exp()[stops].sum() < 0.9
        assert log_z > 0.3


def test_log_probs_are_those_of_the_levels_in_chunks_of_any_size():
    target, model = make(), policy()
    rollout, _ = draw_texts(target.stage, model, PROMPTS, 200, rng())
    which, stage = numbers(rollout).view(2, 200), target.stage
    for m in (reference(), model):
        laws = torch.stack([exact.joint(exact.levels_of(m, p, NEW, stop=STOP, temperature=0.8))
                            for p in PROMPTS])
        for chunk in (256, 7, 1000):
            got = log_probs(m, rollout, stage.config, CPU, chunk)
            assert got.dtype == torch.float64
            torch.testing.assert_close(got.view(2, 200), laws.gather(1, which), rtol=0, atol=2e-5)
    both = ppo.measure(model, reference(), rollout, [torch.arange(400)], stage.config, CPU)[:2]
    for m, want in zip((model, reference()), both, strict=True):
        got = log_probs(m, rollout, stage.config, CPU)
        torch.testing.assert_close(got, want.double().sum(1), rtol=0, atol=1e-5)


def test_draw_texts_are_k_texts_of_the_model():
    """Both prompts at odds 1e-6 each; the scores are those of the rows."""
    target = make()
    rollout, score = draw_texts(target.stage, policy(), PROMPTS, 3000, rng(1), chunk=999)
    drawn = numbers(rollout).view(2, 3000)
    assert rollout.n_prompt.view(2, 3000)[:, 0].tolist() == [2, 3]
    assert torch.equal(score, score_ids(rollout.rows()))
    for i in range(2):
        levels = exact.levels_of(policy(), PROMPTS[i], NEW, stop=STOP, temperature=0.8)
        assert tail(drawn[i], exact.joint(levels)) > ODDS > tail(drawn[i], world(i)[1])


def test_weights_by_hand():
    logw = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0]], dtype=torch.float64)
    points = torch.tensor([[0.0, 0.24, 0.26, 1 - 2.0**-53]], dtype=torch.float64)
    assert pick(logw[:1], points).tolist() == [[0, 0, 1, 3]]
    none = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert pick(none, points).tolist() == [[1, 1, 1, 1]]  # what has no weight is never taken


# ------------------------------------------------------------------------------ whole proposals
@pytest.mark.parametrize("proposal", ["ref", "policy", "mixture"])
@pytest.mark.parametrize("iid", [False, True])
def test_weights_have_the_mean_z_and_are_those_of_the_enumeration(proposal, iid):
    """Within 5 standard errors of Z, 12 times: odds 1e-5 in all. k is odd: a coin has the last."""
    target, k = make(policy=policy()), 3
    rollout, score, logw = propose(target, PROMPTS * 800, k, rng(2), proposal, iid=iid)
    drawn = numbers(rollout).view(800, 2, k)
    share = {"ref": 1.0, "policy": 0.0, "mixture": 0.5}[proposal]
    for i in range(2):
        ref, r = world(i)[1:]
        p = exact.joint(exact.levels_of(policy(), PROMPTS[i], NEW, stop=STOP, temperature=0.8))
        q = (share * ref.exp() + (1 - share) * p.exp()).log()
        want = (ref + r / BETA - q)[drawn[:, i]]
        got = logw.view(800, 2, k)[:, i]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        ratio = (got - posterior(i)[1]).exp().mean(1)  # of a prompt's copy
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / 800**0.5


def test_rejection_is_exact():
    """Chi-square at odds 1e-6 a prompt; acceptance is Z exp(-r_max / beta)."""
    draws = rejection(make(), PROMPTS, 500, rng(5), r_max=R_MAX)
    is_posterior(draws, 1)
    log_z = torch.stack([posterior(i)[1] for i in range(2)])
    torch.testing.assert_close(draws.log_z, log_z, rtol=0, atol=0.1)  # some 5 standard errors
    torch.testing.assert_close(draws.accepted.log(), draws.log_z - R_MAX / BETA)
    assert draws.valid is None and (draws.proposals >= 500 / draws.accepted * 0.8).all()
    looser = rejection(make(), PROMPTS, 20, rng(5), r_max=R_MAX + 0.5)
    assert (looser.accepted < 0.5 * draws.accepted).all()


def test_rejection_says_what_it_cannot_find():
    target = make(beta=0.05)
    with pytest.raises(UserError, match=r"2 of 2 prompts have fewer than 99 texts after 128 trials,"
                       r" one has \d+ \(acceptance rate \S+\): raise trials or beta"):
        rejection(target, PROMPTS, 99, rng(), r_max=R_MAX, trials=128)
    draws = rejection(target, PROMPTS, 99, rng(), r_max=R_MAX, trials=500, partial=True)
    valid = draws.valid.view(2, 99)
    assert draws.proposals.tolist() == [500, 500] and not valid.all(1).any()
    assert draws.rollout.n_prompt.view(2, 99)[:, 5].tolist() == [2, 3]  # rows are there
    for i in range(2):
        law = posterior(i, 0.05)[0]
        assert (law[numbers(draws.rollout).view(2, 99)[i][valid[i]]] > -15).all()
    with pytest.raises(UserError, match=r"a text scores \d\S*, above r_max 0.1: give the reward's"):
        rejection(target, PROMPTS, 9, rng(), r_max=0.1)


@pytest.mark.parametrize("proposal", ["ref", "policy", "mixture"])
def test_sir_draws_the_posterior(proposal):
    draws = sir(make(policy=policy()), PROMPTS * 500, 4, rng(6), m=15, proposal=proposal)
    has_the_weighted_law(draws, 500)
    assert (draws.proposals == 15).all() and ((draws.ess > 0.999) & (draws.ess < 15.001)).all()


def test_sir_of_many_proposals_is_near_the_posterior_without_weights():
    """Total variation of 2,000 texts: .1 expected, sd .01 at most; odds 1e-6."""
    draws = sir(make(), PROMPTS, 2000, rng(6), m=6000, proposal="ref")
    drawn = numbers(draws.rollout).view(2, 2000)
    for i in range(2):
        share = torch.bincount(drawn[i], minlength=V**NEW) / 2000
        off = lambda law: (share - law.exp()).abs().sum() / 2  # noqa: E731, B023
        assert off(posterior(i)[0]) < 0.15 < off(posterior(i, 2 * BETA)[0])


def test_sir_of_one_proposal_is_the_proposal():
    draws = sir(make(), PROMPTS * 1500, 2, rng(6), m=1, proposal="ref")
    drawn = numbers(draws.rollout).view(1500, 2, 2)
    assert (drawn[..., 0] == drawn[..., 1]).all() and (draws.ess == 1).all()
    assert all(tail(drawn[:, i, 0], world(i)[1]) > ODDS for i in range(2))


def test_imh_reaches_the_posterior():
    draws = imh(make(policy=policy()), PROMPTS, 400, rng(7), steps=30)
    is_posterior(draws, 1)
    log_z = torch.stack([posterior(i)[1] for i in range(2)])
    torch.testing.assert_close(draws.log_z, log_z, rtol=0, atol=0.1)
    assert ((draws.accepted > 0.05) & (draws.accepted < 0.9)).all()
    assert draws.proposals.tolist() == [31 * 400] * 2


def from_law(laws, n, seed, target):
    """Draws of n texts a prompt from any law, as a sampler gives them."""
    rows = [exact.texts(V, NEW)[law.exp().multinomial(n, True, generator=rng(seed))].tolist()
            for law in laws]
    rollout, _ = draw_texts(target.stage, reference(), PROMPTS, n, rng())
    for i, y in enumerate(y for ys in rows for y in ys):
        k, y = int(rollout.n_prompt[i]), cut(y)
        rollout.idx[i, k : k + len(y)] = torch.tensor(y)
        rollout.mask[i] = False
        rollout.mask[i, k - 1 : k - 1 + len(y)] = True
        rollout.stopped[i] = y[-1] == STOP
    return Draws(rollout, score_ids(rollout.rows()), torch.zeros(2))


@pytest.mark.parametrize("proposal", ["ref", "policy", "mixture"])
def test_the_posterior_is_stationary_under_imh(proposal):
    """From exact draws two steps lead to exact draws; at another beta they lead away."""
    target, n = make(policy=policy()), 1000
    start = from_law([posterior(i)[0] for i in range(2)], n, 8, target)
    draws = imh(target, PROMPTS, n, rng(9), steps=2, proposal=proposal, start=start)
    is_posterior(draws, 1)
    moved = (numbers(draws.rollout) != numbers(start.rollout)).double().mean()
    assert moved > 0.15 and draws.proposals.tolist() == [2 * n] * 2
    away = imh(replace(target, beta=2 * BETA), PROMPTS, n, rng(9), steps=2, proposal=proposal,
               start=start)
    drawn = numbers(away.rollout).view(2, n)
    assert all(tail(drawn[i], posterior(i)[0]) < ODDS for i in range(2))


@pytest.mark.parametrize("levels", [None, 1])
def test_best_of_n_has_the_exact_law(levels):
    """With scores that differ and with ties; the laws for other N are caught."""
    draws = best_of_n(make(levels=levels), PROMPTS, 1500, rng(10), best_of=4)
    drawn = numbers(draws.rollout).view(2, 1500)
    for i in range(2):
        ref, r = world(i, levels)[1:]
        assert levels is None or len(r.unique()) <= 5
        assert tail(drawn[i], exact.best_of_n(ref, r, 4)) > ODDS
        for other in (2, 6):
            assert tail(drawn[i], exact.best_of_n(ref, r, other)) < ODDS
    assert draws.proposals.tolist() == [6000, 6000] and draws.log_z is None


# ---------------------------------------------------------------------------------- twisted SMC
class Levels(torch.nn.Module):
    """A policy given by its levels at each prompt: its hidden states are its log-probs."""

    def __init__(self, of_prompts, longest=8):
        super().__init__()
        self.config = SimpleNamespace(block_size=longest, n_layer=1)
        self.head = SimpleNamespace(weight=torch.eye(V))
        self.rows = {}
        for prompt, levels in zip(PROMPTS, of_prompts, strict=True):
            for t, level in enumerate(levels):
                for s, logp in zip(exact.texts(V, t).tolist() if t else [[]], level, strict=True):
                    self.rows[(*prompt, *s)] = logp.float().clamp(min=-80)

    def new_cache(self, batch, length):
        cache = SimpleNamespace(idx=torch.empty(batch, 0, dtype=torch.long))
        cache.keep = lambda rows: setattr(cache, "idx", cache.idx[rows])
        return cache

    def forward(self, idx, cache=None):
        before = idx[:, :0] if cache is None else cache.idx
        full = torch.cat([before, idx], dim=1)
        if cache is not None:
            cache.idx = full
        flat = torch.full((V,), -float(torch.tensor(V).log()))
        return torch.stack([torch.stack([self.rows.get(tuple(row[:t]), flat) for t in
                                         range(before.shape[1] + 1, full.shape[1] + 1)])
                            for row in full.tolist()])

    def logits(self, h):
        return h


def twist_of(values):
    """log psi by prefix, from levels (V^t,) of each prompt; the root's and the leaves' unused."""
    book = {(*prompt, *s): x for prompt, levels in zip(PROMPTS, values, strict=True)
            for t, v in enumerate(levels[1:-1], 1)
            for s, x in zip(exact.texts(V, t).tolist(), v.tolist(), strict=True)}
    return lambda idx: torch.tensor([book[tuple(row)] for row in idx.tolist()], dtype=torch.float64)


def random_twist(seed, sd=1.0):
    return twist_of([[sd * torch.randn(V**t, generator=rng(seed + i)) for t in range(NEW + 1)]
                     for i in range(2)])


def optimal_twist():
    return twist_of([[v / BETA for v in exact.soft_values(world(i)[0], world(i)[2], BETA)]
                     for i in range(2)])


def unbiased(draws, copies):
    """The mean of Z-hat over copies of both prompts is Z within 5 standard errors; others' is not.
    """
    log_z = draws.log_z.view(copies, 2)
    for i in range(2):
        z = (log_z[:, i] - posterior(i)[1]).exp()
        se = z.std() / copies**0.5
        assert abs(z.mean() - 1) < 5 * se, (z.mean(), se)
        other = (posterior(i, 2 * BETA)[1] - posterior(i)[1]).exp()
        assert abs(z.mean() - other) > 5 * se, (z.mean(), other, se)


@pytest.mark.parametrize("proposal, threshold, systematic", [
    ("policy", 0.0, True), ("ref", 0.5, True), ("ref", 1.1, True), ("policy", 0.5, False)])
def test_smc_has_the_mean_z_for_random_twists(proposal, threshold, systematic):
    """5 standard errors, twice: odds 1e-6; without, with some and with constant resampling."""
    target, copies = make(policy=policy()), 500
    draws = smc(target, PROMPTS * copies, 2, rng(11), particles=8, proposal=proposal,
                twist=random_twist(20), threshold=threshold, systematic=systematic)
    unbiased(draws, copies)
    has_the_weighted_law(draws, copies)


@pytest.mark.parametrize("layers", [0, 1])
def test_smc_draws_the_posterior_with_any_critic(layers):
    target = make(policy=policy(layers))
    draws = smc(target, PROMPTS * 500, 3, rng(12), particles=10, proposal="policy")
    has_the_weighted_law(draws, 500)
    unbiased(draws, 500)
    assert (draws.proposals == 10).all() and ((draws.ess > 0.999) & (draws.ess < 10.001)).all()


def test_smc_of_many_particles_is_near_the_posterior_without_weights():
    """As for sir, with all particles of one swarm."""
    draws = smc(make(), PROMPTS, 2000, rng(12), particles=6000, twist=random_twist(20, 0.5))
    drawn = numbers(draws.rollout).view(2, 2000)
    for i in range(2):
        share = torch.bincount(drawn[i], minlength=V**NEW) / 2000
        off = lambda law: (share - law.exp()).abs().sum() / 2  # noqa: E731, B023
        assert off(posterior(i)[0]) < 0.15 < off(posterior(i, 2 * BETA)[0])


@pytest.mark.parametrize("layers", [0, 1])
def test_the_critic_is_read_as_ppo_reads_it(layers):
    """exp(V / beta) with V = policy.values at the prefix, whatever was cached and resampled."""
    target = make(policy=policy(layers))
    values = lambda idx: policy(layers).values(idx, policy(layers)(idx))[:, -1] / BETA  # noqa: E731
    for proposal in ("ref", "policy"):
        a, b = (smc(target, PROMPTS * 5, 8, rng(13), particles=32, proposal=proposal, twist=twist,
                    threshold=0.9) for twist in (None, values))
        assert a.rollout.rows() == b.rollout.rows()
        torch.testing.assert_close(a.log_z, b.log_z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", [functools.partial(sir, m=10), smc], ids=["sir", "smc"])
def test_in_bfloat16_the_evidence_is_about_the_same(sampler):
    """Rounded logits move Z by a few percent; 5 standard errors are added."""
    target = make(policy=policy())
    target.stage.runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    options = {"particles": 10} if sampler is smc else {}
    draws = sampler(target, PROMPTS * 200, 1, rng(16), proposal="policy", **options)
    for i in range(2):
        z = (draws.log_z.view(200, 2)[:, i] - posterior(i)[1]).exp()
        assert abs(z.mean() - 1) < 0.1 + 5 * z.std() / 200**0.5 < 1.2


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.1])
def test_optimal_twist_and_proposal_have_no_variance(threshold):
    levels = [exact.posterior_levels(world(i)[0], exact.soft_values(world(i)[0], world(i)[2], BETA),
                                     BETA) for i in range(2)]
    # at temperature .8 a policy whose logits are .8 log pi* has the law pi*
    best = Levels([[0.8 * x.clamp(min=-80) for x in of_prompt] for of_prompt in levels])
    target, log_z = make(policy=best), torch.stack([posterior(i)[1] for i in range(2)])
    draws = smc(target, PROMPTS * 20, 4, rng(14), particles=16, proposal="policy",
                twist=optimal_twist(), threshold=threshold)
    torch.testing.assert_close(draws.log_z, log_z.repeat(20), rtol=0, atol=2e-5)
    assert (draws.ess > 15.99).all()
    worse = smc(target, PROMPTS * 20, 4, rng(14), particles=16, proposal="policy",
                twist=random_twist(30), threshold=threshold)
    spread = (worse.log_z - log_z.repeat(20)).abs().max()
    assert spread > 0.1 if threshold else spread < 2e-5  # without resampling a twist is nothing


def test_particles_are_resampled_where_their_effective_number_is_low_and_there_alone():
    """At beta 100 and with a flat twist all weights are about 1, until a twist is steep."""
    target = make(beta=100.0)
    flat, steep = random_twist(50, 0.01), random_twist(50, 3.0)
    a, b, c, d, e = (smc(target, PROMPTS * 3, 9, rng(17), particles=16, twist=twist, threshold=x,
                         systematic=False).rollout.rows()
                     for twist, x in ((flat, 0.0), (flat, 0.5), (flat, 1.1), (steep, 0.0),
                                      (steep, 0.5)))
    assert a == b != c and a == d != e


def test_a_better_twist_has_less_variance():
    target, sd = make(), []
    best = optimal_twist()
    for twist in (lambda idx: -best(idx), lambda idx: torch.zeros(len(idx)), best):
        draws = smc(target, PROMPTS[:1] * 200, 1, rng(15), particles=16, twist=twist)
        sd.append((draws.log_z - posterior(0)[1]).std())
    assert sd[0] > 1.2 * sd[1] > 1.2 * 1.2 * sd[2], sd


# -------------------------------------------------------------------------- seeds, chunks, errors
SAMPLERS = {
    "rejection": functools.partial(rejection, r_max=R_MAX),
    "sir": functools.partial(sir, m=20),
    "imh": functools.partial(imh, steps=4),
    "best_of_n": functools.partial(best_of_n, best_of=4),
    "smc": functools.partial(smc, particles=16, proposal="policy"),
    "smc, each for itself": functools.partial(smc, particles=16, systematic=False),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seed_same_texts_in_chunks_of_any_size(name):
    prompts = [PROMPTS[1], PROMPTS[0], [STOP, 2], PROMPTS[1]]  # of different lengths
    a, b, c, d = (SAMPLERS[name](make(policy=policy(), chunk=chunk), prompts, 6, rng(seed))
                  for chunk, seed in ((1024, 3), (1024, 3), (5, 3), (1024, 4)))
    assert a.rollout.rows() == b.rollout.rows() == c.rollout.rows() != d.rollout.rows()
    assert torch.equal(a.score, b.score) and torch.equal(a.score, c.score)
    assert a.score.shape == (24,) and a.proposals.shape == (4,)
    assert a.rollout.n_prompt.tolist() == [3] * 6 + [2] * 12 + [3] * 6
    assert all(row[:k] == p for row, k, p in zip(
        a.rollout.rows(), a.rollout.n_prompt, [p for p in prompts for _ in range(6)], strict=True))
    assert torch.equal(a.score, score_ids(a.rollout.rows()))
    ended = [y[-1] == STOP for y in a.rollout.responses()]
    assert a.rollout.stopped.tolist() == ended
    assert a.rollout.idx.shape == (24, 3 + NEW) and a.rollout.mask.shape == (24, 2 + NEW)
    for x in (a.log_z, a.accepted, a.ess):
        assert x is None or (x.shape == (4,) and x.isfinite().all())


@pytest.mark.parametrize("call, says", [
    (lambda: make(beta=0.0), "beta is 0.0: give a number above 0"),
    (lambda: sir(make(), PROMPTS, 0, rng()), "n is 0: give at least 1"),
    (lambda: sir(make(), PROMPTS, 1, rng(), m=0), "m is 0: give at least 1"),
    (lambda: imh(make(), PROMPTS, 1, rng(), steps=0), "steps is 0: give at least 1"),
    (lambda: sir(make(), PROMPTS, 1, rng(), proposal="best"), "proposal is 'best': give ref, "),
    (lambda: sir(make(), PROMPTS, 1, rng()), "proposal mixture needs a policy"),
    (lambda: sir(make(), [], 1, rng(), proposal="ref"), "0 prompts has 0 tokens"),
    (lambda: best_of_n(make(), [[STOP, 1, 1, 1]], 1, rng()), "has 4 tokens: give prompts of up to"),
    (lambda: smc(make(), PROMPTS, 1, rng()), "smc needs a twist"),
    (lambda: smc(make(policy=reference()), PROMPTS, 1, rng()), "smc needs a twist"),
    (lambda: smc(make(policy=policy()), PROMPTS, 1, rng(), proposal="mixture"), "give ref or"),
    (lambda: smc(make(), PROMPTS, 1, rng(), twist=lambda x: x[:, 0] / 0), "one finite log psi"),
    (lambda: smc(make(), PROMPTS, 1, rng(), twist=lambda x: x / 9), "the twist gave shape"),
])
def test_what_cannot_be_is_said_in_one_line(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_empty_prompt_is_an_error():
    with pytest.raises(UserError, match="an empty prompt"):
        best_of_n(make(), [[STOP], []], 1, rng())


def test_log_weights_of_a_collapsed_policy_stay_bounded_in_the_mixture():
    """w of the mixture is at most 2 exp(r / beta), however far the policy has gone."""
    target = make(policy=shake(ppo.make_policy(reference()), 3.0, 5))
    rollout, score = draw_texts(target.stage, reference(), PROMPTS, 500, rng())
    mixture, alone = (log_weights(target, rollout, score, p) for p in ("mixture", "policy"))
    bound = score.double() / BETA + torch.tensor(2.0).log()
    assert (mixture <= bound + 1e-6).all() and (alone > bound + 1).any()
