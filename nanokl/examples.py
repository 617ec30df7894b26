"""The examples of the articles that nanokl starts from, repaired: what is exact, and the list.

Texts of the exact ones are the V^T texts of a tree (exact.py), so that each number has one that it
must be equal to. A function returns lines for people and numbers for tests and files. The articles
are 000 (language models in Bayes' view), 001 (KL, RL and Bayes), 002 (RL in Bayes' view), 003 (the
basics) and 004 (RLHF, and a language model as a VAE); the README has a table of all that they show.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanokl import UserError, chat, exact, sft, soft_q
from nanokl.examples_trained import (
    Told,
    alike,
    apples_and_phones,
    fit,
    masked_word,
    muon_and_adamw,
    optimisers,
    says_it_back,
)
from nanokl.gpt import GPT, GPTConfig
from nanokl.kl_table import error_and_cosine, make_world
from nanokl.logprob import linear_logprob
from nanokl.metrics import write_json
from nanokl.runtime import generator
from nanokl.tokenizer import train_bpe

TALK = [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5"}]


def reply_nats(model: GPT, rows: Sequence[sft.Row]) -> Tensor:
    """The loss of sft.py on these rows, in nats in all."""
    idx, mask = sft.pack(rows, rows[0][0][0])
    return -linear_logprob(model(idx[:, :-1]), model.head.weight, idx[:, 1:], mask=mask).logp.sum()


def one_reply():
    """A GPT that has learnt nothing yet, its tokenizer, and a talk whose reply has two tokens."""
    tokenizer = train_bpe([" 5"] * 2, 264, specials=chat.CHAT_SPECIALS)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2,
                       n_embd=32)
    talk = chat.Conversation("sum", "train", TALK, {})
    return GPT(config, generator(0, "point")), tokenizer, sft.rows_of(tokenizer, [talk], 16)


# delta = point mass on y:   KL(pi || delta) = infinite if pi can say anything but y
#                            KL(delta || pi) = -log pi(y)
# With a share e of delta spread over pi, p = pi(y):
#     KL(pi || (1 - e) delta + e pi) = (1 - p) log(1 / e) + p log(p / (1 - e + e p))
def measure_point_mass(model: GPT, rows: Sequence[sft.Row], e: float = 1e-6) -> dict:
    """Both KLs between a model and the point mass on a reply of two tokens, and SFT's loss."""
    (ids, mine), = rows
    at, V = mine.index(True), model.config.vocab_size
    y = ids[at] * V + ids[at + 1]  # the reply's place among all V^2
    logp = exact.joint(exact.levels_of(model, ids[:at], 2, stop=ids[0]))
    delta = torch.full_like(logp, -torch.inf)
    delta[y] = 0
    spread = torch.logaddexp(delta + math.log(1 - e), logp + math.log(e))
    return {"to": exact.kl(logp, delta).item(), "to_spread": exact.kl(logp, spread).item(),
            "from": exact.kl(delta, logp).item(), "sft": reply_nats(model, rows).item(),
            "p": logp[y].exp().item()}


def point_mass(steps: int = 60) -> Told:
    """001: KL to and from the point mass on one reply: one is infinite, one is SFT's loss."""
    model, _, rows = one_reply()
    numbers = {"before": measure_point_mass(model, rows)}
    fit(lambda step: reply_nats(model, rows), muon_and_adamw(model), steps)
    numbers["after"] = measure_point_mass(model, rows)
    return [f"{when:7}KL(pi || point mass) {x['to']}, with a millionth of it spread over pi "
            f"{x['to_spread']:.4f}; KL(point mass || pi) {x['from']:.4f}, SFT's loss "
            f"{x['sft']:.4f} nats" for when, x in numbers.items()], numbers


# grad log pi(y) by the logit of token a at prefix s is 1[a = y_t] - pi(a | s) where y goes through
# s, else 0.
def scores(policy: exact.Levels) -> Tensor:
    """grad log pi(y) by all logits (V^T, sum_t V^t V), of the texts in their order."""
    V, T = policy[0].shape[1], len(policy)
    y, blocks = torch.arange(V**T), []
    for t, level in enumerate(policy):
        s, a = y // V ** (T - t), y // V ** (T - t - 1) % V
        block = level.new_zeros(V**T, *level.shape)
        block[y, s] = -level[s].exp()
        block[y, s, a] += 1
        blocks.append(block.flatten(1))
    return torch.cat(blocks, 1)


