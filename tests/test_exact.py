"""exact.py against loops over texts, recursions over prefixes, tuples for best-of-n, closed forms.

The loops know a world as `p[prefix][token]` in plain floats; nothing of exact.py is used in them.
"""

import itertools
import math

import pytest
import torch

from nanokl import exact
from nanokl.gpt import GPT, GPTConfig

STOP = 1
WORLDS = [  # V, T, beta, stop, number of different rewards (None: all differ), seed
    (2, 1, 1.0, None, None, 0), (4, 3, 0.5, None, None, 1), (3, 4, 0.1, STOP, None, 2),
    (5, 2, 2.0, None, 3, 3), (3, 3, 0.05, STOP, 2, 4), (4, 3, 30.0, None, 1, 5),
]  # fmt: skip
each_world = pytest.mark.parametrize("world", WORLDS, ids=lambda w: "V{}-T{}-beta{}".format(*w))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def random_levels(V, T, generator, *, stop=None, sd=1.5):
    """A random policy of the tree."""
    levels = [torch.randn(V**t, V, generator=generator, dtype=torch.float64) for t in range(T)]
    levels = [(sd * x).log_softmax(1) for x in levels]
    return levels if stop is None else [exact.absorb(x, t, stop) for t, x in enumerate(levels)]


def make(world):
    """ref and policy levels, rewards (V^T,), beta."""
    V, T, beta, stop, n_levels, seed = world
    generator = rng(seed)
    ref, policy = (random_levels(V, T, generator, stop=stop) for _ in range(2))
    r = torch.randn(V**T, generator=generator, dtype=torch.float64)
    if n_levels is not None:
        r = r[torch.randint(n_levels, (V**T,), generator=generator)]
    return ref, policy, r, beta


def table(levels):
    """p[prefix][token] of a policy, in plain floats."""
    V, p = levels[0].shape[1], {}
    for t, level in enumerate(levels):
        for i, s in enumerate(itertools.product(range(V), repeat=t)):
            p[s] = [math.exp(x) for x in level[i].tolist()]
    return p


def law(p, V, T):
    """{text: probability}, by multiplication along each text."""
    return {y: math.prod(p[y[:t]][y[t]] for t in range(T))
            for y in itertools.product(range(V), repeat=T)}


def slow_kl(p, q):
    return sum(a * math.log(a / q[y]) for y, a in p.items() if a > 0)


def near(a, b, tolerance=1e-10):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape and torch.isfinite(b).all(), (a, b)
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), (a - b).abs().max()


@pytest.mark.parametrize(("V", "T"), [(2, 0), (1, 3), (3, 1), (3, 3)])
def test_texts_in_lexicographic_order(V, T):
    assert exact.texts(V, T).tolist() == [list(y) for y in itertools.product(range(V), repeat=T)]


@each_world
def test_everything_against_loops_over_texts(world):
    (V, T, beta, *_), (ref, policy, r, _) = world, make(world)
    p, q = law(table(ref), V, T), law(table(policy), V, T)
    reward = dict(zip(p, r.tolist(), strict=True))
    z = sum(p[y] * math.exp(reward[y] / beta) for y in p)
    star = {y: p[y] * math.exp(reward[y] / beta) / z for y in p}
    J = sum(q[y] * reward[y] for y in q) - beta * slow_kl(q, p)
    logp, logp_ref = exact.joint(policy), exact.joint(ref)
    pi_star, log_z = exact.posterior(logp_ref, r, beta)
    near(logp_ref.exp(), list(p.values()))
    near(log_z, math.log(z))
    near(pi_star.exp(), list(star.values()))
    near(exact.kl(logp, logp_ref), slow_kl(q, p))
    near(exact.kl(pi_star, logp), slow_kl(star, q))
    near(exact.objective(logp, logp_ref, r, beta), J)
    near(exact.gap(logp, logp_ref, r, beta), math.log(z) - J / beta)


