"""reward.py against loops, closed forms, simulated raters with known answers, and bad input."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_agreement import make_judgements

from nanokl import UserError, checkpoint
from nanokl.agreement import pair_report
from nanokl.bert import BERT
from nanokl.gpt import GPT
from nanokl.judgements import HumanPairs, comparison_groups
from nanokl.ngrams import Vocabulary, ngrams, pieces
from nanokl.reward import (
    RewardModel,
    bradley_terry,
    check_scores,
    learn_vocabulary,
    load_function,
    load_reward,
)
from nanokl.runtime import Runtime, generator
from nanokl.tokenizer import Tokenizer
from nanokl.trunks import load_trunk, shared_rows

CPU = Runtime(torch.device("cpu"), torch.float32)
BYTES = Tokenizer([bytes([b]) for b in range(256)])  # no merges: a token a byte
TRUNKS = [BERT, GPT]
TEXTS = ["a", "", "a longer text", "zz top", "a much longer text than that", "é!", "b"]
DOMAINS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
MANY = settings(max_examples=25, deadline=None)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_trunk(cls, seed=0, **options):
    """A tiny trunk with random weights everywhere, projections included."""
    options = {"block_size": 24, "n_layer": 1, "n_head": 2, "n_embd": 16, **options}
    trunk = cls(cls.Config(vocab_size=BYTES.vocab_size, **options), generator(seed))
    rng = generator(seed, "weights")
    with torch.no_grad():
        for p in trunk.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return trunk


def token_row(text):
    """[CLS] bytes [SEP], cut at a context of 24."""
    spaced = b" " + text.strip().encode()  # a first word is like any other
    return [BYTES.special("[CLS]"), *spaced[:22], BYTES.special("[SEP]")]


def grams(text, domain):
    """The hashes of a text's n-grams."""
    idx = torch.tensor([token_row(text)])
    return ngrams([text], idx, idx >= 0, [domain])[0]


def make_model(cls, seed=0, members=1, **options):
    """A reward model of three domains that differ, which knows the n-grams of TEXTS."""
    torch.manual_seed(seed)
    known = torch.cat([grams(t, d) for t, d in zip(TEXTS, DOMAINS.tolist(), strict=True)])
    known = torch.cat((torch.tensor([-1]), known.unique()))
    seen = (torch.arange(len(known)) > 0).float()
    words = Vocabulary(known, torch.rand(len(known)) * seen,
                       torch.rand(len(known), 1) * seen[:, None])
    trunk = make_trunk(cls, seed, **options)
    model = RewardModel.on(trunk, n_domain=3, vocabulary=words, members=members).eval()
    with torch.no_grad():
        for member in model.members:
            member.trunk.wse.weight.add_(0.5 * torch.randn(3, trunk.config.n_embd))
            member.linear.weight.normal_(0, 0.1), member.linear.u.normal_(0, 0.1)
            member.pieces.weight.normal_(0, 0.5)
    return model


# -------------------------------------------------------------------------------- Bradley-Terry


def slow_bradley_terry(score, wins, valid):
    """Loss, and gradient sum (sigmoid(s_a - s_b) - win) / n, pair by pair."""
    loss, grad, n = 0.0, np.zeros(score.shape), int(valid.sum())
    for g, a, b in valid.nonzero().tolist():
        p = 1 / (1 + math.exp(score[g, b] - score[g, a]))
        win = wins[g, a, b].item()
        loss -= math.log(p if win else 1 - p) / n
        grad[g, a] += (p - win) / n
        grad[g, b] -= (p - win) / n
    return loss, grad


