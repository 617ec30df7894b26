"""generate.py against recomputed log-probs, brute force and a table model of known probabilities.

Statistical tests have a fixed seed; the odds given are of a false alarm under a new one.
"""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transformer import one_thread, randomise, rng, tokens  # noqa: F401

from nanokl import UserError
from nanokl import generate as generate_module
from nanokl.generate import Compiled, generate, sample, truncate
from nanokl.gpt import GPT, PRESETS, GPTConfig
from nanokl.layers import Linear
from nanokl.rollout import Rollout
from nanokl.tokenizer import CHAR_PATTERN, train_bpe

SIZES = {"vocab_size": 29, "block_size": 24, "n_layer": 2, "n_head": 3, "n_embd": 12}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3, 2], [3, 8]]
EDGES = [0.0, 2.0**-24, 0.5, 1 - 2.0**-24]  # the least and the greatest torch.rand, float32


class Table:
    """The next token depends on the last one only: p[last] (V, V). Nothing to learn or cache."""

    def __init__(self, p, block_size=64):
        self.logp = torch.tensor(p).log()
        self.config = SimpleNamespace(block_size=block_size)
        self.head = SimpleNamespace(weight=self.logp)

    def new_cache(self, batch, length):
        return SimpleNamespace(keep=lambda rows: None)

    def __call__(self, idx, cache=None):
        return idx

    def logits(self, h):
        return self.logp[h] + 3.0  # not normalised


def cycle(V=5):
    """After token i comes i + 1, for certain."""
    return Table(np.roll(np.eye(V), 1, axis=1).tolist())


def gpt(preset="nano", seed=0):
    model = randomise(GPT(GPTConfig(**SIZES | PRESETS[preset])), seed)
    return model.requires_grad_(False)


def uniform(B, n, seed=0):
    return torch.rand(B, n, generator=rng(seed))


def chi_square_odds(counts, p):
    """P(chi-square is this large or larger); an odd number of cells, so that it has a closed form:
    exp(-x/2) sum_{i < df/2} (x/2)^i / i!."""
    n, df = sum(counts), len(p) - 1
    assert df % 2 == 0 and df > 0 and min(p) * n > 10, (df, n, p)
    x = sum((c - n * q) ** 2 / (n * q) for c, q in zip(counts, p, strict=True)) / 2
    return math.exp(-x) * sum(x**i / math.factorial(i) for i in range(df // 2))


def truncate64(p, top_k=None, top_p=None):
    """Brute force on one row of probabilities: rank them, cut, renormalise."""
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    total = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if top_p is not None and mass >= top_p * total:
            break
        kept.append(i)
        mass += p[i]
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


# --------------------------------------------------------------------------------------- logp
@pytest.mark.parametrize("settings_", [
    {}, {"temperature": 0.7}, {"temperature": 1.9}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 1},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.6}, {"top_k": 29, "top_p": 1.0},
    {"top_k": 1000, "temperature": 0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("preset", ["nano", "gpt2"])
def test_logp_is_of_the_distribution_that_was_sampled(preset, settings_):
    model = gpt(preset)
    rollout = generate(model, PROMPTS, 9, rng=rng(1), **settings_)
    assert rollout.logp.dtype is torch.float32 and (rollout.logp[~rollout.mask] == 0).all()
    temperature = settings_.get("temperature", 1.0)
    cut = {name: value for name, value in settings_.items() if name != "temperature"}
    for i, row in enumerate(rollout.rows()):
        logits = model.logits(model(torch.tensor([row])))[0]  # alone, uncached, unpadded
        for t in range(len(PROMPTS[i]) - 1, len(row) - 1):
            p = truncate64(torch.softmax(logits[t].double() / temperature, 0).tolist(), **cut)
            assert abs(rollout.logp[i, t].item() - math.log(p[row[t + 1]])) < 1e-5, (i, t)
            assert rollout.mask[i, t]


def test_no_top_k_and_no_top_p_are_the_plain_softmax():
    logits = torch.randn(3, 17, generator=rng())
    for top_k, top_p in [(None, None), (17, 1.0), (99, None)]:
        assert torch.equal(truncate(logits, top_k, top_p), logits)


# ------------------------------------------------------------------------------ top_k and top_p
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6, unique=True), st.integers(0, 5))
def test_top_p_keeps_the_smallest_sufficient_set(weights, which):
    total = sum(weights)
    ladder = list(itertools.accumulate(sorted(weights, reverse=True), initial=0))
    which = min(which, len(weights) - 1)
    top_p = (ladder[which] + ladder[which + 1]) / 2 / total  # between two of the masses
    logits = torch.tensor([weights]).double().log() + 1.5
    kept = truncate(logits, None, top_p)[0].isfinite()
    sufficient = [set(s) for n in range(1, len(weights) + 1)
                  for s in itertools.combinations(range(len(weights)), n)
                  if sum(weights[i] for i in s) >= top_p * total]  # fmt: skip
    size = min(map(len, sufficient))
    best = max((s for s in sufficient if len(s) == size), key=lambda s: sum(weights[i] for i in s))
    assert set(kept.nonzero().flatten().tolist()) == best


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 9))
def test_top_k_keeps_the_largest(ranks, k):
    logits = torch.tensor([ranks]).float()
    kept = truncate(logits, k, None)[0]
    assert kept.isfinite().tolist() == [rank >= 7 - k for rank in ranks]
    assert torch.equal(kept[kept.isfinite()], logits[0][kept.isfinite()])