# grad J = sum_y pi(y) (r(y) - beta log pi(y) / ref(y)) grad log pi(y): the KL's own gradient is in
# it, since sum_y pi(y) grad log pi(y) = 0. The article leaves the KL where no gradient reaches it.
def policy_gradient(samples: int = 20_000, beta: float = 0.5) -> Told:
    """001: the policy gradient with its KL term: autograd, closed form, REINFORCE."""
    world, rng = make_world(), generator(0, "policy-gradient")
    logp, logp_ref = exact.joint(world.policy), exact.joint(world.ref)
    r = torch.randn(len(logp), generator=rng, dtype=torch.float64)
    by_autograd = world.gradient(exact.objective(logp, logp_ref, r, beta))
    p, score = logp.detach().exp(), scores([x.detach() for x in world.policy])
    gain = r - beta * (logp.detach() - logp_ref)
    closed, without = (p * gain) @ score, (p * r) @ score
    drawn = torch.multinomial(p, samples, replacement=True, generator=rng)
    sampled = gain[drawn] @ score[drawn] / samples  # REINFORCE, reward r - beta log pi/ref
    variance = {name: (p * x.square()) @ score.square() - closed.square() for name, x in
                (("plain", gain), ("baseline", gain - p @ gain))}  # of one text's gradient
    z = (sampled - closed) / (variance["plain"] / samples).sqrt()
    numbers = {"largest_z": z.abs().max().item(), "places": len(z),
               **{f"sd_{name}": x.sum().sqrt().item() for name, x in variance.items()}}
    lines = []
    for name, x in (("closed form", closed), ("REINFORCE", sampled), ("no KL term", without)):
        numbers[name] = error_and_cosine(x, by_autograd)
        lines.append("{:13}error {:.1e}, cosine {:.4f}".format(name, *numbers[name]))
    return ["beside automatic differentiation of E[r] - beta KL:", *lines,
            f"REINFORCE has {samples:,} texts and is off by at most {numbers['largest_z']:.1f} "
            f"standard errors in {len(z)} places; a text's gradient scatters by "
            f"{numbers['sd_plain']:.2f}, with the mean as its baseline by "
            f"{numbers['sd_baseline']:.2f}"], numbers


# tilt(tilt(ref, r1), r2) = tilt(ref, r1 + r2),  log Z(r1 + r2) = log Z(r1) + log Z(r2 after r1)
def tilting(beta: float = 0.5) -> Told:
    """001: Bayes' rule for one reward after another is Bayes' rule for their sum, in any order."""
    ref, text = exact.joint(make_world(4, 3).ref), exact.texts(4, 3)
    r1, r2 = (text == 0).double().sum(1), (text[:, -1] == 3).double()  # many zeros; ends in a 3
    both, log_z = exact.posterior(ref, r1 + r2, beta)
    numbers, lines = {"log_z": log_z.item(), "kl": exact.kl(both, ref).item(),
                      "kl_by_log_z": (exact.expectation(both, r1 + r2) / beta - log_z).item()}, []
    for name, (first, then) in {"r1, then r2": (r1, r2), "r2, then r1": (r2, r1)}.items():
        once, z1 = exact.posterior(ref, first, beta)
        twice, z2 = exact.posterior(once, then, beta)
        off = (twice.exp() - both.exp()).abs().max().item()
        numbers[name] = {"off": off, "log_z": [z1.item(), z2.item()]}
        lines.append(f"{name}: log Z {z1:.4f} + {z2:.4f} = {z1 + z2:.4f}; no text's probability "
                     f"is off by more than {off:.0e}")
    return [*lines, f"their sum at once: log Z {log_z:.4f}; {numbers['kl']:.4f} nats from the "
            f"reference, and E*[r] / beta - log Z = {numbers['kl_by_log_z']:.4f}"], numbers