@MANY
@given(st.integers(1, 3), st.integers(2, 5), st.integers(0, 999))
def test_bradley_terry_and_its_gradient_equal_a_loop(G, K, seed):
    rng = generator(seed)
    score = torch.randn(G, K, generator=rng, dtype=torch.float64)
    wins = torch.randint(2, (G, K, K), generator=rng).double()
    valid = torch.ones(K, K).triu(1).bool() & (torch.rand(G, K, K, generator=rng) < 0.7)  # no ties
    expected, grad = slow_bradley_terry(score, wins, valid)
    leaf = score.clone().requires_grad_()
    loss, info = bradley_terry(leaf, wins, valid)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(leaf.grad.numpy(), grad, rtol=0, atol=1e-12)
    assert info["n_pairs"] == valid.sum()
    shift = torch.randn(G, 1, generator=rng, dtype=torch.float64)  # each group has its own zero
    assert bradley_terry(score + shift, wins, valid)[0].item() == pytest.approx(expected, abs=1e-12)
    junk = torch.where(valid, wins, 1 - wins)  # what was not compared, or tied, has no answer
    assert bradley_terry(score, junk, valid)[0].item() == pytest.approx(expected, abs=1e-12)


def test_bradley_terry_by_hand():
    """Two snippets 1 apart: log(1 + e^-1) if the better won, log(1 + e) if not; equal: log 2."""
    wins, valid = torch.zeros(1, 2, 2), torch.tensor([[[False, True], [False, False]]])
    wins[0, 0, 1] = 1
    for scores, expected in (([2.0, 1.0], math.log1p(math.exp(-1))),
                             ([1.0, 2.0], math.log1p(math.e)), ([3.0, 3.0], math.log(2))):
        loss, info = bradley_terry(torch.tensor([scores]), wins, valid)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert info["n_pairs"] == 1
    loss, info = bradley_terry(torch.ones(1, 2, requires_grad=True), wins, valid & False)
    loss.backward()
    assert loss == 0 and info["n_pairs"] == 0  # all ties: nothing to learn, nothing breaks


# --------------------------------------------------------------------------------- reward model


def test_the_vocabulary_of_judgements():
    """By hand: ratings are measured by their domain's mean and sd, the lexicon's in each domain."""
    texts = ["fine film", "fine day", "poor film", "poor day", "fine", "grim"]
    j = make_judgements([[3, 1], [2, 2], [-2, 0], [-3, -3], [4, 2], [-1, -1]], [0, 0, 1, 1, 2, 2],
                        names=("film", "news", "lexicon"), texts=texts)
    found = learn_vocabulary(BYTES, j, make_trunk(BERT))
    at = {h: i for i, h in enumerate(found.known.tolist())}
    word = {w: at[zlib.crc32(w.encode())] for w in ("fine", "film", "day", "poor", "grim")}
    assert {w: found.valence[i].item() for w, i in word.items()} == {
        "fine": 3, "grim": -1, "film": 0, "day": 0, "poor": 0}
    # y: film 2, 2 (no spread: 0, 0), news -1, -3 (1, -1), lexicon 3, -1 (1, -1) in both domains
    raw = {"fine": 2 / 5, "film": 1 / 3, "day": 1 / 3, "poor": 0, "grim": 2 / 3}
    scale = found.polarity[word["grim"]].item() / raw["grim"]
    for w, r in raw.items():
        assert found.polarity[word[w]].item() == pytest.approx(scale * r, abs=1e-6)
    own = [h for h in at if h == (zlib.crc32(b"fine") + 0x9E3779B1) % 2**32]
    assert len(own) == 1  # films' own "fine": two films and the lexicon


def by_hand(model, ids, domain):
    """The encoder's margin of one unpadded text, from the trunk's embeddings and hidden states."""
    idx = torch.tensor([ids])
    segment = torch.full_like(idx, domain)
    table, (rows, start) = model.members[0].pieces.weight, pieces(BYTES.tokens, idx)
    extra = torch.stack([table[row].mean(0) if len(row) else 0 * table[0] for row in
                         rows.tensor_split(start[1:])])[None]
    trunk = model.members[0].trunk
    h, x = trunk(idx, None, segment, extra)[0], trunk.embed(idx, segment, extra)[0]
    pooled = torch.cat((h[-1] if type(trunk) is GPT else h.mean(0), x.mean(0)))
    return (pooled @ model.members[0].score.weight[0]).item()