def test_top_k_comes_before_top_p():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    # of the first two, renormalised, the larger has 4/7 > .5: it alone is enough; of all four not
    assert truncate(p.log(), 2, 0.5)[0].isfinite().tolist() == [True, False, False, False]
    assert truncate(p.log(), None, 0.5)[0].isfinite().tolist() == [True, True, False, False]


# -------------------------------------------------------------------------------------- sample
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=8).filter(any), st.floats(0, 1 - 2.0**-24))
def test_sample_inverts_the_cdf(weights, u):
    """Token i has the stretch [cdf_{i-1}, cdf_i) of u; nothing has none."""
    ladder = list(itertools.accumulate(weights, initial=0))
    total = ladder[-1]
    logits = torch.tensor([weights]).float().log()
    for x in (u, *EDGES):
        token, logp = sample(logits, torch.tensor([x]))
        w = weights[token]
        assert w > 0 and abs(logp.item() - math.log(w / total)) < 1e-6
        assert ladder[token] - 1e-5 <= x * total <= ladder[token + 1] + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_probability_zero_are_never_drawn(dtype):
    one = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    u = torch.tensor([0.0, 1e-40, 2.0**-24, 0.5, 1 - 2.0**-24, one], dtype=dtype)
    big, none = 7.0, -torch.inf
    for logits in ([none, big, none], [none, none, big], [big, none, none],
                   [none, 0.0, none, none, 0.0, none, 0.0, none]):  # fmt: skip
        rows = torch.tensor(logits).expand(len(u), -1)
        for temperature in (0.2, 1.0, 5.0):
            token, logp = sample(rows, u, temperature=temperature)
            assert rows.gather(1, token[:, None]).isfinite().all()
            assert logp.isfinite().all()
    first, last = sample(rows, u)[0][[0, -1]].tolist()
    assert (first, last) == (1, 6)  # the ends of the unit interval are the first and the last