# pi* = ref exp(r / beta) / Z:  dE*[r] / dKL = beta;  at beta 0 it is ref on its best texts.
def price_of_a_nat(betas: Sequence[float] = (4.0, 1.0, 0.25, 0.0625, 0.0)) -> Told:
    """002: from exploration to exploitation: the posterior as a nat of KL gets cheaper."""
    ref, rng = exact.joint(make_world(4, 3).ref), generator(0, "price")
    r = torch.randn(64, generator=rng, dtype=torch.float64)
    rows = []
    for beta in betas:
        star, _ = exact.posterior(ref, r, beta)
        rows.append({"beta": beta, "reward": exact.expectation(star, r).item(),
                     "kl": exact.kl(star, ref).item(),
                     "entropy": exact.expectation(star, -star).item()})
    free = {"most": r.max().item(), "kl": -ref[r.argmax()].item(),
            "reward": exact.expectation(ref, r).item()}
    return ["   beta   reward     KL  entropy, nats",
            *("{beta:7.4f} {reward:8.3f} {kl:6.3f} {entropy:8.3f}".format(**x) for x in rows),
            f"the reference has {free['reward']:.3f}, the best text {free['most']:.3f}, at "
            f"-log ref = {free['kl']:.3f} nats"], {"rows": rows, **free}


def soft_q_and_sarsa(episodes: Sequence[int] = (100, 1_000, 10_000), beta: float = 0.5) -> Told:
    """001: Q-learning and SARSA with a KL penalty, nats from the posterior after so many texts."""
    ref, rng = make_world(4, 3).ref, generator(0, "soft-q")
    r = torch.randn(64, generator=rng, dtype=torch.float64)
    logp_ref = exact.joint(ref)
    star, log_z = exact.posterior(logp_ref, r, beta)
    ways: dict[str, Callable] = {
        "soft Q, its own texts": lambda n, rng: soft_q.soft_q(ref, r, beta, episodes=n, rng=rng),
        "soft Q, the reference's": lambda n, rng: soft_q.soft_q(
            ref, r, beta, episodes=n, rng=rng, own=False),
        "SARSA, 4 rounds": lambda n, rng: soft_q.sarsa(
            ref, r, beta, rounds=4, episodes=n // 4, rng=rng),
        "expected SARSA, 4 rounds": lambda n, rng: soft_q.sarsa(
            ref, r, beta, rounds=4, episodes=n // 4, rng=rng, expected=True)}
    start = exact.kl(logp_ref, star).item()
    numbers, lines = {"start": start, "episodes": list(episodes)}, []
    for name, way in ways.items():
        gaps = [exact.kl(exact.joint(way(n, generator(1, name))), star).item() for n in episodes]
        numbers[name] = gaps
        lines.append(f"{name:26}" + "".join(f"{max(gap, 0):10.1e}" for gap in gaps))
    values = exact.soft_values(ref, r, beta)
    numbers["v_root"], numbers["beta_log_z"] = values[0].item(), (beta * log_z).item()
    return [f"{f'the reference: {start:.3f}':26}" + "".join(f"{n:10,}" for n in episodes), *lines,
            f"V(root) = {values[0].item():.4f}, beta log Z = {beta * log_z:.4f}"], numbers


EXAMPLES: dict[str, Callable[[], Told]] = {
    "masked-word": masked_word, "sentence": says_it_back, "neighbours": alike,
    "optimisers": optimisers, "vae": apples_and_phones, "point-mass": point_mass,
    "tilting": tilting, "policy-gradient": policy_gradient, "soft-q": soft_q_and_sarsa,
    "beta": price_of_a_nat}


def run(names: Sequence[str], out: Path) -> Iterator[str]:
    """Lines of the examples of these names, all where none is named; numbers: OUT/examples.json.

    UserError for a name that is none, before anything is run.
    """
    if unknown := [name for name in names if name not in EXAMPLES]:
        raise UserError(f"no example is called {', '.join(unknown)}: choose among "
                        f"{', '.join(EXAMPLES)}")
    if out.is_file():
        raise UserError(f"--out {out} is a file: choose a folder")
    path, found = out / "examples.json", {}
    out.mkdir(parents=True, exist_ok=True)
    for name in names or EXAMPLES:
        yield f"{name} - article {EXAMPLES[name].__doc__.splitlines()[0]}"
        lines, found[name] = optimisers(out) if name == "optimisers" else EXAMPLES[name]()
        yield from (f"    {line}" for line in lines)
        write_json(path, found)
    yield f"numbers: {path}"
