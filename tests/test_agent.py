"""agent.py against dialogues played one by one by hand, and PPO's gradient in a dialogue of which

everything can be listed.
"""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_transformer import randomise

from nanokl import UserError, chat, ppo
from nanokl.agent import Agent, Talk, _pack, hear, openings, play
from nanokl.chat import CHAT_SPECIALS, encode_turn
from nanokl.dialogue import Arithmetic, OpenChat, Step
from nanokl.generate import generate
from nanokl.gpt import GPT, GPTConfig
from nanokl.runtime import Runtime, generator
from nanokl.tokenizer import train_bpe

TOKENIZER = train_bpe("no, try again. thank you. what is 7 plus 5? " * 9, 300,
                      specials=CHAT_SPECIALS)
STOP, USER, ASSISTANT = map(TOKENIZER.special, ("<|endoftext|>", "<|user|>", "<|assistant|>"))
CPU = Runtime(torch.device("cpu"), torch.float32)
CONFIG = ppo.PPOConfig(max_prompt=48, max_new_tokens=5, turns=3, env="x")


def gpt(vocab_size=TOKENIZER.vocab_size, block_size=160, seed=0):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **sizes))
    return randomise(model, seed).requires_grad_(False).eval()


def uniform(n, config=CONFIG, seed=0):
    return torch.rand(n, config.turns * config.max_new_tokens, generator=generator(seed))


def by_hand(model, opening, u, config):
    """A dialogue as a list of (id, whether it is the model's, paid), and whether it has stopped."""
    env = Arithmetic("val", languages=("en",), turns=3)
    obs, _ = env.reset(seed=opening.seed)
    text = [(i, False, 0.0) for i in [STOP, *encode_turn(TOKENIZER, **obs[0]), ASSISTANT]]
    for turn in range(config.turns):
        part = u[None, turn * config.max_new_tokens : (turn + 1) * config.max_new_tokens]
        out = generate(model, [[i for i, *_ in text]], config.max_new_tokens, stop=STOP, u=part)
        reply, stopped = out.responses()[0], bool(out.stopped[0])
        words = re.split(r"<\|(?:endoftext|user|assistant)\|>", TOKENIZER.decode(reply))[0]
        obs, reward, terminated, truncated, _ = env.step(words)
        text += [(i, True, 0.0) for i in reply[:-1]] + [(reply[-1], True, reward)]
        if terminated or truncated or turn == config.turns - 1:
            return text, stopped
        answer = ([] if stopped else [STOP]) + encode_turn(TOKENIZER, **obs[-1]) + [ASSISTANT]
        text += [(i, False, 0.0) for i in answer]


def test_play_equals_dialogues_by_hand():
    env, model = Arithmetic("val", languages=("en",), turns=3), gpt(seed=3)
    opened = openings(env, TOKENIZER, 12)
    u = uniform(12)
    rollout = play(model, opened, CONFIG, CPU, TOKENIZER, u=u)
    assert rollout.idx.shape == (12, CONFIG.width)
    replies = []
    for i, row in enumerate(rollout.rows()):
        text, stopped = by_hand(model, opened[i], u[i], CONFIG)
        assert row == [x for x, *_ in text] and rollout.stopped[i] == stopped
        n = len(text) - 1
        assert rollout.mask[i, :n].tolist() == [mine for _, mine, _ in text[1:]]
        assert rollout.paid[i, :n].tolist() == [paid for *_, paid in text[1:]]
        assert not rollout.mask[i, n:].any() and not rollout.paid[i, n:].any()
        assert rollout.n_prompt[i] == len(opened[i])
        replies.append(int((rollout.mask[i, 1:] & ~rollout.mask[i, :-1]).sum()))
    assert max(replies) == 3  # the user does answer
    # each token's log-prob is that of the whole text before it, the user's words with it
    logp = model.logits(model(rollout.idx)).log_softmax(-1)[:, :-1]
    logp = logp.gather(2, rollout.idx[:, 1:, None])[..., 0]
    torch.testing.assert_close(rollout.logp, logp * rollout.mask, rtol=0, atol=2e-5)