def test_rounding_does_not_move_tokens_in_a_large_vocabulary():
    V = 50_000
    u = torch.tensor([1 - 2.0**-24, (V - 0.5) / V, 0.5 + 0.5 / V], dtype=torch.float64)
    token, _ = sample(torch.zeros(3, V), u)
    assert token.tolist() == [V - 1, V - 1, V // 2]
    # rare ones behind a frequent one: in float32 the CDF would have steps of six of them
    weights = torch.tensor([1.0] + [1e-8] * 1000, dtype=torch.float64)
    middle = (weights.cumsum(0) - weights / 2) / weights.sum()
    which = torch.tensor([0, 1, 2, 3, 500, 999, 1000])
    token, _ = sample(weights.log().float().expand(7, -1), middle[which])
    assert token.tolist() == which.tolist()


def test_greedy_takes_the_largest_at_logp_0():
    model = gpt()
    rollout = generate(model, PROMPTS, 8, temperature=0.0)
    assert not rollout.logp.any()
    for row, prompt in zip(rollout.rows(), PROMPTS, strict=True):
        assert len(row) == len(prompt) + 8
        logits = model.logits(model(torch.tensor([row])))[0]
        assert row[len(prompt) :] == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
    cold = generate(model, PROMPTS, 8, temperature=1e-4, u=uniform(5, 8))
    assert cold.rows() == rollout.rows()  # the limit of low temperatures


# --------------------------------------------------------------------------------- frequencies
@pytest.mark.parametrize("settings_", [{}, {"temperature": 0.8}, {"top_k": 3}, {"top_p": 0.72}])
def test_frequencies_are_the_probabilities(settings_):
    """First tokens and transitions of 20,000 rows: 6 tests at odds of 1e-6 each."""
    p = [[0.4, 0.3, 0.15, 0.1, 0.05], [0.1, 0.2, 0.3, 0.15, 0.25], [0.2, 0.35, 0.05, 0.1, 0.3],
         [0.3, 0.1, 0.05, 0.4, 0.15], [0.05, 0.1, 0.4, 0.15, 0.3]]  # fmt: skip
    n = 20_000
    rollout = generate(Table(p), [[0]] * n, 2, rng=rng(11), **settings_)
    start, first, second = rollout.idx.T.numpy()
    temperature = settings_.get("temperature", 1.0)
    cut = {name: value for name, value in settings_.items() if name != "temperature"}
    heated = np.array(p) ** (1 / temperature)
    exact = [truncate64(row, **cut) for row in (heated / heated.sum(1, keepdims=True)).tolist()]
    tables = [(first, exact[0])] + [(second[first == i], exact[i]) for i in range(5)]
    for drawn, q in tables:
        if not len(drawn):
            continue  # after a first token that was cut
        counts, alive = np.bincount(drawn, minlength=5), np.array(q) > 0
        assert not counts[~alive].any()
        counts, q = counts[alive].tolist(), np.array(q)[alive].tolist()
        assert chi_square_odds(counts, q) > 1e-6, (settings_, counts, q)
    assert (start == 0).all()


def test_rows_with_one_prompt_begin_differently():
    """64 rows of one prompt, 64 equal tokens: 40.6 different ones expected, sd 3.1; odds 1e-6."""
    model = Table(np.full((64, 64), 1 / 64).tolist())
    for given_ in ({"rng": rng(2)}, {"u": uniform(64, 3)}):
        rollout = generate(model, [[0]] * 64, 3, **given_)
        for t in (1, 2, 3):
            assert len(rollout.idx[:, t].unique()) >= 25
        assert (rollout.idx[:, 1] != rollout.idx[:, 2]).sum() >= 50  # nor the tokens of a row


# ---------------------------------------------------------------------------- rows of a batch
@pytest.mark.parametrize("preset", ["nano", "gpt2"])
@pytest.mark.parametrize("stop", [None, 7])
def test_ragged_rows_equal_rows_generated_alone(preset, stop):
    model, u = gpt(preset), uniform(5, 10)
    together = generate(model, PROMPTS, 10, u=u, stop=stop, temperature=1.5)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 10, u=u[i : i + 1], stop=stop, temperature=1.5)
        assert alone.rows()[0] == together.rows()[i]
        assert alone.stopped[0] == together.stopped[i]
        torch.testing.assert_close(alone.logp[alone.mask], together.logp[i][together.mask[i]],
                                   rtol=0, atol=1e-5)  # fmt: skip


def test_finished_rows_leave_the_batch():
    """The work of a step is that of the rows that are not finished, give or take a quarter."""
    model, sizes = gpt(), []
    model.register_forward_pre_hook(lambda _model, args: sizes.append(len(args[0])))
    rollout = generate(model, [[3, 1]] * 64, 20, stop=7, temperature=2.0, rng=rng(0))
    going = [64, *rollout.mask[:, 1:-1].logical_and(rollout.idx[:, 2:-1] != 7).sum(0).tolist()]
    assert going[-1] < 32 and len(sizes) == len(going)
    assert all(n <= size <= n / 0.75 for n, size in zip(going, sizes, strict=True))