@each_world
def test_identities(world):
    """J = beta log Z - beta KL(pi || pi*);  KL(pi* || ref) = E*[r] / beta - log Z;  laws sum to 1.

    And the two bounds: E_pi[log w] = log Z - KL(pi || pi*), E*[log w] = log Z + KL(pi* || pi).
    """
    ref, policy, r, beta = make(world)
    logp, logp_ref = exact.joint(policy), exact.joint(ref)
    pi_star, log_z = exact.posterior(logp_ref, r, beta)
    for x in (logp, logp_ref, pi_star):
        near(x.logsumexp(0), 0)
    apart = exact.kl(logp, pi_star)
    near(exact.objective(logp, logp_ref, r, beta), beta * log_z - beta * apart)
    near(exact.gap(logp, logp_ref, r, beta), apart)
    near(exact.gap(pi_star, logp_ref, r, beta), 0)
    near(exact.kl(pi_star, logp_ref), exact.expectation(pi_star, r) / beta - log_z)
    log_w = r / beta + logp_ref - logp
    near(exact.expectation(logp, log_w), log_z - apart)
    near(exact.expectation(pi_star, log_w), log_z + exact.kl(pi_star, logp))


@each_world
def test_a_reward_that_is_shifted_shifts_log_z_alone(world):
    ref, policy, r, beta = make(world)
    logp, logp_ref = exact.joint(policy), exact.joint(ref)
    (a, log_z), (b, shifted) = (exact.posterior(logp_ref, x, beta) for x in (r, r + 0.7))
    near(a.exp(), b.exp())
    near(shifted, log_z + 0.7 / beta)
    near(exact.gap(logp, logp_ref, r + 0.7, beta), exact.gap(logp, logp_ref, r, beta), 1e-9)


@each_world
def test_soft_values_are_log_z_of_every_prefix_and_give_the_posterior(world):
    (V, T, beta, *_), (ref, _, r, _) = world, make(world)
    p = table(ref)
    reward = dict(zip(itertools.product(range(V), repeat=T), r.tolist(), strict=True))

    def value(s):
        if len(s) == T:
            return reward[s]
        after = [(p[s][a], value((*s, a))) for a in range(V)]
        return beta * math.log(sum(x * math.exp(v / beta) for x, v in after))

    values = exact.soft_values(ref, r, beta)
    for t, level in enumerate(values):
        near(level, [value(s) for s in itertools.product(range(V), repeat=t)])
    pi_star, log_z = exact.posterior(exact.joint(ref), r, beta)
    near(values[0][0], beta * log_z)
    levels = exact.posterior_levels(ref, values, beta)
    near(exact.joint(levels).exp(), pi_star.exp())
    for level in levels:  # a law at each prefix, those that the reference never says included
        near(level.logsumexp(1), torch.zeros(len(level)))


@each_world
def test_policy_values_are_what_is_still_to_come(world):
    (V, T, beta, *_), (ref, policy, r, _) = world, make(world)
    p, q = table(ref), table(policy)
    reward = dict(zip(itertools.product(range(V), repeat=T), r.tolist(), strict=True))

    def value(s):
        if len(s) == T:
            return reward[s]
        return sum(x * (value((*s, a)) - beta * math.log(x / p[s][a]))
                   for a, x in enumerate(q[s]) if x > 0)

    values = exact.policy_values(policy, ref, r, beta)
    for t, level in enumerate(values):
        near(level, [value(s) for s in itertools.product(range(V), repeat=t)])
    near(values[0][0], exact.objective(exact.joint(policy), exact.joint(ref), r, beta))
    soft = exact.soft_values(ref, r, beta)  # no policy is worth more, and the posterior is worth it
    assert all((a <= b + 1e-10).all() for a, b in zip(values, soft, strict=True))
    best = exact.policy_values(exact.posterior_levels(ref, soft, beta), ref, r, beta)
    for a, b in zip(best, soft, strict=True):
        near(a, b)


def test_after_a_stop_nothing_else_is_said():
    V, T = 3, 4
    ref, policy, r, beta = make((V, T, 0.1, STOP, None, 2))
    late = [STOP in y and any(a != STOP for a in y[y.index(STOP) :])
            for y in itertools.product(range(V), repeat=T)]
    impossible = torch.tensor(late)
    assert 0 < impossible.sum() < V**T
    for logp in (exact.joint(ref), exact.posterior(exact.joint(ref), r, beta)[0],
                 exact.best_of_n(exact.joint(ref), r, 4)):
        assert ((logp == -torch.inf) == impossible).all()
    assert exact.kl(exact.joint(random_levels(V, T, rng(0))), exact.joint(ref)) == torch.inf


