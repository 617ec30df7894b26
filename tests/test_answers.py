"""answers.py on the world of test_posterior.py, whose 85 texts a prompt are listed in float64.

And on folders: what a run of PPO brings along, and what else has to be given.
"""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from test_posterior import BETA, NEW, STOP, V, make, score

from nanokl import UserError, checkpoint, exact, ppo
from nanokl.answers import SAMPLERS, Answers, guarded, guess_twist, open_answers
from nanokl.chat import CHAT_SPECIALS
from nanokl.generate import generate
from nanokl.gpt import GPT, GPTConfig
from nanokl.runtime import generator
from nanokl.samplers import Target, sir
from nanokl.tokenizer import Tokenizer

PROMPT = [0, 2]


def world(sampler: str, *, alone: bool = False, n: int = 16, **more) -> Answers:
    """Reference, policy with a critic and reward; `alone`: the reference and reward."""
    stage, policy = make()
    stage.guess = score
    return Answers(stage, None if alone else policy, sampler, n, BETA, critic=not alone, **more)


def listed(answers: Answers) -> dict:
    """Texts, their rewards and laws, float64; log Z."""
    levels = [exact.levels_of(m, PROMPT, NEW, stop=STOP, temperature=0.8)
              for m in (answers.stage.ref, answers.policy) if m is not None]
    texts = [y[: y.index(STOP) + 1] if STOP in y else y for y in exact.texts(V, NEW).tolist()]
    r = torch.tensor(score([PROMPT + y for y in texts], None), dtype=torch.float64)
    laws = [exact.joint(level) for level in levels]
    star, log_z = exact.posterior(laws[0], r, BETA)
    return {"texts": texts, "r": r, "ref": laws[0], "policy": laws[-1], "star": star,
            "log_z": log_z.item(), "levels": levels}


def within(x: torch.Tensor, mean: float) -> None:
    """The mean of x is at most 5 standard errors away: odds 6e-7, a little more if x is skewed."""
    assert abs(x.mean().item() - mean) < 5 * x.std().item() / len(x) ** 0.5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["ref", "policy"])
def test_the_law_of_a_streamed_answer(name):
    """1,000 answers: their mean reward, and how often they begin with each token.

    Counts are at most 5 standard deviations and 3 away: odds below 1e-6 for rare ones, too.
    """
    answers, turns = world("policy"), 1000
    true = listed(answers)
    said = [list(answers.stream(name, PROMPT, turn)) for turn in range(turns)]
    r = torch.tensor(score([PROMPT + y for y in said], None), dtype=torch.float64)
    within(r, exact.expectation(true[name], true["r"]).item())
    first = true["levels"][name == "policy"][0][0].exp()
    for token, p in enumerate(first.tolist()):
        n = sum(y[0] == token for y in said)
        assert abs(n - turns * p) < 5 * (turns * p * (1 - p)) ** 0.5 + 3
    config, rng = answers.stage.config, generator(0, "chat", 7)
    model = answers.policy if name == "policy" else answers.stage.ref
    theirs = generate(model, [PROMPT], NEW, stop=STOP, temperature=config.temperature, rng=rng)
    assert theirs.responses() == [said[7]]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("alone", [True, False], ids=["reference", "policy"])
@pytest.mark.parametrize("sampler", ["sir", "mh", "smc"])
def test_chosen_answers_come_with_an_unbiased_z(sampler, alone):
    """E Zhat = Z for every proposal and twist; and what is chosen is better than the reference."""
    answers, turns = world(sampler, alone=alone), 150
    true = listed(answers)
    draws = [answers.draw(PROMPT, turn) for turn in range(turns)]
    within(torch.cat([d.log_z for d in draws]).double().exp(), math.exp(true["log_z"]))
    scores = torch.cat([d.score for d in draws]).double()
    before = exact.expectation(true["ref"], true["r"]).item()
    after = exact.expectation(true["star"], true["r"]).item()
    assert scores.mean() > before + 0.5 * (after - before)
    assert scores.mean() < after + 5 * scores.std() / turns**0.5
    for d in draws[:9]:
        assert score([PROMPT + d.rollout.responses()[0]], None)[0] == pytest.approx(d.score.item())


