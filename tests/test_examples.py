"""The articles' examples against closed forms, loops over texts, entropies of tiny corpora."""

import importlib
import itertools
import json
import math
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT
from test_exact import law, make, slow_kl, table
from test_sft import CPU, Flags
from torch.nn.functional import cosine_similarity

from nanokl import UserError, checkpoint, examples, neighbours
from nanokl import examples_trained as trained
from nanokl.bert import BERT, BERTConfig
from nanokl.gpt import GPT, GPTConfig
from nanokl.kl_table import World
from nanokl.runtime import generator
from nanokl.sft import SFTTask
from nanokl.tokenizer import train_bpe

SMALL = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}


# ------------------------------------------------------------------------------------ exact ones
@pytest.fixture(scope="module")
def replies():
    return examples.point_mass()[1]


def test_point_mass_by_hand(replies):
    """-log p(y) from a softmax over all tokens in float64; the other KL by its formula."""
    model, tokenizer, [(ids, mine)] = examples.one_reply()
    said = [i for i, m in zip(ids, mine, strict=True) if m]
    assert tokenizer.decode(said) == " 5<|endoftext|>" and said == ids[-2:]
    model.double()
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0] @ model.head.weight.T
    nats = -sum(logits[t].log_softmax(-1)[ids[t + 1]].item() for t in (-3, -2))
    assert replies["before"]["from"] == pytest.approx(nats, abs=1e-5)
    for x in replies.values():
        p, e = x["p"], 1e-6
        assert x["to"] == math.inf and x["from"] == pytest.approx(-math.log(p))
        spread = (1 - p) * math.log(1 / e) + p * math.log(p / (1 - e + e * p))
        assert x["to_spread"] == pytest.approx(spread, rel=1e-9)
        assert x["sft"] == pytest.approx(x["from"], abs=1e-4)
    assert replies["after"]["from"] < 0.1 < 10 < replies["before"]["from"]


def test_point_mass_is_the_loss_of_sft(replies, tmp_path):
    """The task that train_rlhf.py sft trains, on a folder of that one talk; nats a token of two."""
    model, tokenizer, _ = examples.one_reply()
    rows = [json.dumps({"split": split, "messages": examples.TALK})
            for split in ("train", "val", "test")]
    (tmp_path / "conversations.jsonl").write_text("\n".join(rows))
    checkpoint.save(tmp_path / "gpt", model, tokenizer=tokenizer)
    task = SFTTask(Flags(data=tmp_path, init=tmp_path / "gpt", batch_size=4), CPU)
    assert 2 * task.loss(task.core, 0).item() == pytest.approx(replies["before"]["from"], abs=1e-4)


def test_tilting_by_loops():
    _, numbers = examples.tilting(beta=0.5)
    ref = law(table(examples.make_world(4, 3).ref), 4, 3)

    def tilt(p, r):
        z = sum(p[y] * math.exp(r(y) / 0.5) for y in p)
        return {y: p[y] * math.exp(r(y) / 0.5) / z for y in p}, math.log(z)

    def zeros(y):
        return y.count(0)

    def ends(y):
        return float(y[-1] == 3)

    both, log_z = tilt(ref, lambda y: zeros(y) + ends(y))
    assert numbers["log_z"] == pytest.approx(log_z)
    assert numbers["kl"] == pytest.approx(slow_kl(both, ref))
    assert numbers["kl_by_log_z"] == pytest.approx(numbers["kl"])
    for name, (first, then) in {"r1, then r2": (zeros, ends), "r2, then r1": (ends, zeros)}.items():
        once, z1 = tilt(ref, first)
        twice, z2 = tilt(once, then)
        assert numbers[name]["log_z"] == pytest.approx([z1, z2]) and z1 + z2 == pytest.approx(log_z)
        assert numbers[name]["off"] < 1e-14
        assert max(abs(twice[y] - both[y]) for y in ref) < 1e-14


def test_policy_gradient_by_finite_differences():
    """Autograd's, and the closed form's, against J of a small world by loops, moved by 1e-5."""
    ref, policy, r, beta = make((2, 3, 0.5, None, None, 1))
    world, p = World([x.clone().requires_grad_() for x in policy], ref), law(table(ref), 2, 3)

    def J(logits):
        q = law(table([x.log_softmax(1) for x in logits]), 2, 3)
        reward = sum(a * x for a, x in zip(q.values(), r.tolist(), strict=True))
        return reward - beta * slow_kl(q, p)

    slopes = []
    for t, i in ((t, i) for t, x in enumerate(policy) for i in range(x.numel())):
        sides = []
        for step in (1e-5, -1e-5):
            moved = [x.clone() for x in policy]
            moved[t].view(-1)[i] += step
            sides.append(J(moved))
        slopes.append((sides[0] - sides[1]) / 2e-5)
    logp, logp_ref = examples.exact.joint(policy), examples.exact.joint(ref)
    closed = (logp.exp() * (r - beta * (logp - logp_ref))) @ examples.scores(policy)
    wanted = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(closed, wanted, atol=1e-8, rtol=1e-7)
    by_autograd = world.gradient(examples.exact.objective(
        examples.exact.joint(world.policy), logp_ref, r, beta))
    torch.testing.assert_close(by_autograd, wanted, atol=1e-8, rtol=1e-7)