def linear_by_hand(model, text, domain):
    """The linear margin from the n-grams that the model knows."""
    part = model.members[0].linear
    hashes = grams(text, domain).tolist()
    rows = [i for h in hashes for i in (part.known == h).nonzero().flatten().tolist()]
    total = sum((part.polarity[i] * part.weight[i] + part.u[domain] * part.valence[i]).item()
                for i in rows)
    return 3 * math.tanh(10 * total / (len(rows) + 1) ** 0.5 / 3)


@pytest.mark.parametrize("cls", TRUNKS)
def test_score_is_of_the_real_tokens_only(cls):
    """The last one of a causal trunk, the mean of an encoder; padding is unseen."""
    model = make_model(cls)
    idx, mask, domain, *rest = model.inputs(BYTES, TEXTS, DOMAINS)
    assert torch.equal(domain, DOMAINS)
    score, linear = model((idx, mask, domain, *rest))[0].unbind(1)
    assert score.shape == (len(TEXTS),) and score.dtype == linear.dtype == torch.float32
    expected = [by_hand(model, row[real].tolist(), domain)
                for row, real, domain in zip(idx, mask, DOMAINS.tolist(), strict=True)]
    np.testing.assert_allclose(score.tolist(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(linear.tolist(), [linear_by_hand(model, text, d) for text, d in
                                                 zip(TEXTS, DOMAINS.tolist(), strict=True)],
                               rtol=0, atol=1e-5)
    junk = model((torch.where(mask, idx, 7), mask, DOMAINS, *rest))[0, :, 0]
    torch.testing.assert_close(junk, score, rtol=0, atol=1e-6)
    other = model((idx, mask, torch.zeros_like(DOMAINS), *rest))[0, :, 0]
    assert score.std() > 0.1 and torch.equal(other != score, DOMAINS > 0)


@MANY
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_texts_share_rows_without_meeting(length):
    """Nothing overlaps or crosses a row's end, and no two rows would fit into one."""
    T = max(length)
    taken = [set(range(at, at + n)) for at, n in zip(shared_rows(length, T), length, strict=True)]
    slots = set().union(*taken)
    assert len(slots) == sum(length) and all(min(t) // T == max(t) // T for t in taken)
    used = np.bincount([slot // T for slot in slots])
    assert len(used) == 1 or np.sort(used)[:2].sum() > T


def test_hidden_tokens_are_masks_to_the_encoder_alone():
    model, hide = make_model(BERT), torch.zeros(len(TEXTS), 24, dtype=torch.bool)
    plain = model.inputs(BYTES, TEXTS, DOMAINS)
    hide[3] = True
    idx, mask, _, hashes, start, _, row_start = model.inputs(BYTES, TEXTS, DOMAINS, hide)
    mask_id = BYTES.special("[MASK]")
    assert torch.equal(hashes, plain[3]) and torch.equal(start, plain[4])
    n = len(" zz top")
    assert idx[3, : n + 2].tolist() == [plain[0][3, 0], *[mask_id] * n, plain[0][3, n + 1]]
    assert torch.equal(idx[:3], plain[0][:3]) and torch.equal(mask, plain[1])
    assert (torch.diff(row_start).view(-1)[3 * idx.shape[1] : 4 * idx.shape[1]] == 0).all()


def test_members_learn_from_batches_of_their_own_and_score_together():
    model = make_model(BERT, members=2)
    a, b = (model.inputs(BYTES, texts, DOMAINS) for texts in (TEXTS, TEXTS[::-1]))
    parts = [member(*batch) for member, batch in zip(model.members, (a, b), strict=True)]
    assert torch.equal(model(a, b), torch.stack(parts))
    assert parts[0].std() > 0.1 and not torch.equal(parts[0].flip(0), parts[1])  # heads differ
    mean = sum(member(*a) for member in model.members).detach() / 2
    torch.testing.assert_close(model.margins_of(BYTES, TEXTS, DOMAINS), mean, rtol=0, atol=1e-5)
    model.v.copy_(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(model.score_texts(BYTES, TEXTS, DOMAINS), mean @ model.v, rtol=0,
                               atol=1e-4)


@pytest.mark.parametrize("cls, n_segment", [(BERT, 0), (BERT, 2), (GPT, 0)])
def test_all_domains_start_as_the_pretrained_trunk(cls, n_segment):
    """Which has seen its first segment at most."""
    trunk = make_trunk(cls, n_segment=n_segment)
    model, idx = RewardModel.on(trunk.eval(), n_domain=4).eval(), torch.arange(12).view(2, 6)
    for segment in (None, torch.zeros_like(idx), torch.full_like(idx, 3)):
        assert torch.equal(model.members[0].trunk(idx, segment=segment), trunk(idx))


@pytest.mark.parametrize("cls", TRUNKS)
def test_normalise_is_exact_on_its_samples_and_idempotent(cls):
    model = make_model(cls)
    raw = model.score_texts(BYTES, TEXTS)
    model.normalise(raw)
    score = model.score_texts(BYTES, TEXTS)
    assert score.mean().abs() < 1e-5 and (score.std() - 1).abs() < 1e-5
    torch.testing.assert_close(score, (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-5)
    gain, bias = model.gain.clone(), model.bias.clone()
    model.normalise(score)
    torch.testing.assert_close((model.gain, model.bias), (gain, bias), rtol=1e-5, atol=1e-5)


def test_stack_finds_the_weights_that_raters_used():
    """20,000 answers with P = sigmoid(v . (m_a - m_b)): within 5 of its standard errors, .012."""
    rng = np.random.default_rng(0)
    margins, (a, b) = rng.normal(size=(500, 2)), rng.integers(0, 500, (2, 20_000))
    p = 1 / (1 + np.exp(-(margins[a] - margins[b]) @ [1.2, -0.3]))
    won = rng.random(20_000) < p
    pairs = HumanPairs(a, b, 0 * a, won / 20_000, ~won / 20_000, 0 * p)
    model = make_model(BERT)
    assert model.v.tolist() == [0.5, 0.5]
    for _ in range(2):  # the old weights do not matter
        model.stack(torch.from_numpy(margins), pairs)
        assert model.v.tolist() == pytest.approx([1.2, -0.3], abs=0.06)


def test_stack_holds_where_the_answers_say_nothing_or_everything():
    """Equal texts leave the 1/2 of the prior, which bounds v where no answer is a mistake."""
    pairs = HumanPairs(*np.array([[0], [1], [0]]), *np.array([[1.0], [0.0], [1.0]]))
    model = make_model(BERT)
    model.stack(torch.ones(2, 2), pairs)
    assert model.v.tolist() == [0.5, 0.5]
    model.stack(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), pairs)
    assert 1 < model.v[0] < 20 and model.v[1] == 0.5


@pytest.mark.filterwarnings("ignore:std_mean")
def test_normalise_needs_scores_that_differ():
    for score in (torch.ones(5), torch.tensor([2.0])):
        with pytest.raises(UserError, match="cannot be normalised"):
            make_model(BERT).normalise(score)


@pytest.mark.parametrize("cls", TRUNKS)
def test_score_texts_depends_on_no_batch_and_no_order(cls):
    model = make_model(cls)
    parts = [(by_hand(model, token_row(text), d), linear_by_hand(model, text, d))
             for text, d in zip(TEXTS, DOMAINS.tolist(), strict=True)]
    with torch.no_grad():
        model.gain.fill_(1.5), model.bias.fill_(-0.5)
        model.v.copy_(torch.tensor([0.3, 0.9]))
    expected = [1.5 * (0.3 * a + 0.9 * b) - 0.5 for a, b in parts]
    order = [3, 0, 6, 2, 5, 1, 4]
    for batch in (1, 2, 3, 256):
        score = model.score_texts(BYTES, TEXTS, DOMAINS, batch=batch)
        np.testing.assert_allclose(score.tolist(), expected, rtol=0, atol=1e-5)
        mixed = model.score_texts(BYTES, [TEXTS[i] for i in order], DOMAINS[order].numpy(),
                                  batch=batch)
        torch.testing.assert_close(mixed, score[order], rtol=0, atol=1e-5)
    assert not score.requires_grad and model.score_texts(BYTES, []).shape == (0,)
    same = model.score_texts(BYTES, TEXTS, 2)  # one domain for all
    torch.testing.assert_close(same, model.score_texts(BYTES, TEXTS, np.full(len(TEXTS), 2)))
    for p in model.members[0].linear.parameters():  # it reads all words, the encoder its context
        torch.nn.init.zeros_(p)
    long = ["x" * 21, "x" * 22, "x" * 500]  # cut at 24 tokens, [CLS] and [SEP] included
    a, b, c = model.score_texts(BYTES, long).tolist()
    assert a == b == c


def test_scores_are_not_rounded_under_autocast():
    """Sixteen bits would hold 3 digits of a score, and call near texts equal."""
    model = make_model(BERT)
    with torch.autocast("cpu", torch.bfloat16):
        margins = model.margins_of(BYTES, TEXTS, DOMAINS)
        score = model.score_texts(BYTES, TEXTS, DOMAINS)
    np.testing.assert_allclose(score, margins @ model.v, rtol=0, atol=1e-6)


def test_score_texts_is_without_dropout_and_leaves_the_mode_alone():
    torch.manual_seed(0)
    model = RewardModel.on(make_trunk(BERT), n_domain=3, dropout=0.5).train()
    batch = model.inputs(BYTES, TEXTS, DOMAINS)
    assert not torch.equal(model(batch), model(batch))
    assert torch.equal(model.score_texts(BYTES, TEXTS), model.score_texts(BYTES, TEXTS))
    assert model.training and model.members[0].trunk.training
    model.eval().score_texts(BYTES, TEXTS)
    assert not model.training


def test_the_head_starts_as_in_ziegler():
    """N(0, 1 / (inputs + 1)), bias 0; off by a fifth of its 512 weights' sd: odds of 1 in 10^9."""
    torch.manual_seed(0)
    head = RewardModel.on(make_trunk(BERT, n_embd=256), n_domain=1)
    assert head.members[0].score.bias is None and head.gain == 1 and head.bias == 0
    n = head.members[0].score.in_features
    assert n >= 256 and 0.8 < head.members[0].score.weight.std().item() * (n + 1) ** 0.5 < 1.2


def test_a_policy_of_ppo_is_a_trunk_without_its_critic(tmp_path):
    policy = make_trunk(GPT, n_layer=2, value_head=True, critic_layers=1)
    checkpoint.save(tmp_path, policy, tokenizer=BYTES)
    trunk = load_trunk(tmp_path)
    kept = dict(policy.named_parameters())
    assert all(torch.equal(p, kept.pop(name)) for name, p in trunk.named_parameters())
    assert kept and all(name.startswith(("value.", "critic.")) for name in kept)
    model = RewardModel.on(trunk, n_domain=3)
    assert model(model.inputs(BYTES, TEXTS, DOMAINS)).isfinite().all()


@pytest.mark.parametrize("trunk", [
    make_trunk(BERT, head_transform=True), make_trunk(GPT), make_trunk(GPT, tied=False,
                                                                       value_head=True)])
def test_every_parameter_that_trains_gets_a_gradient(trunk):
    """DDP stops at one that does not; the trunk's own heads are frozen, tied embeddings not."""
    model = RewardModel.on(trunk, n_domain=3)
    model(model.inputs(BYTES, TEXTS, DOMAINS)).sum().backward()
    without = [name for name, p in model.named_parameters() if (p.grad is None) == p.requires_grad]
    assert not without and model.members[0].trunk.wte.weight.requires_grad
    copy = dict(model.members[0].trunk.named_parameters())
    for name, p in trunk.named_parameters():
        assert torch.equal(copy[name], p) and copy[name] is not p


@pytest.mark.parametrize("cls", TRUNKS)
def test_save_and_load(cls, tmp_path):
    model = make_model(cls, members=2)
    assert len(model.members[1].linear.known) > 20
    model.normalise(model.score_texts(BYTES, TEXTS))
    score = model.score_texts(BYTES, TEXTS)
    checkpoint.save(tmp_path / "run" / "best", model, tokenizer=BYTES)
    loaded = checkpoint.load(tmp_path / "run" / "best", RewardModel)
    assert loaded.config == model.config and type(loaded.members[0].trunk) is cls
    assert all(torch.equal(x, loaded.state_dict()[k]) for k, x in model.state_dict().items())
    assert torch.equal(loaded.eval().score_texts(BYTES, TEXTS), score)
    reward, guess = load_reward(str(tmp_path / "run"), CPU)  # functions, from its run's folder
    assert torch.equal(check_scores(reward([[0]] * len(TEXTS), TEXTS), len(TEXTS)), score)
    assert torch.equal(guess([[0]] * len(TEXTS), TEXTS), loaded.guess_texts(BYTES, TEXTS))


def test_guess_is_the_score_of_an_encoder_that_agrees():
    model = make_model(BERT, members=2)
    with torch.no_grad():
        for i, member in enumerate(model.members):
            member.linear.weight.normal_(generator=torch.Generator().manual_seed(i))
        model.v.copy_(torch.tensor([0.3, 0.9]))
        model.gain.fill_(1.7)
        model.bias.fill_(-0.4)
    linear = model.margins_of(BYTES, TEXTS, DOMAINS)[:, 1]
    for batch in (1, 1024):
        guess = model.guess_texts(BYTES, TEXTS, DOMAINS, batch=batch)
        torch.testing.assert_close(guess, 1.7 * (0.3 + 0.9) * linear - 0.4)
    assert linear.std() > 0.1


# -------------------------------------------------------------------------- functions of the user


GOOD = [[1.0, -2], (1, -2), np.array([1.0, -2.0]), np.array([1, -2]), torch.tensor([1.0, -2.0]),
        [np.float32(1), -2], [torch.tensor(1.0), -2.0], torch.tensor([1.0, -2.0]).requires_grad_(),
        torch.tensor([1, -2]), range(1, -3, -3)]  # fmt: skip
BAD = [  # what a function returned for 2 samples, and what the one line says
    ([1.0], "shape (1,)"), ([1.0, 2.0, 3.0], "shape (3,)"), (1.0, "shape ()"),
    ([[1.0], [2.0]], "shape (2, 1)"), ([[1.0], [2.0, 3.0]], "list"), (None, "NoneType"),
    ([1.0, None], "list"), (["a", "b"], "list"), ("12", "str"), ({0: 1.0, 1: 2.0}, "dict"),
    ([1j, 2.0], "list"), ((x for x in (1.0, 2.0)), "generator"), (np.array([1.0, None]), "ndarray"),
    ([math.nan, 1.0], "1 NaN"), ([math.inf, -math.inf], "2 NaN"), ([1e40, 1.0], "1 NaN"),
    ([10**400, 1.0], "list"), (lambda: 1.0, "function"),
]  # fmt: skip


@pytest.mark.parametrize("scores", GOOD, ids=lambda x: type(x).__name__)
def test_scores_of_many_types(scores):
    got = check_scores(scores, 2)
    assert got.shape == (2,) and got.dtype == torch.float32 and not got.requires_grad
    assert got.tolist() == [1, -2]


@pytest.mark.parametrize("scores, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_scores_that_are_not_one_number_per_sample(scores, message):
    with pytest.raises(UserError) as error:
        check_scores(scores, 2)
    text = str(error.value)
    assert message in text and "the reward function returned" in text and "return " in text


def write(folder, text):
    path = folder / "my_reward.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_function(tmp_path):
    """It sees its module's names, and a dataclass with postponed annotations works in it."""
    path = write(tmp_path, '''from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Scale:
    by: float = 2.0
SCALE = Scale()
def length(ids, texts):
    return [SCALE.by * len(t) + helper(i) for i, t in zip(ids, texts)]
def helper(i):
    return i[0]
NUMBER = 3
''')
    for length in (load_function(f"{path}:length"), *load_reward(f"{path}:length", CPU)):
        assert length([[1], [5]], ["abc", ""]) == [7.0, 5]


@pytest.mark.parametrize("text, name, message", [
    ("x = 1", "reward", "has no function 'reward'"), ("reward = 3", "reward", "has no function"),
    ("x = 1", "", "has no function ''"), ("def reward(:", "reward", "SyntaxError"),
    ("1 / 0", "reward", "ZeroDivisionError"), ("import no_such_", "reward", "ModuleNotFoundError"),
    ("raise ValueError('two\\nlines')", "reward", "ValueError: two lines"),
    ("\0", "reward", "cannot be run"),
])  # fmt: skip
def test_load_function_complains(tmp_path, text, name, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        load_function(f"{path}:{name}")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_load_reward_complains(tmp_path):
    for spec in (f"{tmp_path}/none.py:reward", "none.py:reward", f"{tmp_path}:reward"):
        with pytest.raises(UserError, match="no file"):
            load_function(spec)
    with pytest.raises(UserError, match="give FILE.py:FUNCTION"):
        load_reward(str(write(tmp_path, "def reward(ids, texts): ...")), CPU)
    with pytest.raises(UserError, match="no file"):
        load_reward(f"{tmp_path}/none.py:reward", CPU)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_reward(str(tmp_path), CPU)
    checkpoint.save(tmp_path / "best", make_trunk(BERT), tokenizer=BYTES)
    with pytest.raises(UserError, match="holds a BERT but a RewardModel is needed"):
        load_reward(str(tmp_path), CPU)


def test_a_model_learns_what_raters_prefer():
    """More `+` than `-` is better, say raters with noise of their own: fresh texts are ranked."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("+-a "), rng.integers(4, 12))) for _ in range(120)]
    good = np.array([t.count("+") - t.count("-") for t in texts])
    ratings = [g + rng.integers(-1, 2, 5) for g in good]
    train, test = (make_judgements(ratings[s], [0] * len(ratings[s]), texts=texts[s])
                   for s in (slice(80), slice(80, 120)))
    torch.manual_seed(0)
    trunk = BERT(BERT.Config(vocab_size=BYTES.vocab_size, block_size=16, n_layer=1, n_head=2,
                             n_embd=32), generator(0))
    model = RewardModel.on(trunk, n_domain=1)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = pair_report(model.score_texts(BYTES, test.texts).numpy(), test)
    for step in range(50):
        rows, wins, valid = comparison_groups(train, step, n_groups=4, group_size=8, seed=0)
        texts_ = [train.texts[r] for r in rows.flatten()]
        margins = model(model.inputs(BYTES, texts_, torch.zeros(rows.numel(), dtype=torch.int64)))
        loss = sum(bradley_terry(part.view(rows.shape), wins, valid)[0] for part in margins[0].T)
        adam.zero_grad()
        loss.backward()
        adam.step()
    after = pair_report(model.score_texts(BYTES, test.texts).numpy(), test)
    assert before["pair_accuracy"] < 0.75 < 0.85 < after["pair_accuracy"] < 1
    assert after["pair_accuracy"] > after["human_ceiling"] - 0.05
    assert after["nats_per_pair"] < before["nats_per_pair"] - 0.2