@pytest.mark.parametrize("stop", [None, STOP])
@pytest.mark.parametrize("T", [1, 3])
def test_levels_of_a_gpt_are_its_next_token_laws_prefix_by_prefix(T, stop):
    V, prompt, temperature = 4, [3, 0], 0.7
    model = GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=1, n_embd=8), rng(0))
    model = model.double().eval()
    with torch.no_grad():
        for x in model.parameters():  # it starts uniform
            x.add_(torch.randn(x.shape, generator=rng(1), dtype=x.dtype))
    levels = exact.levels_of(model, prompt, T, stop=stop, temperature=temperature)
    assert [tuple(level.shape) for level in levels] == [(V**t, V) for t in range(T)]
    for t, level in enumerate(levels):
        for i, s in enumerate(itertools.product(range(V), repeat=t)):
            with torch.no_grad():
                z = [model.head.weight[a] @ model(torch.tensor([[*prompt, *s]]))[0, -1] for a in
                     range(V)]
            z = [math.exp(x.item() / temperature) for x in z]
            p = [x / sum(z) for x in z]
            if stop is not None and stop in s:
                p = [float(a == stop) for a in range(V)]
            near(level[i].exp(), p)
    assert levels[-1].exp().max() > 0.5 and levels[-1].exp().std() > 0.05  # no uniform law
    near(exact.joint(levels).logsumexp(0), 0)