@pytest.mark.usefixtures("one_thread")
def test_the_law_of_best_of_n():
    answers = world("best-of-n", n=3)
    true = listed(answers)
    scores = torch.cat([answers.draw(PROMPT, turn).score for turn in range(400)]).double()
    law = exact.best_of_n(true["ref"], true["r"], 3)
    within(scores, exact.expectation(law, true["r"]).item())
    kl = exact.kl(law, true["ref"]).item()
    most = float(re.search(r"at most ([\d.]+) nats  best of 3", answers.tell(
        answers.draw(PROMPT, 0)))[1])
    assert kl - 0.005 < most == pytest.approx(math.log(3) - 2 / 3, abs=0.005)


@pytest.mark.usefixtures("one_thread")
def test_numbers_of_a_streamed_answer():
    """The exact KL along the answer, from full distributions in float64; the whole text's score."""
    answers = world("policy")
    levels = listed(answers)["levels"]
    for turn in range(5):
        response = list(answers.stream("policy", PROMPT, turn))
        kl, row = 0.0, 0
        for t, token in enumerate(response):
            ref, policy = (level[t][row] for level in levels)
            kl, row = kl + exact.kl(policy, ref).item(), row * V + token
        told = answers.judge("policy", PROMPT, response)
        r, nats = map(float, re.fullmatch(r"reward (\S+)  KL (\S+) nats", told).groups())
        assert r == pytest.approx(score([PROMPT + response], None)[0], abs=0.0051)
        assert nats == pytest.approx(kl, abs=0.0051) and kl > 0.01
        assert answers.judge("ref", PROMPT, response) == f"reward {r:+.2f}  KL 0.00 nats"


def test_numbers_of_a_chosen_answer():
    answers = world("sir", n=64)
    draws = answers.draw(PROMPT, 3)
    told = answers.tell(draws)
    kl = draws.score.item() / BETA - draws.log_z.item()
    assert f"KL about {kl:.2f} nats  one of 64, ESS " in told
    true = listed(answers)
    said = draws.rollout.responses()[0]
    at = max((i for i, y in enumerate(true["texts"]) if y == said), key=lambda i: true["ref"][i])
    exactly = (true["star"] - true["ref"])[at].item()
    assert kl == pytest.approx(exactly, abs=0.5)  # Z of 64 proposals
    assert re.search(r"accepted 0.\d\d of 16 steps", world("mh").tell(world("mh").draw(PROMPT, 0)))


def test_the_same_numbers_for_prior_and_posterior():
    """Where policy and reference are one model, they say the same; another turn, another text."""
    answers = world("policy")
    twin = replace(answers, policy=ppo.make_policy(answers.stage.ref))
    said = [[list(twin.stream(name, PROMPT, turn)) for name in ("ref", "policy")]
            for turn in range(8)]
    assert all(a == b for a, b in said) and len({tuple(a) for a, _ in said}) > 1
    other = replace(answers, seed=1)
    assert [list(other.stream("ref", PROMPT, t)) for t in range(8)] != [a for a, _ in said]


@pytest.mark.parametrize("alone", [True, False])
def test_half_of_the_proposals_are_the_policys_where_there_is_one(alone):
    answers = world("sir", alone=alone)
    target = Target(answers.stage, BETA, answers.policy)
    for turn in range(5):
        rng = generator(0, "chat", turn, "sir")
        wanted = sir(target, [PROMPT], 1, rng, m=16, proposal="ref" if alone else "mixture")
        draws = answers.draw(PROMPT, turn)
        assert torch.equal(draws.log_z, wanted.log_z) and torch.equal(draws.score, wanted.score)


def test_the_guess_as_a_twist():
    stage = world("smc").stage
    idx = torch.tensor([[0, 1, 2], [3, 3, 0]])
    got = guess_twist(stage, 0.25)(idx)
    assert got.tolist() == pytest.approx([4 * x for x in score(idx.tolist(), None)])