def test_a_dialogue_is_the_same_in_any_company_and_on_any_rank():
    env, model = Arithmetic("train", turns=3), gpt(seed=1)
    opened, u = openings(env, TOKENIZER, 6), uniform(6)
    whole = play(model, opened, CONFIG, CPU, TOKENIZER, u=u)
    assert play(model, opened, CONFIG, CPU, TOKENIZER, u=u).rows() == whole.rows()
    for rank in range(2):
        half = SimpleNamespace(shard=lambda x, rank=rank: x[rank::2], gather=lambda x: x,
                               autocast=nullcontext)
        mine = play(model, opened, CONFIG, half, TOKENIZER, u=u)
        assert mine.rows() == whole.rows()[rank::2]
        assert torch.equal(mine.paid, whole.paid[rank::2])


def reply(talk, ids, stopped):
    """Of one dialogue by itself; whether it goes on."""
    return talk.reply(ids, [0.0] * len(ids), stopped, *hear([talk], [ids])[0])


def test_a_line_too_long_for_the_context_ends_a_dialogue():
    opened = openings(Arithmetic("train", languages=("en",), turns=3), TOKENIZER, 1)
    answer = [STOP, *encode_turn(TOKENIZER, "user", "No, try again."), ASSISTANT]
    for room, goes_on in ((len(answer), True), (len(answer) - 1, False)):
        config = ppo.PPOConfig(max_prompt=room, env="x", turns=3)
        talk = Talk(opened[0], config, TOKENIZER)
        assert reply(talk, TOKENIZER.encode(" x"), False) == goes_on
        assert (talk.ids[-len(answer) :] == answer) == goes_on


class Broken(Arithmetic):
    """A user's own environment, with a mistake."""

    mistake = staticmethod(lambda step: step)

    def step(self, action):
        return type(self).mistake(super().step(action))


class Restless(Arithmetic):
    """Chance that the seed does not know."""

    count = 0

    def reset(self, *, seed=None, options=None):
        type(self).count += 1
        return super().reset(seed=seed + self.count)


class InPlace(Arithmetic):
    """Its state is changed in place, and made once."""

    def __post_init__(self):
        super().__post_init__()
        self.log = []

    def reset(self, *, seed=None, options=None):
        self.log.clear()
        return super().reset(seed=seed)

    def step(self, action):
        self.log.append(action)
        step = super().step(action)
        return step._replace(reward=float(len(self.log)))


@pytest.mark.parametrize(("mistake", "says"), [
    (lambda s: 1 / 0, "Broken.step fails .ZeroDivisionError: division by zero.: mend it"),
    (lambda s: s[:4], "Broken.step fails .ValueError: not enough values"),
    (lambda s: s._replace(reward=None), "Broken.step fails .TypeError"),
    (lambda s: s._replace(obs=()), "Broken.step fails .IndexError"),
    (lambda s: s._replace(reward=float("nan")), "Broken.step gives the reward nan"),
    (lambda s: s._replace(obs=s.obs[:-1]), "end on what the user says"),
])  # fmt: skip
def test_an_environment_that_breaks_its_word(mistake, says, monkeypatch):
    monkeypatch.setattr(Broken, "mistake", staticmethod(mistake))
    opened = openings(Broken("train", turns=3), TOKENIZER, 2)
    with pytest.raises(UserError, match=says):
        play(gpt(), opened, CONFIG, CPU, TOKENIZER, u=uniform(2))


def test_chance_belongs_to_the_seed_and_each_dialogue_has_a_state_of_its_own():
    opened = openings(Restless("train"), TOKENIZER, 2)
    with pytest.raises(UserError, match="Restless says something else at each reset.seed=0."):
        play(gpt(), opened, CONFIG, CPU, TOKENIZER, u=uniform(2))
    opened = openings(InPlace("train", turns=3, languages=("en",)), TOKENIZER, 4)
    rollout = play(gpt(), opened, CONFIG, CPU, TOKENIZER, u=uniform(4))
    for row in rollout.paid:  # the first reply of each is its first
        assert row[row > 0].tolist() == list(range(1, 1 + int((row > 0).sum())))


class Letters:
    """Six tokens: a world whose dialogues can all be listed."""

    specials = ("<|endoftext|>", "<|user|>", "<|assistant|>")
    words = (*specials, "a", "b", "c")
    vocab_size = 6

    def special(self, name):
        return self.words.index(name)

    def encode(self, text):
        return [self.words.index(c) for c in text.strip()]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