def test_kl_and_its_gradient_where_something_is_impossible():
    """Infinite only where p says what q cannot; -inf logits have gradient 0, not NaN."""
    logits = torch.tensor([0.3, -torch.inf, -0.2], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    p = logits.log_softmax(0)
    (grad,) = torch.autograd.grad(exact.kl(p, q), logits)
    x, step = 0.3, 1e-6

    def slow(a):
        u = math.exp(a) / (math.exp(a) + math.exp(-0.2))
        return u * math.log(u / 0.5) + (1 - u) * math.log((1 - u) / 0.25)

    near(grad, [(slow(x + step) - slow(x - step)) / (2 * step), 0,
                -(slow(x + step) - slow(x - step)) / (2 * step)], 1e-8)
    assert exact.kl(q, p) == torch.inf and exact.kl(p, p) == 0
    assert exact.kl(p.detach(), torch.tensor([0.5, 0, 0.5]).log()) < 1


@pytest.mark.parametrize("top", [0.8, 0.0, -0.3])
def test_beta_zero_is_the_limit_of_small_betas(top):
    generator = rng(6)
    ref, policy = (exact.joint(random_levels(3, 3, generator, stop=STOP)) for _ in range(2))
    r = torch.randint(4, (27,), generator=generator).double() / 2
    r = r - r[ref > -torch.inf].max() + top
    r[ref == -torch.inf] = 9.0  # the highest reward is for what the reference never says
    pi_star, log_z = exact.posterior(ref, r, 0)
    best = (r == top) & (ref > -torch.inf)
    assert 1 < best.sum() < 27
    near(pi_star.exp(), torch.where(best, ref.exp(), 0) / ref.exp()[best].sum())
    close, log_z_close = exact.posterior(ref, r, 0.01)
    near(close.exp(), pi_star.exp(), 1e-10)
    if top == 0:
        near(log_z, log_z_close)
    else:
        assert log_z == math.copysign(math.inf, top)
    assert exact.gap(policy, ref, r, 0) == torch.inf
    near(exact.gap(pi_star, ref, r, 0), 0)
    collapsed = torch.full_like(ref, -torch.inf)
    collapsed[best.nonzero()[0]] = 0.0  # all on one of the best: optimal in reward, not pi*
    near(exact.gap(collapsed, ref, r, 0), -pi_star[best][0])
    near(exact.gap(collapsed, ref, r, 0.01), -pi_star[best][0], 1e-9)
    near(exact.objective(collapsed, ref, r, 0), top)


@each_world
def test_kl_and_reward_of_the_posterior_rise_as_beta_falls_at_slope_beta(world):
    """d log Z / d(1/beta) = E*[r], its second derivative Var*[r]; dR*/dKL = beta on the frontier.

    1/beta enters by autograd; the frontier's slope is dE*[r] over dKL(pi* || ref), both to 1/beta.
    """
    ref, _, r, beta = make(world)
    logp_ref = exact.joint(ref)
    inverse = torch.tensor(1 / beta, dtype=torch.float64, requires_grad=True)
    pi_star, log_z = exact.posterior(logp_ref, r, 1 / inverse)
    (first,) = torch.autograd.grad(log_z, inverse, create_graph=True)
    (second,) = torch.autograd.grad(first, inverse, retain_graph=True)
    mean = exact.expectation(pi_star, r)
    variance = exact.expectation(pi_star, (r - mean) ** 2)
    near(first.detach(), mean.detach())
    near(second, variance.detach())
    (d_reward,) = torch.autograd.grad(mean, inverse, retain_graph=True)
    (d_kl,) = torch.autograd.grad(exact.kl(pi_star, logp_ref), inverse)
    near(d_reward, variance.detach())
    near(beta * d_kl, d_reward, 1e-9)
    points = [exact.posterior(logp_ref, r, b)[0] for b in (64.0, 8.0, 2.0, 1.0, 0.3, 0.1, 0)]
    for x in ([exact.kl(p, logp_ref) for p in points], [exact.expectation(p, r) for p in points]):
        steps = torch.stack(x).diff()
        assert (steps >= -1e-12).all()
        assert (steps > 1e-6).any() or len(r.unique()) == 1


@pytest.mark.parametrize("beta", [4.0, 1.0, 0.5])
def test_gaussian_rewards_have_closed_forms(beta):
    """Of r = m + s x, x ~ N(0, 1): log Z = m/b + KL*, KL* = (s/b)^2 / 2, E*[r] = m + s sqrt(2 KL*).

    One token of 4,801 on a grid: sums of a Gaussian over a grid are its integral to 1e-15.
    """
    m, s = 0.3, 1.7
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    logp_ref, r = (-x.square() / 2).log_softmax(0), m + s * x
    pi_star, log_z = exact.posterior(logp_ref, r, beta)
    nats = s**2 / (2 * beta**2)
    near(log_z, m / beta + nats)
    near(exact.kl(pi_star, logp_ref), nats)
    near(exact.expectation(pi_star, r), m + s * math.sqrt(2 * nats))
    near(exact.gap(logp_ref, logp_ref, r, beta), nats)


def slow_best_of_n(p, reward, n):
    """The law of the best of n by all n-tuples of texts, ties split evenly."""
    out = dict.fromkeys(p, 0.0)
    for ys in itertools.product(p, repeat=n):
        top = max(reward[y] for y in ys)
        best = [y for y in ys if reward[y] == top]
        for y in best:
            out[y] += math.prod(p[y] for y in ys) / len(best)
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("world", [(2, 3, 1, None, 3, 0), (3, 2, 1, None, None, 1),
                                   (3, 2, 1, STOP, 2, 2), (2, 2, 1, None, 1, 3)])
def test_best_of_n_against_all_tuples(world, n):
    (V, T, *_), (ref, _, r, _) = world, make(world)
    p = law(table(ref), V, T)
    reward = dict(zip(p, r.tolist(), strict=True))
    near(exact.best_of_n(exact.joint(ref), r, n).exp(),
         list(slow_best_of_n(p, reward, n).values()))


@each_world
def test_best_of_n_is_a_law_within_its_bounds_and_below_the_posterior_at_equal_kl(world):
    """KL(best-of-n || ref) <= log n - (n - 1)/n, and <= -log ref(highest reward)."""
    ref, _, r, _ = make(world)
    logp_ref = exact.joint(ref)
    top = r[logp_ref > -torch.inf].max()
    at_best = logp_ref.exp()[r == top].sum().log()
    for n in (1, 2, 16, 4096):
        best = exact.best_of_n(logp_ref, r, n)
        nats, mean = exact.kl(best, logp_ref), exact.expectation(best, r)
        near(best.logsumexp(0), 0)
        assert nats <= math.log(n) - (n - 1) / n + 1e-12 and nats <= -at_best + 1e-12
        # the frontier: E[r] <= beta KL + beta log Z for every beta
        for beta in (8.0, 1.0, 0.3, 0.1, 0.02):
            assert mean <= beta * (nats + exact.posterior(logp_ref, r, beta)[1]) + 1e-12


def test_best_of_n_of_tiny_masses_keeps_its_digits():
    """n = 400 of p = (1e-3, 1 - 1e-3 - 1e-15, 1e-15): all in logs, by hand."""
    p = torch.tensor([1e-3, 1 - 1e-3, 1e-15], dtype=torch.float64)
    best = exact.best_of_n(p.log(), torch.tensor([0.0, 1.0, 2.0]).double(), 400)
    near(best[0], 400 * math.log(1e-3))
    near(best[2], math.log(4e-13), 1e-9)