def test_policy_gradient_closed_sampled_and_wrong():
    """84 places, each off by 5 standard errors with odds of 6e-7: 5e-5 for all of them."""
    _, numbers = examples.policy_gradient()
    assert numbers["closed form"][0] < 1e-13 and numbers["places"] == 84
    assert 0.5 < numbers["largest_z"] < 5 and numbers["REINFORCE"][0] < 0.15
    assert numbers["no KL term"][0] > 0.5  # what the article's code would follow
    assert 0 < numbers["sd_baseline"] < numbers["sd_plain"]


def test_price_of_a_nat():
    """As beta falls, reward and KL rise along a slope that lies between the two betas."""
    _, numbers = examples.price_of_a_nat((2.0, 1.9, 1.0, 0.1, 0.01, 0.0))
    rows = numbers["rows"]
    for a, b in itertools.pairwise(rows):
        slope = (b["reward"] - a["reward"]) / (b["kl"] - a["kl"])
        assert a["kl"] < b["kl"] + 1e-9 and b["beta"] - 1e-9 <= slope <= a["beta"] + 1e-9, (a, b)
    last = rows[-1]
    assert last["reward"] == pytest.approx(numbers["most"]) and last["entropy"] == 0
    assert last["kl"] == pytest.approx(numbers["kl"])


def test_soft_q_and_sarsa_come_nearer():
    _, numbers = examples.soft_q_and_sarsa((50, 1000))
    assert numbers["v_root"] == pytest.approx(numbers["beta_log_z"], abs=1e-12)
    ways = [x for name, x in numbers.items() if "Q" in name or "SARSA" in name]
    assert len(ways) == 4 and all(x[1] < x[0] and x[1] < numbers["start"] / 5 for x in ways), ways
    assert numbers["soft Q, its own texts"][1] < 0.01


# --------------------------------------------------------------------------------- trained ones
def test_a_capital_that_was_not_read(monkeypatch):
    """7 of 12 by chance, 1 in 12 each: odds of 2e-5; and the sentence was not there indeed."""
    _, numbers = examples.masked_word()
    assert numbers["read"] | {"france": 0} == {"right": 36, "of": 36, "france": 0}
    assert numbers["unread"]["of"] == 12 and numbers["unread"]["right"] >= 7
    for x in numbers.values():
        word, p = x["france"][0]
        assert word == "paris" and 0.5 < p < 1 and sum(q for _, q in x["france"]) <= 1
    texts, shard_of = [], trained.shard_of
    monkeypatch.setattr(trained, "shard_of", lambda t, x: texts.extend(x) or shard_of(t, x))
    trained.train_on_capitals(("france", "cuba"), 1, 0)
    unread = [f"the capital of {a} is {b}." for a, b in trained.CAPITALS.items()
              if a in ("france", "cuba")]
    assert len(texts) == 34 and not set(unread) & set(texts)
    assert all(sum(a in x and b in x for x in texts) >= 2 for a, b in trained.CAPITALS.items())


def test_the_sentence_is_said_back():
    """Nobody can tell which of two sentences begins: log 2 nats. Who sees the answer needs none."""
    _, numbers = examples.says_it_back()
    assert numbers["said"] == "这是一个简单的GPT-2模型实现。" and numbers["last_nats"] < 0.3
    assert math.log(2) - 1e-3 < numbers["two_mask"] < math.log(2) + 0.15
    assert numbers["two_no_mask"] < math.log(2) / 4


def test_words_that_are_used_alike():
    """32 sentences, equally often: no model needs less than log 32 nats for one."""
    _, numbers = examples.alike()
    assert numbers["after"] == 1 and numbers["before"] < 0.2
    assert math.log(32) - 0.1 < numbers["last_nats"] < math.log(32) + 0.2


def test_apples_and_phones():
    """Each word's mean says it back, and half-way stands one of the three."""
    _, numbers = examples.apples_and_phones()
    for way, texts in numbers["said"].items():
        assert [texts[0], texts[-1]] == way.split(" to ") and set(texts) <= set(trained.WORDS)


