"""kl.py and kl_table.py against loops, finite differences and identities, and PPO's use of them.

The trees are in float64; the world of test_ppo.py, which has ragged responses, is in float32.
"""

import itertools
import math
from dataclasses import replace

import pytest
import test_ppo
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ppo import (
    CONFIG,
    CPU,
    PROMPTS,
    STOP,
    everything,
    exact,
    gradient,
    log_p,
    make_ref,
    nudge,
    scores,
    slow_gae,
)

from nanokl import UserError, kl_table
from nanokl.exact import joint
from nanokl.exact import kl as exact_kl
from nanokl.kl import (
    MEANING,
    MYOPIC,
    KLConfig,
    at_last,
    estimates,
    k1,
    k2,
    k3,
    kl_loss,
    paid_in_reward,
)
from nanokl.ppo import collect, make_policy, minibatch_loss, sample_rollouts
from nanokl.runtime import generator
from nanokl.trainers import TrainerConfig

TREES = [(4, 3, 0), (2, 5, 1), (5, 2, 2), (3, 1, 3)]  # V, T, seed
RIGHT = [("k1", "reward", "token"), ("k1", "reward", "sequence"), ("k2", "loss", "sequence"),
         ("exact", "both", "token")]  # fmt: skip
WRONG = [choice for choice in MEANING if choice not in RIGHT]

pytestmark = pytest.mark.usefixtures("one_thread")


def flags(choice) -> dict:
    return dict(zip(("kl_estimator", "kl_place", "kl_per"), choice, strict=True))


def of(world, *choice, gamma=1.0):
    """The gradient that PPO follows on a tree."""
    return world.gradient(kl_table.surrogate(world, KLConfig(**flags(choice)), gamma=gamma))