class Echo:
    """The user's second line, and what a reply is worth, depend on every word of the reply."""

    def reset(self, *, seed=None, options=None):
        self.messages = [{"role": "user", "content": "abc"[seed % 3]}]
        return tuple(self.messages), {}

    def step(self, action):
        self.messages.append({"role": "assistant", "content": action})
        worth = sum((i + 1) * "abc".find(c) for i, c in enumerate(action)) / len(self.messages)
        self.messages.append({"role": "user", "content": "ab"[len(action) % 2] + action[:1][-1:]
                              if action[:1] in ("a", "b", "c") else "c"})
        return Step(tuple(self.messages), worth, action == "b", False, {})


def all_dialogues(config):
    """Every dialogue of the first seed: finished Talks."""
    letters, replies = Letters(), [[0]] + [[x, y] for x in range(1, 6) for y in range(6)]
    (opening,) = openings(Echo(), letters, 1)
    done, going = [], [[]]
    for turn in range(config.turns):
        longer = []
        for said in (before + [reply] for before in going for reply in replies):
            talk = Talk(opening, config, letters)
            goes_on = [reply(talk, r, r[-1] == 0) for r in said][-1]
            if goes_on and turn + 1 < config.turns:
                longer.append(said)
            else:
                done.append(talk)
        going = longer
    return done