@pytest.mark.parametrize("preset", ["nano", "gpt2"])
@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_samples_from_the_bfloat16_of_the_model(preset, frozen):
    """Its weights are cast once: what it says of its tokens is what autocast says of them."""
    model = gpt(preset).requires_grad_(not frozen)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rollout = generate(model, [[3, 1, 4]] * 40, 10, rng=rng(1))
        want = model.logits(model(rollout.idx[:, :-1])).log_softmax(-1)
    want = want.gather(-1, rollout.idx[:, 1:, None])[..., 0][rollout.mask]
    assert (want - rollout.logp[rollout.mask]).abs().max() < 0.05
    for name, t in model.state_dict().items():
        assert t.dtype == torch.float32 and torch.equal(t, before[name]), name


def test_large_weights_meet_few_rows_transposed():
    """(W x^T)^T + b is x W^T + b, in the shape of a view, without gradient only."""
    layer = Linear(768, 1024)
    x = torch.randn(3, 1, 768, generator=rng(0))
    with torch.no_grad():
        assert layer(x).stride()[0] == 1
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0,
                                   atol=1e-5)
    assert layer(x).stride()[0] == 1024


def test_permuted_rows_give_permuted_results():
    model, u, order = gpt(), uniform(5, 10), [3, 0, 4, 2, 1]
    rollout = generate(model, PROMPTS, 10, u=u, stop=7)
    moved = generate(model, [PROMPTS[i] for i in order], 10, u=u[order], stop=7)
    assert moved.rows() == [rollout.rows()[i] for i in order]
    assert torch.equal(moved.mask, rollout.mask[order])
    assert torch.equal(moved.stopped, rollout.stopped[order])
    torch.testing.assert_close(moved.logp, rollout.logp[order], rtol=0, atol=1e-5)


def test_same_seed_same_tokens():
    model = gpt()
    a, b, c = (generate(model, PROMPTS, 12, rng=rng(seed)) for seed in (4, 4, 5))
    assert a.rows() == b.rows() and torch.equal(a.logp, b.logp)
    assert a.rows() != c.rows()
    by_hand = generate(model, PROMPTS, 12, u=uniform(5, 12, seed=4))
    assert by_hand.rows() == a.rows()


# ------------------------------------------------------------------------- masks, counts, stops
def test_ragged_rollout_by_hand():
    rollout = generate(cycle(), [[0], [2, 2, 3], [1, 4]], 3, u=uniform(3, 3))
    assert isinstance(rollout, Rollout)
    assert rollout.rows() == [[0, 1, 2, 3], [2, 2, 3, 4, 0, 1], [1, 4, 0, 1, 2]]
    assert rollout.responses() == [[1, 2, 3], [4, 0, 1], [0, 1, 2]]
    assert rollout.n_prompt.tolist() == [1, 3, 2]
    assert (rollout.n_prompt + rollout.mask.sum(1)).tolist() == [4, 6, 5]
    assert rollout.idx.shape == (3, 6) and rollout.idx.dtype is torch.int64
    assert rollout.mask.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert rollout.mask.dtype is torch.bool and not rollout.stopped.any()
    assert not rollout.logp.any()  # everything was certain


def test_the_stop_token_counts_and_ends_its_row():
    rollout = generate(cycle(), [[0], [4, 3], [2], [3]], 4, stop=3, u=uniform(4, 4))
    assert rollout.rows() == [[0, 1, 2, 3], [4, 3, 4, 0, 1, 2], [2, 3], [3, 4, 0, 1, 2]]
    assert rollout.responses() == [[1, 2, 3], [4, 0, 1, 2], [3], [4, 0, 1, 2]]  # 3 in prompts: not
    assert rollout.stopped.tolist() == [True, False, True, False]
    assert (rollout.n_prompt + rollout.mask.sum(1)).tolist() == [4, 6, 2, 5]
    assert rollout.mask.int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0],
                                           [1, 1, 1, 1, 0]]  # fmt: skip


def test_it_ends_when_all_rows_have():
    calls = []
    model = cycle()
    model.logits, plain = lambda h: calls.append(1) or plain(h), model.logits
    rollout = generate(model, [[1], [2], [1, 2]], 50, stop=3, u=uniform(3, 50))
    assert rollout.rows() == [[1, 2, 3], [2, 3], [1, 2, 3]] and rollout.stopped.all()
    assert rollout.idx.shape == (3, 3) and rollout.mask.shape == rollout.logp.shape == (3, 2)
    assert len(calls) == 2