def test_another_price_and_temperature():
    answers = world("sir")
    assert answers.at(beta=0.1).beta == 0.1 and answers.beta == BETA
    hot = answers.at(temperature=2)
    assert hot.stage.config.temperature == 2 and answers.stage.config.temperature == 0.8
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="give a number above 0"):
            answers.at(beta=bad)
        with pytest.raises(UserError, match="give 0.001 or more"):
            answers.at(temperature=bad)
    with pytest.raises(UserError, match="temperature is 1e-40: give 0.001 or more"):
        answers.at(temperature=1e-40)


def test_a_reward_that_fails_is_named():
    def fails(ids, texts):
        raise KeyError("no such\nword")

    def refuses(ids, texts):
        raise UserError("not this one")

    with pytest.raises(UserError, match=r"the reward failed \(KeyError: 'no such\\nword'\)"):
        guarded(fails)([[1]], ["x"])
    with pytest.raises(UserError, match="^not this one$"):
        guarded(refuses)([[1]], ["x"])
    assert guarded(score)([[1]], ["x"]) == score([[1]], ["x"])


# ---------------------------------------------------------------------------------------- folders
def tiny(path, *, block_size: int = 64, specials=CHAT_SPECIALS) -> GPT:
    """A GPT of bytes, by random weights, saved at path."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)], specials=specials)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=block_size, n_layer=1,
                          n_head=2, n_embd=16), generator(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(1, p.numel())))
    checkpoint.save(path, model, tokenizer=tokenizer)
    return model


def run_of_ppo(folder, **flags):
    """What train_rlhf.py ppo leaves: a policy, its flags, and what these name."""
    ref = tiny(folder / "ref")
    policy = ppo.make_policy(ref, critic_layers=1)
    with torch.no_grad():
        policy.head.weight.add_(0.1 * torch.randn(policy.head.weight.shape,
                                                  generator=generator(2)))
    tokenizer = Tokenizer.load(folder / "ref")
    checkpoint.save(folder / "run" / "last", policy, tokenizer=tokenizer)
    (folder / "data").mkdir()
    (folder / "data" / "conversations.jsonl").write_text(json.dumps(
        {"split": "val", "messages": [{"role": "user", "content": "hi"}]}))
    (folder / "short.py").write_text("def reward(ids, texts): return [-len(i) / 9 for i in ids]")
    given = {"data": str(folder / "data"), "policy": str(folder / "ref"), "beta": 0.25, "seed": 0,
             "reward": f"{folder / 'short.py'}:reward", "max_new_tokens": 12, "max_prompt": 20,
             "temperature": 0.9, "shaping": True, "method": "ppo", "dtype": "float32"}
    (folder / "run" / "flags.json").write_text(json.dumps({**given, **flags}))
    return folder / "run"


@pytest.fixture
def opened(tmp_path, untuned):
    return lambda run, **more: open_answers(run, device="cpu", **more)


def test_a_run_of_ppo_brings_everything_along(tmp_path, opened):
    run = run_of_ppo(tmp_path)
    for sampler in SAMPLERS:
        answers = opened(run, sampler=sampler, n=4)
        config = answers.stage.config
        assert (answers.beta, config.max_new_tokens, config.temperature) == (0.25, 12, 0.9)
        assert answers.names == (["ref"] if sampler == "ref" else ["ref", sampler])
        assert answers.room == 64 - 12
        if sampler not in ("policy", "ref"):
            draws = answers.draw([256, 1, 2], 0)
            n = len(draws.rollout.rows()[0])
            assert draws.score.item() == pytest.approx(-n / 9)
            assert f"reward {-n / 9:+.2f}  KL " in answers.tell(draws)
    changed = opened(run, beta=0.5, temperature=1.5, max_new_tokens=3, sampler="mh")
    assert (changed.beta, changed.stage.config.temperature, changed.room) == (0.5, 1.5, 61)
    other = tmp_path / "zero.py"
    other.write_text("def zero(ids, texts):\n    return [0.0] * len(ids)")
    assert opened(run, reward=f"{other}:zero").judge("ref", [256, 1], [2]).startswith("reward +0")


def test_without_a_critic_smc_follows_the_rewards_guess(tmp_path, opened):
    """Of a method without a critic the value head is not asked."""
    run = run_of_ppo(tmp_path, method="rloo", group=8)
    answers = opened(run, sampler="smc", n=4)
    assert not answers.critic
    with torch.no_grad():
        answers.policy.value.weight.fill_(math.nan)
    assert answers.draw([256, 1], 0).log_z.isfinite().all()


def test_any_gpt_answers_alone_or_is_the_reference(tmp_path, opened):
    run_of_ppo(tmp_path)
    alone = opened(tmp_path / "ref")
    assert alone.names == ["policy"] and alone.judge("policy", [256, 1], [2]) == ""
    assert alone.stage.config.max_new_tokens == 40 and alone.stage.config.temperature == 1
    reward = f"{tmp_path / 'short.py'}:reward"
    for sampler in ("best-of-n", "sir", "mh", "smc"):
        answers = opened(tmp_path / "ref", sampler=sampler, reward=reward, beta=1.0, n=4)
        assert answers.names == ["ref", sampler] and answers.policy is None
        assert answers.draw([256, 1], 0).score.item() < 0
    assert opened(tmp_path / "ref", sampler="ref", reward=reward).names == ["ref"]


@pytest.mark.parametrize(("given", "says"), [
    ({"sampler": "gibbs"}, "sampler is 'gibbs': give one of policy, ref"),
    ({"sampler": "ref"}, "--sampler ref needs a reference and a reward: give a run"),
    ({"sampler": "sir"}, "--sampler sir needs a reference and a reward: give a run"),
    ({"sampler": "sir", "reward": True}, "beta None: give --beta"),
    ({"reward": True}, "this run is the reference, and there is no policy: give --sampler ref"),
    ({"n": 0}, "n is 0: give at least 1"),
    ({"beta": 0.0}, "beta is 0.0: give a number above 0"),
    ({"temperature": math.inf}, "temperature is inf: give 0.001 or more"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0: give a number above 0"),
    ({"max_new_tokens": 61}, "max_new_tokens is 61: give at most 60"),
    ({"reward": "no.py:f"}, "no file 'no.py'"),
])  # fmt: skip
def test_what_does_not_go_together(tmp_path, opened, given, says):
    tiny(tmp_path / "ref")
    if given.get("reward") is True:
        (tmp_path / "r.py").write_text("def f(ids, texts): return [0] * len(ids)")
        given = {**given, "reward": f"{tmp_path / 'r.py'}:f"}
    with pytest.raises(UserError, match=re.escape(says)):
        opened(tmp_path / "ref", **given)
    opened(tmp_path / "ref", max_new_tokens=60)


def test_a_run_that_paid_nothing_for_a_nat(tmp_path, opened):
    """--beta 0: no posterior, so that a price has to be given."""
    run = run_of_ppo(tmp_path, beta=0.0)
    assert opened(run).beta == 0
    with pytest.raises(UserError, match="--sampler sir and beta 0.0: give --beta"):
        opened(run, sampler="sir")
    assert opened(run, sampler="sir", beta=1.0).beta == 1


def test_whole_texts_are_measured_in_their_own_width(tmp_path, opened):
    """The prompt of a long conversation, longer than any in training; KL of a known pair."""
    answers = opened(run_of_ppo(tmp_path))
    prompt, response = [256, *range(45)], [1, 2, answers.stop]
    kl = 0.0
    idx = torch.tensor([prompt + response])
    with torch.no_grad():
        p, q = ((m.double().head(m(idx)[0]).double() / 0.9).log_softmax(-1)
                for m in (answers.policy, answers.stage.ref))
    for t in range(len(prompt) - 1, len(prompt) + 2):
        kl += (p[t].exp() * (p[t] - q[t])).sum().item()
    answers.policy.float(), answers.stage.ref.float()
    assert answers.judge("policy", prompt, response).endswith(f"KL {kl:.2f} nats") and kl > 0.1
    for sampler in ("best-of-n", "sir", "mh", "smc"):  # a prompt that fills the context
        full = replace(answers, sampler=sampler, n=4)
        assert full.draw([256, *[7] * (full.room - 1)], 0).score.isfinite().all()