def test_optimisers_on_the_same_task(tmp_path):
    """All start at one loss, near log V, and end below what no context brings, the characters' own

    entropy.
    """
    grid = {"SGD": ((0.3,), (1e-4,)), "Adam": ((0.01,), (1e-3,)), "AdamW": ((0.01,), (0.01,)),
            "Muon": ((0.03,), (0.01,))}  # fmt: skip
    _, numbers = examples.optimisers(tmp_path, grid=grid, steps=100, seeds=(1,))
    n = Counter(trained.VERSE)
    entropy = -sum(k / n.total() * math.log(k / n.total()) for k in n.values())
    assert len({tuple(x["first"]) for x in numbers.values()}) == 1
    assert numbers["SGD"]["first"][0] == pytest.approx(math.log(261), abs=0.1)
    for name, x in numbers.items():
        assert x["least"] <= x["loss"] <= x["most"] < entropy, (name, x, entropy)
    assert min(numbers, key=lambda name: numbers[name]["loss"]) == "Muon"
    assert (tmp_path / "optimisers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_first_step_of_each_optimiser_by_hand(name):
    """w = 2, gradient 3, rate .1, decay .5: L2 goes through Adam's sign, AdamW's does not."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    (optimizer,) = trained.optimizers_for(name, model, 0.1, 0.5)
    (3 * model.weight).sum().backward()
    optimizer.step()
    wanted = {"SGD": 2 - 0.1 * (3 + 0.5 * 2), "Adam": 2 - 0.1, "AdamW": 2 - 0.1 * 0.5 * 2 - 0.1}
    assert model.weight.item() == pytest.approx(wanted[name], abs=1e-6)


# ----------------------------------------------------------------------------------- neighbours
@pytest.mark.parametrize("ids", [[3], [3, 7, 3]])
def test_nearest_by_loops(ids):
    embedding = torch.randn(12, 5, generator=generator(0, "nearest"))
    unit = [x / x.norm() for x in embedding.double()]
    word = sum(unit[i] for i in ids)
    cosine = {i: cosine_similarity(x, word, dim=0).item() for i, x in enumerate(unit)
              if i not in ids}
    wanted = sorted(cosine, key=cosine.get, reverse=True)[:6]
    values, found = neighbours.nearest(embedding, ids, 6)
    assert found.tolist() == wanted
    assert values.tolist() == pytest.approx([cosine[i] for i in wanted], abs=1e-5)


def test_neighbours_of_runs(tmp_path):
    """A planted twin comes first, whatever its length; what cannot be asked is one line."""
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 280)
    for cls, config in ((GPT, GPTConfig), (BERT, BERTConfig)):
        model = cls(config(vocab_size=tokenizer.vocab_size, **SMALL), generator(0))
        (cat,), (mat,) = tokenizer.encode(" cat"), tokenizer.encode(" mat")
        with torch.no_grad():
            model.wte.weight[mat] = 5 * model.wte.weight[cat]
        checkpoint.save(tmp_path / cls.__name__, model, tokenizer=tokenizer)
        found = neighbours.of_run(tmp_path / cls.__name__, "cat", 3)
        assert found[0] == (" mat", pytest.approx(1.0)) and len(found) == 3
        assert found[1][1] < 0.99
    for word, k, says in (("", 3, "give one that is not blank"), ("cat", 0, "top_k is 0: give 1 "),
                          ("cat", 280, f"give 1 to {tokenizer.vocab_size - 1}")):
        with pytest.raises(UserError, match=says):
            neighbours.of_run(tmp_path / "GPT", word, k)
    vae = trained.VAE(trained.VAEConfig(vocab_size=280, n_latent=2, **SMALL), generator(0))
    checkpoint.save(tmp_path / "vae", vae, tokenizer=tokenizer)
    with pytest.raises(UserError, match="holds a VAE: give the run of a GPT or a BERT"):
        neighbours.of_run(tmp_path / "vae", "cat", 3)


# ------------------------------------------------------------------------------------- the list
def test_run_some_and_none(tmp_path):
    lines = list(examples.run(["tilting", "beta"], tmp_path / "new"))
    assert lines[0].startswith("tilting - article 001: ") and lines[-1].endswith("examples.json")
    saved = json.loads((tmp_path / "new" / "examples.json").read_bytes())
    assert saved.keys() == {"tilting", "beta"}
    assert saved["tilting"] == examples.tilting()[1]
    list(examples.run(["point-mass"], tmp_path / "new"))
    saved = json.loads((tmp_path / "new" / "examples.json").read_bytes())["point-mass"]
    assert saved["after"]["to"] is None and saved["after"]["from"] > 0  # JSON has no infinity
    with pytest.raises(UserError, match="no example is called sarsa, x: choose among masked-word"):
        list(examples.run(["tilting", "sarsa", "x"], tmp_path / "none"))
    with pytest.raises(UserError, match="is a file: choose a folder"):
        list(examples.run(["tilting"], tmp_path / "new" / "examples.json"))
    assert not (tmp_path / "none").exists()


def test_the_readmes_table_is_whole():
    """Each example under its article, all five articles, and no function that is not there."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The articles' examples")[1]
    section = section.split("\n## ")[0]
    rows = [row.split("|")[1:4] for row in re.findall(r"^\| 00.*", section, flags=re.M)]
    assert {article.split()[0] for article, *_ in rows} == {"000", "001", "002", "003", "004"}
    for name, example in examples.EXAMPLES.items():
        (article,) = (article for article, _, where in rows if f"`examples {name}`" in where)
        assert example.__doc__.startswith(article.split()[0] + ": "), name
    named = re.findall(r"`(\w+)\.(?!py`)(\w+)`", "".join(where for *_, where in rows))
    assert len(named) > 20
    for module, function in named:
        assert hasattr(importlib.import_module(f"nanokl.{module}"), function), (module, function)