def test_each_row_has_max_new_tokens_of_its_own():
    rollout = generate(gpt(), PROMPTS, 6, rng=rng())
    assert [len(row) for row in rollout.responses()] == [6] * 5
    assert rollout.mask.sum(1).tolist() == [6] * 5
    assert [row[: len(p)] for row, p in zip(rollout.rows(), PROMPTS, strict=True)] == PROMPTS
    first = [m.nonzero()[0].item() for m in rollout.mask]
    assert first == [len(p) - 1 for p in PROMPTS]  # logp[:, t] scores idx[:, t + 1]


def test_stopped_rows_hold_nothing_after_the_stop():
    """A model of random tokens with a likely stop, against what each row's own u says."""
    V, n, stop = 6, 8, 2
    model, u = Table(np.full((V, V), 1 / V).tolist()), uniform(200, n)
    rollout = generate(model, [[1]] * 200, n, stop=stop, u=u)
    assert 0 < rollout.stopped.sum() < 200
    for i, response in enumerate(rollout.responses()):
        drawn = [int(x * V) for x in u[i].tolist()]
        expected = drawn[: drawn.index(stop) + 1] if stop in drawn else drawn
        assert response == expected and rollout.stopped[i] == (stop in drawn)
        logp = rollout.logp[i]
        np.testing.assert_allclose(logp[: len(response)], -math.log(V), atol=1e-6)
        assert not logp[len(response) :].any()


# -------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("prompts, n, extra, message", [
    ([], 3, {}, "an empty prompt"),
    ([[]], 3, {}, "an empty prompt"),
    ([[1, 2], []], 3, {}, "an empty prompt"),
    ([[1] * 25], 1, {}, "a prompt of 25 tokens and 1 new ones do not fit the context of 24"),
    ([[1], [1] * 20], 5, {}, "a prompt of 20 tokens and 5 new ones do not fit"),
    ([[1]], 0, {}, "max_new_tokens is 0"),
    ([[1]], 3, {"temperature": -1.0}, "temperature is -1.0"),
    ([[1]], 3, {"temperature": math.nan}, "temperature is nan"),
    ([[1]], 3, {"temperature": math.inf}, "temperature is inf"),
    ([[1]], 3, {"top_k": 0}, "top_k is 0"),
    ([[1]], 3, {"top_k": -2}, "top_k is -2"),
    ([[1]], 3, {"top_p": 0.0}, "top_p is 0.0"),
    ([[1]], 3, {"top_p": 1.5}, "top_p is 1.5"),
    ([[1]], 3, {"top_p": math.nan}, "top_p is nan"),
])  # fmt: skip
def test_errors_are_the_users(prompts, n, extra, message):
    with pytest.raises(UserError, match=message) as error:
        generate(gpt(), prompts, n, rng=rng(), **extra)
    assert "\n" not in str(error.value)


def test_the_whole_context_can_be_used():
    prompts = [tokens(20).tolist(), [1]]
    assert [len(r) for r in generate(gpt(), prompts, 4, rng=rng()).responses()] == [4, 4]