def close(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


# -------------------------------------------------------------------------------- estimators
def test_estimators_by_hand():
    logp, ref = torch.tensor([0.5, 0.25, 0.5]).log(), torch.tensor([0.25, 0.5, 0.5]).log()
    two = math.log(2)
    torch.testing.assert_close(k1(logp, ref), torch.tensor([two, -two, 0.0]))
    torch.testing.assert_close(k2(logp, ref), torch.tensor([two**2 / 2, two**2 / 2, 0.0]))
    torch.testing.assert_close(k3(logp, ref), torch.tensor([0.5 - 1 + two, 2 - 1 - two, 0.0]))


@settings(max_examples=50, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_k2_and_k3_are_never_negative(a, b):
    """k3 also where the log-ratio is tiny: exp(-x) - 1 + x by itself would lose all its digits."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert k2(a, b) >= 0 and k3(a, b) >= -1e-15 and k1(a, b) == -k1(b, a)
    tiny = torch.tensor(1e-5, dtype=torch.float64)
    assert k3(tiny, tiny * 0).item() == pytest.approx(5e-11, rel=1e-4)


@pytest.mark.parametrize("V, T, seed", TREES)
def test_which_estimates_have_the_kl_as_their_mean(V, T, seed):
    """By a loop over all texts; k2 is off, and the sd of the table is that of the loop."""
    world = kl_table.make_world(V, T, seed=seed)
    sums = {name: [] for name in ("k1", "k2", "k2 sequence", "k3", "k3 sequence", "exact")}
    p, true = [], 0.0
    for y in itertools.product(range(V), repeat=T):
        x, steps, total, s = [], [], 0.0, 0
        for t, a in enumerate(y):
            pi, ref = world.policy[t][s].tolist(), world.ref[t][s].tolist()
            x.append(pi[a] - ref[a])
            steps.append(sum(math.exp(u) * (u - v) for u, v in zip(pi, ref, strict=True)))
            total, s = total + pi[a], s * V + a
        p.append(math.exp(total))
        true += p[-1] * sum(x)
        k3_of = lambda u: math.exp(-u) - 1 + u  # noqa: E731
        for name, value in (("k1", sum(x)), ("k2", sum(u * u / 2 for u in x)),
                            ("k2 sequence", sum(x) ** 2 / 2), ("k3", sum(map(k3_of, x))),
                            ("k3 sequence", k3_of(sum(x))), ("exact", sum(steps))):  # fmt: skip
            sums[name].append(value)
    assert world.kl().item() == pytest.approx(true, abs=1e-12) and true > 0.05
    for (name, mean, sd), values in zip(kl_table.values(world), sums.values(), strict=True):
        expected = math.fsum(w * v for w, v in zip(p, values, strict=True))
        var = math.fsum(w * (v - expected) ** 2 for w, v in zip(p, values, strict=True))
        assert mean == pytest.approx(expected, abs=1e-12), name
        assert sd == pytest.approx(math.sqrt(var), abs=1e-9), name
        unbiased = abs(mean - true) < 1e-12
        assert unbiased == (not name.startswith("k2")), name


def ragged():
    """Three rows: the whole width, one that starts late and ends early, a single token."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]]).bool()
    logp, ref, kl = torch.randn(3, 3, 4, generator=generator(0), dtype=torch.float64)
    spoilt = [torch.where(mask, x, 1e6 * (1 + x.abs())) for x in (logp, ref, kl)]
    return mask, (logp, ref, kl), spoilt


@pytest.mark.parametrize("choice", MEANING, ids=" ".join)
def test_nothing_outside_the_mask_counts(choice):
    """Estimate, reward and loss are those of loops over the tokens that count."""
    how, (mask, (logp, ref, kl), spoilt) = KLConfig(**flags(choice)), ragged()
    kinds = {"k1": k1, "k2": k2, "k3": k3}
    paid, total, got = torch.zeros_like(logp), 0.0, estimates(*spoilt, mask, how)
    for i, row in enumerate(mask):
        where = row.nonzero()[:, 0].tolist()
        if choice[0] == "exact":
            tokens = kl[i, where]
            paid[i, where[:-1]] = tokens[1:]  # what the next step will cost
        else:
            tokens = kinds[choice[0]](logp[i, where], ref[i, where])
            paid[i, where] = tokens
        if choice[2] == "sequence":
            whole = kinds[choice[0]](logp[i, where].sum(), ref[i, where].sum())
            tokens, paid[i] = whole[None], 0
            paid[i, where[-1]] = whole
            torch.testing.assert_close(got[i, 0], whole)
        else:
            assert torch.equal(got[i, where], tokens) and not got[i][~row].any()
        total += tokens.sum() * (i + 1)
    paid = paid * (choice[1] != "loss")
    torch.testing.assert_close(paid_in_reward(*spoilt, mask, how), paid)
    price = torch.tensor([[1.0], [2.0], [3.0]])
    loss = kl_loss(*spoilt, mask, how, price=price)
    torch.testing.assert_close(loss, total / mask.sum())
    assert kl_loss(*spoilt, mask & False, how, price=1.0) == 0


def test_at_last_by_hand():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert at_last(torch.tensor([5.0, 7.0]), mask).tolist() == [[0, 0, 5, 0], [0, 0, 0, 7]]


# -------------------------------------------------------------------- gradients, on trees
@pytest.mark.parametrize("V, T, seed", TREES)
def test_the_true_gradient_is_that_of_finite_differences(V, T, seed):
    world = kl_table.make_world(V, T, seed=seed)
    true, flat = world.gradient(world.kl()), []
    with torch.no_grad():
        for level in world.logits:
            for k in range(level.numel()):
                values = []
                for step in (1e-5, -2e-5):
                    level.view(-1)[k] += step
                    values.append(world.kl().item())
                level.view(-1)[k] += 1e-5
                flat.append((values[0] - values[1]) / 2e-5)
    torch.testing.assert_close(true, torch.tensor(flat, dtype=true.dtype), rtol=0, atol=1e-8)


@pytest.mark.parametrize("V, T, seed", TREES)
def test_the_gradient_of_each_choice(V, T, seed):
    """What theory says of each, to 1e-10."""
    world = kl_table.make_world(V, T, seed=seed)
    true = world.gradient(world.kl())
    assert true.norm() > 0.1
    for choice in RIGHT:
        close(of(world, *choice), true)
    for per in ("token", "sequence"):
        close(of(world, "k1", "loss", per), torch.zeros_like(true))
    forward = world.gradient(exact_kl(joint(world.ref), joint(world.policy)))
    close(of(world, "k3", "loss", "sequence"), forward)
    close(of(world, "k3", "reward", "sequence"), true - forward)
    # Of each step alone, at the states that the policy visits, whose number it cannot change.
    logp, _, kl = world.tokens()
    own = world.gradient((logp.detach().sum(1).exp() * kl.sum(1)).sum())
    at = torch.cat([joint(world.policy[:t]).exp() if t else torch.ones(1) for t in range(T)])
    steps = [(q.exp() * (q - x)).sum(1) for q, x in zip(world.ref, world.policy, strict=True)]
    own_forward = world.gradient((at.detach() * torch.cat(steps)).sum())
    for myopic in (of(world, "k2", "loss", "token"), of(world, "exact", "loss", "token"),
                   of(world, *RIGHT[0], gamma=0.0)):  # fmt: skip
        close(myopic, own)
    close(of(world, "exact", "reward", "token"), true - own)
    close(of(world, "k3", "loss", "token"), own_forward)
    close(of(world, "k3", "reward", "token"), true - own_forward)
    # grad E f = E f grad log pi + E grad f: what k2 in the reward follows is the first part of it.
    for per, path in (("sequence", true), ("token", own)):
        logp, logp_ref, _ = world.tokens()
        x = logp - logp_ref
        k2s = x.sum(1).square() / 2 if per == "sequence" else (x.square() / 2).sum(1)
        mean = (logp.sum(1).exp() * k2s).sum()
        close(of(world, "k2", "reward", per), world.gradient(mean) - path)


def test_signs_of_the_wrong_ones():
    """Over 20 trees: the myopic ones point the right way, those in the reward either way."""
    x = torch.stack([kl_table.gradients(kl_table.make_world(seed=s)) for s in range(20)])
    names = [" ".join(name.split()) for name, *_ in kl_table.choices()]
    rows = dict(zip(names, x.unbind(1), strict=True))
    for name in ("k2 loss token", "exact loss token", "k3 loss token", "k3 loss sequence",
                 "k1 reward, --gamma 0"):  # fmt: skip
        error, cosine = rows[name].unbind(1)
        assert (error > 0.03).all() and (cosine > 0.4).all() and (cosine < 0.9999).all(), name
    for name in ("k2 reward token", "k3 reward token", "k3 reward sequence", "exact reward token"):
        cosine = rows[name][:, 1]
        assert cosine.min() < -0.6 and cosine.max() > 0.7, name
    for per in ("token", "sequence"):
        error, cosine = rows[f"k1 loss {per}"].unbind(1)
        assert cosine.isnan().all() and (error - 1).abs().max() < 1e-10


def test_near_the_reference_k2_in_the_reward_has_hardly_any_gradient():
    """True and k2's in the loss fall with the distance, k2's and k3's in the reward a step more."""
    sizes = {}
    for move in (0.01, 0.001):
        world = kl_table.make_world(move=move)
        sizes[move] = [of(world, *choice).norm().item() for choice in
                       (RIGHT[0], ("k2", "reward", "sequence"), ("k3", "reward", "sequence"))]
    first, *second = (a / b for a, b in zip(*sizes.values(), strict=True))
    assert 9.5 < first < 10.5 and all(95 < x < 105 for x in second)


def test_a_state_may_be_left_out_of_the_reward_where_its_kl_is_known():
    """A step's own exact KL in its reward is a baseline: with it the gradient is the same."""
    world = kl_table.make_world()
    _, _, kl = (x.detach() for x in world.tokens())
    to_go, gradients = kl.flip(1).cumsum(1).flip(1), []
    for nats in (to_go, to_go - kl):
        logp = world.tokens()[0]
        weight = logp.detach().sum(1, keepdim=True).exp()
        gradients.append(world.gradient((weight * nats * logp).sum()))
    close(*gradients)
    close(gradients[1], of(world, "exact", "reward", "token"))


# ------------------------------------------------------------------------------------- in PPO
def config(choice, **more):
    return replace(CONFIG, **flags(choice), **more)


@pytest.mark.parametrize("choice", [*RIGHT, ("exact", "loss", "token"), ("k2", "loss", "token")],
                         ids=" ".join)
def test_both_terms_together_follow_the_objective(choice):
    """Each response as a minibatch of its own, weighed by its probability and its tokens.

    Advantages are whitened, by a factor of 1 / 5 or so: the KL in the loss must be, too. The
    gradient is then that of E[score] - beta KL, over the sd of the advantages that were whitened.
    """
    ref, world, beta = make_ref(), everything(), 2.0
    policy, how = nudge(make_policy(ref)), config(choice, lam=1.0, value_coef=0.0)
    score = 5 * scores(world)
    x = collect(policy, ref, world, score, [torch.arange(170)], how, CPU, beta=beta)
    weight = log_p(policy, world).detach().exp() * world.mask.sum(1) / len(PROMPTS)
    losses = [minibatch_loss(policy, policy, x, torch.tensor([i]), how, CPU)[0] for i in range(170)]
    got = -gradient((torch.stack(losses) * weight).sum(), policy)
    values = exact(policy, ref, beta)
    expected = gradient(5 * values["reward"] - beta * values["kl"], policy)
    nats = paid_in_reward(x.logp, x.logp_ref, x.kl, world.mask, how)
    reward = -beta * nats.double() + at_last(score, world.mask)
    sd = slow_gae(reward, x.value.double(), world.mask, 1.0, 1.0)[0][world.mask].std(unbiased=False)
    assert sd > 3
    miss = (got * sd - expected).norm() / expected.norm()
    assert miss < 1e-5 if choice in RIGHT else miss > 0.01


@pytest.mark.parametrize("choice", [("exact", "both", "token"), ("k2", "loss", "sequence")],
                         ids=" ".join)
def test_two_ranks_average_to_the_gradient_of_one(choice):
    ref, how = make_ref(), config(choice)
    policy = nudge(make_policy(ref))
    rollout = sample_rollouts(policy, PROMPTS * 8, how, CPU, stop=STOP, rng=generator(1))
    x = collect(policy, ref, rollout, scores(rollout), [torch.arange(16)], how, CPU, beta=0.3)
    rows = torch.arange(15)
    one, *two = (gradient(minibatch_loss(policy, policy, x, rows, how, runtime)[0], policy)
                 for runtime in (CPU, replace(CPU, world=2), replace(CPU, rank=1, world=2)))
    torch.testing.assert_close(sum(two) / 2, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("choice", MEANING, ids=" ".join)
def test_each_choice_makes_a_step(choice):
    """The KL in the loss is 0 at the reference, and what the default does not need it has not."""
    ref, how, rows = make_ref(), config(choice), torch.arange(32)
    policy, in_loss = make_policy(ref), choice[1] != "reward"
    sgd = torch.optim.SGD(policy.parameters(), lr=0.02)
    rollout = sample_rollouts(policy, PROMPTS * 16, how, CPU, stop=STOP, rng=generator(1))
    x = collect(policy, ref, rollout, scores(rollout), [rows], how, CPU, beta=0.5)
    assert (x.ref is not None) == (in_loss and choice[0] == "exact")
    before = [p.clone() for p in policy.parameters()]
    for start in (True, False):
        loss, info = minibatch_loss(policy, policy, x, rows, how, CPU)
        assert loss.isfinite() and ("kl_loss" in info) == in_loss
        if in_loss:
            assert (info["kl_loss"] == 0) == start
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert any(not torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert all(p.grad is None for p in ref.parameters())


def test_where_short_runs_end(monkeypatch):
    """Share of what can be gained over the reference, after 12 batches at beta .5.

    With four seeds of the samples: both .870 to .878; the reward alone -2.6 to -6.4, far below 0.
    """
    ref, share = make_ref(), {}
    start = exact(ref, ref, 0.5)
    for place in ("both", "reward"):
        monkeypatch.setattr(test_ppo, "CONFIG", config(("exact", place, "token")))
        end = exact(test_ppo.train(ref, beta=0.5, steps=12), ref, 0.5)
        gain, most = (x - start["objective"] for x in (end["objective"], end["best"]))
        share[place] = (gain / most).item()
    assert 0.6 < share["both"] <= 1 and share["reward"] < 0


# -------------------------------------------------------------------------------------- flags
def test_every_choice_is_possible_or_a_one_line_error():
    possible = set()
    for choice in itertools.product(("k1", "k2", "k3", "exact"), ("reward", "loss", "both"),
                                    ("token", "sequence")):  # fmt: skip
        try:
            how = TrainerConfig(**flags(choice))
        except UserError as error:
            says = "no exact KL" if choice[0] == "exact" else "charged twice"
            assert says in str(error) and "choose" in str(error) and "\n" not in str(error)
            continue
        possible.add(choice)
        assert (how.kl_warning is None) == (choice in RIGHT)
        assert how.kl_placement.startswith(f"{choice[0]} per {choice[2]} in the ")
        warning = how.kl_warning or ""
        assert "\n" not in warning and (not warning or MEANING[choice] in warning)
    assert possible == set(MEANING) and len(WRONG) == 11
    assert TrainerConfig().kl_choice == RIGHT[0]
    with pytest.raises(UserError, match="cannot be k4 reward token: choose one of k1 reward token"):
        KLConfig(kl_estimator="k4")


@pytest.mark.parametrize("choice", MEANING, ids=" ".join)
def test_what_is_said_below_gamma_1_is_so(choice):
    """On the tree a choice is right exactly if it is said to be, and at gamma 0 as said."""
    world = kl_table.make_world()
    true = world.gradient(world.kl())
    for gamma in (1.0, 0.9, 0.0):
        how = TrainerConfig(**flags(choice), gamma=gamma)
        off = (of(world, *choice, gamma=gamma) - true).norm() / true.norm()
        assert (off < 1e-10) == ("(right" in how.kl_placement) == (how.kl_warning is None)
        assert off < 1e-10 or off > 1e-3
        if gamma == 0 and choice in RIGHT and choice[1] != "loss":
            assert how.kl_placement.endswith(f"({MYOPIC})") and MYOPIC in how.kl_warning
    rows = {name: (how, gamma, meaning) for name, how, gamma, meaning in kl_table.choices()}
    how, gamma, meaning = rows["k1    reward, --gamma 0"]
    assert TrainerConfig(**vars(how), gamma=gamma).kl_placement.endswith(f"({meaning})")


def test_the_other_methods_charge_it_by_their_own_formula():
    """They say which, GRPO with a warning, and refuse the flags that they do not heed."""
    said = {name: TrainerConfig(method=name) for name in ("rloo", "grpo", "dpo", "dpg", "sft")}
    assert len({how.kl_placement for how in said.values()}) == 5
    for method, how in said.items():
        assert how.kl_placement != TrainerConfig().kl_placement
        assert (how.kl_warning is None) == (method != "grpo") == ("(right)" in how.kl_placement)
        for name, value in (("estimator", "k2"), ("place", "loss"), ("per", "sequence")):
            with pytest.raises(UserError, match=f"kl_{name} {value}: only ppo heeds") as error:
                TrainerConfig(method=method, **{f"kl_{name}": value})
            assert f"{method} charges" in str(error.value) and "\n" not in str(error.value)
    assert said["grpo"].kl_placement == TrainerConfig(
        kl_estimator="k3", kl_place="loss").kl_placement
    assert said["grpo"].kl_warning.startswith("warning: KL as k3 per token in the loss (wrong")


def test_the_readme_shows_the_table():
    text = kl_table.table()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert f"```\n{text}\n```\n" in (ROOT / "README.md").read_text(encoding="utf-8")