def test_gradient_of_ppo_is_that_of_the_objective_of_all_dialogues():
    """J = E[what is paid] - beta KL, by automatic differentiation over the 900-odd dialogues."""
    config = ppo.PPOConfig(max_prompt=6, max_new_tokens=2, turns=2, env="x")
    rollout, beta = _pack(all_dialogues(config), torch.device("cpu")), 0.3
    mask, policy, ref = rollout.mask, gpt(6, 32, seed=1).double(), gpt(6, 32, seed=2).double()
    policy.requires_grad_(True)

    def logp_of(model):
        logits = model(rollout.idx)[:, :-1].double() @ model.head.weight.T
        return logits.log_softmax(-1).gather(2, rollout.idx[:, 1:, None])[..., 0]

    logp, logp_ref = logp_of(policy), logp_of(ref)
    total, total_ref = ((x * mask).sum(1) for x in (logp, logp_ref))
    for x in (total, total_ref):  # they are all there, each once
        assert x.exp().sum().item() == pytest.approx(1, abs=1e-9)
    paid = rollout.paid.double()
    objective = (total.exp() * (paid.sum(1) - beta * (total - total_ref))).sum()
    want = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True,
                               allow_unused=True)
    with torch.no_grad():
        reward = ppo.kl_penalised_reward(logp, logp_ref, paid, mask, beta=beta)
        adv, _ = ppo.gae(reward, torch.zeros_like(reward), mask, gamma=1.0, lam=1.0)
    surrogate = (total.exp().detach()[:, None] * adv * logp * mask).sum()
    got = torch.autograd.grad(surrogate, list(policy.parameters()), allow_unused=True)
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None]
    assert max(b.abs().max() for _, b in pairs) > 0.1
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_what_the_user_says_is_in_no_loss():
    """Junk in the experience at the user's tokens changes neither loss nor gradient."""
    config = ppo.PPOConfig(max_prompt=48, max_new_tokens=5, turns=3, minibatch=8, env="x")
    ref = gpt(seed=4)
    policy = ppo.make_policy(ref, critic_layers=1)
    opened = openings(Arithmetic("train", turns=3), TOKENIZER, 8)
    rollout = play(policy, opened, config, CPU, TOKENIZER, u=uniform(8))
    rows, grads = torch.arange(8), []
    gaps = (~rollout.mask[:, :-1] & (rollout.mask.cumsum(1) > 0)[:, :-1]).any()
    assert gaps
    x = ppo.collect(policy, ref, rollout, rollout.paid.sum(1), [rows], config, CPU, beta=0.1,
                    shares=rollout.paid)
    for junk in (0.0, 1e3):
        for name in ("logp", "logp_ref", "value", "adv", "ret"):
            setattr(x, name, torch.where(rollout.mask, getattr(x, name), junk))
        loss, _ = ppo.minibatch_loss(policy, policy, x, rows, config, CPU)
        loss.backward()
        grads.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
        policy.zero_grad(set_to_none=True)
    assert len(grads[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_agent_answers_and_needs_turns(tmp_path):
    model = gpt(block_size=64)
    agent = Agent(model, TOKENIZER, max_new_tokens=6, temperature=0.0)
    talk = [{"role": "user", "content": "what is 7 plus 5?"}]
    reply = agent.select_action(talk)
    ids = [STOP, *encode_turn(TOKENIZER, **talk[0]), ASSISTANT]
    out = generate(model, [ids], 6, temperature=0.0, stop=STOP).responses()[0]
    assert reply == re.split(r"<\|", TOKENIZER.decode(out))[0].strip()
    assert isinstance(agent.select_action(20 * talk), str)  # the oldest turns make room
    with pytest.raises(UserError, match="no <|assistant|> and no <|user|>"):
        openings(Arithmetic(), train_bpe("a b c " * 9, 270), 3)


def open_chat(turns):
    say = lambda *texts: [{"role": chat.ROLES[i % 2], "content": t} for i, t in enumerate(texts)]  # noqa: E731
    talks = [chat.Conversation("x", "train", say("hi", "hello", "bye", "bye"), {}),
             chat.Conversation("y", "train", say("one", "1", "two", "2", "three"), {}),
             chat.Conversation("z", "train", [{"role": "assistant", "content": "so"}], {})]
    return OpenChat(talks, lambda texts: [float(len(t)) for t in texts], turns)


def test_open_chat_asks_for_the_scores_of_many_dialogues_at_once():
    """And the same comes of it as one by one."""
    asked, lines = [], open_chat(turns=2)
    lines.score = lambda texts: (asked.append(len(texts)), [float(len(t)) for t in texts])[1]
    opened = openings(lines, TOKENIZER, 6)
    rollout = play(gpt(), opened, CONFIG, CPU, TOKENIZER, u=uniform(6))
    assert asked == [12, 6]  # first lines and first replies, second replies
    for i, (opening, row) in enumerate(zip(opened, rollout.paid, strict=True)):
        alone = play(gpt(), [opening], CONFIG, CPU, TOKENIZER, u=uniform(6)[i : i + 1])
        assert alone.rows() == [rollout.rows()[i]]
        assert alone.paid[alone.paid != 0].tolist() == row[row != 0].tolist()


def test_a_reply_ends_where_somebody_else_would_speak():
    """No policy is paid for words that it puts into the user's mouth."""
    env, heard = open_chat(turns=2), []
    env.score = lambda texts: (heard.extend(texts), [0.0] * len(texts))[1]
    talk = Talk(openings(env, TOKENIZER, 1)[0], CONFIG, TOKENIZER)
    a, b = TOKENIZER.encode(" hm"), TOKENIZER.encode(" how interesting!")
    assert reply(talk, [*a, *encode_turn(TOKENIZER, "user", "wow"), ASSISTANT, *b, STOP], True)
    assert heard[1] == f"{heard[0]}<|assistant|> hm"
    for cut in ([*a, STOP], a, [*a, ASSISTANT, *b], [*a, STOP, *b]):
        assert chat.reply_text(TOKENIZER, cut) == "hm"


def test_open_chat_says_its_lines_and_pays_what_a_reply_adds():
    env = open_chat(turns=5)
    obs, info = env.reset(seed=0, options={"talk": 1})
    assert obs == ({"role": "user", "content": "one"},) and info == {"id": "y"}
    first, paid, steps = len("<|user|> one"), 0.0, []
    for reply in ("uno", "dos!", ""):
        before = obs
        obs, reward, *end, _ = env.step(reply)
        assert len(before) < len(obs)  # what was observed stays
        paid += reward
        steps.append(end)
    assert steps == [[False, False], [False, False], [True, False]]
    assert [m["content"] for m in obs] == ["one", "uno", "two", "dos!", "three", ""]
    assert paid == len(chat.spell(obs)) - first
    with pytest.raises(UserError, match="is over"):
        env.step("more")
    env = open_chat(turns=1)
    env.reset(options={"talk": 0})
    assert env.step("x")[2:4] == (False, True)
    assert {open_chat(1).reset(seed=seed)[1]["id"] for seed in range(20)} == {"x", "y"}
    with pytest.raises(UserError, match="talk is 2: give 0 to 1"):
        env.reset(options={"talk": 2})
    with pytest.raises(UserError, match="0 conversations begin with a user"):
        OpenChat(env.talks[:0], env.score)
    with pytest.raises(UserError, match="has not begun"):
        open_chat(1).step("x")