# ------------------------------------------------------------------------------------ compiled
@pytest.fixture
def traced(monkeypatch):
    """torch.compile with its tracing and its guards, and without the seconds of code generation."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def assert_same(got: Rollout, want: Rollout):
    assert got.rows() == want.rows()
    for name in ("mask", "n_prompt", "stopped"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.logp, want.logp, rtol=0, atol=1e-5)


@needs_compiler
def test_compiled_rollouts_equal_those_of_the_model():
    """Through two windows of the cache, ragged, with rows that stop."""
    config = GPTConfig(**SIZES | PRESETS["gpt2"] | {"block_size": 48, "n_layer": 1})
    model = randomise(GPT(config))
    fast = Compiled(model)
    for seed in range(2):
        want = generate(model, PROMPTS, 38, stop=7, top_k=9, u=uniform(5, 38, seed))
        got = generate(fast, PROMPTS, 38, stop=7, top_k=9, u=uniform(5, 38, seed))
        assert_same(got, want)


@pytest.mark.parametrize("preset", ["nano", "gpt2"])
def test_compiled_models_keep_their_own_weights_as_they_were(preset, traced):
    models = [gpt(preset, seed) for seed in range(2)]
    fast = [Compiled(model) for model in models]
    for u in (uniform(5, 9), uniform(5, 9, 1)):
        for model, compiled in zip(models, fast, strict=True):  # alike, but for their weights
            assert_same(generate(compiled, PROMPTS, 9, stop=7, u=u),
                        generate(model, PROMPTS, 9, stop=7, u=u))
    before = generate(models[0], PROMPTS, 6, rng=rng(1))
    with torch.no_grad():
        models[0].blocks[0].mlp.up.weight.mul_(-1)
    assert_same(generate(fast[0], PROMPTS, 6, rng=rng(1)), before)
    assert generate(models[0], PROMPTS, 6, rng=rng(1)).rows() != before.rows()
    assert_same(generate(fast[1], [[3]], 1, rng=rng(1)), generate(models[1], [[3]], 1, rng=rng(1)))
    assert_same(generate(fast[1], [[3]], 2, rng=rng(1)), generate(models[1], [[3]], 2, rng=rng(1)))


@pytest.mark.parametrize("preset", ["nano", "gpt2"])
def test_compiled_under_autocast_samples_from_the_bfloat16_of_the_model(preset, traced):
    model = gpt(preset)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rollout = generate(Compiled(model), [[3, 1, 4]] * 40, 10, rng=rng(1))
        want = model.logits(model(rollout.idx[:, :-1])).log_softmax(-1)
    want = want.gather(-1, rollout.idx[:, 1:, None])[..., 0][rollout.mask]
    assert (want - rollout.logp[rollout.mask]).abs().max() < 0.05


def test_steps_as_cuda_graphs_keep_to_their_own_tensors(monkeypatch):
    """With a graph played by the CPU: one capture a shape, whose inputs and results stay put."""
    captured = []

    def capture(function, rewind):
        results = function()
        rewind()  # a capture runs nothing
        captured.append([x.data_ptr() for x in results])

        def replay():
            for mine, new in zip(results, function(), strict=True):
                mine.copy_(new)
        return results, replay

    monkeypatch.setattr(generate_module, "_capture", capture)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = gpt()
    compiled = Compiled(model)
    compiled._graphs = {}
    for seed in range(3):
        want = generate(model, PROMPTS, 9, stop=7, temperature=0.7, rng=rng(seed))
        assert_same(generate(compiled, PROMPTS, 9, stop=7, temperature=0.7, rng=rng(seed)), want)
    assert len(captured) == 1
    generate(compiled, PROMPTS, 9, stop=7, temperature=0.8, rng=rng(0))
    generate(compiled, PROMPTS[:2], 9, stop=7, temperature=0.8, rng=rng(0))
    assert len(captured) == 3


def test_models_with_ngrams_cannot_be_compiled_for_sampling():
    with pytest.raises(UserError, match="n-gram embeddings cannot be compiled for sampling: give"):
        Compiled(GPT(GPTConfig(**SIZES, ngram_rows=[8])))


# ------------------------------------------------------------------------------ from end to end
@pytest.mark.parametrize("preset", ["nano", "gpt2"])
def test_a_small_gpt_learns_a_chinese_sentence_by_heart(preset):
    """Three bytes a character through byte-level BPE, learnt, and said back greedily."""
    sentence = "这是一个简单的GPT-2模型实现。"
    tokenizer = train_bpe([sentence] * 2, 290, pattern=CHAR_PATTERN)
    end, ids = tokenizer.special("<|endoftext|>"), tokenizer.encode(sentence)
    assert len(sentence) <= len(ids) < len(sentence.encode()) and tokenizer.decode(ids) == sentence
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2,
                       n_embd=32, **PRESETS[preset])  # fmt: skip
    model, row = GPT(config, rng=rng()), torch.tensor([[end, *ids, end]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(120):
        loss = F.cross_entropy(model.logits(model(row[:, :-1]))[0], row[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompts = [[end], [end, *ids[:7]]]
    rollout = generate(model.eval(), prompts, 64 - 8, temperature=0.0, stop=end)
    for said in rollout.rows():
        assert said[-1] == end and tokenizer.decode(said[1:-1]) == sentence, loss.item()
    assert rollout.stopped.all()
    drawn = generate(model, [[end]] * 8, 60, stop=end, rng=rng(3))
    assert drawn.logp.sum(1).exp().mean() > 0.5  # and it is sure of it
