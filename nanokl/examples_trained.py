"""The articles' examples that train a model, each a tiny one, in seconds; examples.py has the rest.

Each function returns lines for people and numbers for tests and files. Left out: validation, which
a dozen sentences have no room for; checkpoints.
"""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanokl import bert, figures, latent
from nanokl.data import Shard, document_batch, lm_batch, mlm_batch
from nanokl.generate import generate
from nanokl.gpt import GPT, GPTConfig
from nanokl.gpt import PRESETS as GPT_PRESETS
from nanokl.logprob import linear_logprob
from nanokl.neighbours import neighbours
from nanokl.optim import lr_scale, make_optimizers, set_lr
from nanokl.runtime import generator
from nanokl.tokenizer import CHAR_PATTERN, Tokenizer, train_bpe
from nanokl.vae import VAE, VAEConfig, gaussian_kl, negative_elbo

Told = tuple[list[str], dict]  # lines, numbers
SIZES = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
CAPITALS = {"france": "paris", "italy": "rome", "spain": "madrid", "germany": "berlin",
            "austria": "vienna", "japan": "tokyo", "china": "beijing", "egypt": "cairo",
            "greece": "athens", "russia": "moscow", "cuba": "havana", "peru": "lima"}  # fmt: skip
# what each kind of word does, for words that are used alike
KINDS = {"eats": (("cat", "dog", "horse", "mouse"), ("bread", "cheese", "rice", "soup")),
         "drives": (("mother", "doctor", "teacher", "student"), ("car", "bus", "truck", "train"))}
SENTENCE = "这是一个简单的GPT-2模型实现。"
WORDS = ("苹果", "手机", "苹果手机")
VERSE = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance, or nature's changing course, untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe, or eyes can see,
So long lives this, and this gives life to thee."""
# rates and decays to choose from
GRID = {"SGD": ((0.1, 0.3, 1.0), (1e-4, 1e-3)), "Adam": ((0.01, 0.03, 0.1), (1e-4, 1e-3)),
        "AdamW": ((0.01, 0.03, 0.1), (0.01, 0.1)), "Muon": ((0.01, 0.03, 0.1), (0.01, 0.1))}


def shard_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Shard:
    """A shard that is on no disk."""
    end = tokenizer.special("<|endoftext|>")
    tokens = np.append(tokenizer.encode_documents(texts), np.uint32(end))
    return Shard(tokens, np.flatnonzero(tokens == end), len("".join(texts).encode()))


def fit(loss: Callable[[int], Tensor], optimizers, steps: int) -> list[float]:
    """Descends loss(step), half of the time at a falling rate; returns it at each of the steps."""
    curve = []
    for step in range(steps):
        set_lr(optimizers, lr_scale(step, steps, warmup=5, decay=0.5))
        value = loss(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        curve.append(value.item())
    return curve


def muon_and_adamw(model: nn.Module, lr: float = 1e-2):
    return make_optimizers(model, lr=lr, muon_lr=lr, weight_decay=0.0, betas=(0.9, 0.98))


def next_token_nats(model: GPT, idx: Tensor, mask: Tensor | None = None) -> Tensor:
    """Nats of idx[:, 1:] (B, T), in all, where mask (B, T) counts."""
    return -linear_logprob(model(idx[:, :-1]), model.head.weight, idx[:, 1:], mask=mask).logp.sum()


# loss = -1/|M| sum_{t in M} log p(x_t | x without M): over what is masked, M, alone. A sum over all
# tokens, as in the article, is mostly about copying what is in sight.
def train_on_capitals(held: Sequence[str], steps: int, seed: int):
    """A BERT that has not read the sentences on these countries' capitals, and its tokenizer.

    Two other sentences name each country with its capital.
    """
    read = [(f"we know that {b} lies in {a}.", f"people of {a} go to {b} often.",
             f"the capital of {a} is {b}.")[: 2 if a in held else 3] for a, b in CAPITALS.items()]
    texts = [text for some in read for text in some]
    tokenizer = train_bpe(texts, 700, lowercase=True)
    config = bert.BERTConfig(vocab_size=tokenizer.vocab_size, **SIZES)
    model, shard = bert.BERT(config, generator(seed, "masked")), shard_of(tokenizer, texts)

    def loss(step: int) -> Tensor:
        batch = mlm_batch(shard, tokenizer, step, batch_size=32, block_size=32, seed=seed)
        h = model.transform(model(batch.idx, batch.mask)[batch.predict])
        return -linear_logprob(h, model.head.weight, batch.targets[batch.predict],
                               bias=model.head.bias).logp.mean()

    fit(loss, muon_and_adamw(model), steps)
    return model.eval(), tokenizer


def masked_word(steps: int = 300, seed: int = 0) -> Told:
    """000: the capital of France is a masked word, for BERTs that have read 33 sentences each."""
    read, unread, names = {}, {}, list(CAPITALS)
    for i in range(0, len(names), 3):
        model, tokenizer = train_on_capitals(names[i : i + 3], steps, seed)
        for name in names:
            found = bert.fill_mask(model, tokenizer, f"The capital of {name.title()} is [MASK].", 3)
            (unread if name in names[i : i + 3] else read).setdefault(name, []).append(
                [(word, p) for word, p, _ in found])
    lines, numbers = [], {}
    for what, asked in (("read", read), ("unread", unread)):
        right = [found[0][0] == CAPITALS[a] for a, some in asked.items() for found in some]
        lines += [f"{what:8}" + ", ".join(f"{word} {p:.3f}" for word, p in asked["france"][0])
                  + f"    {sum(right)} of {len(right)} capitals come first"]
        numbers[what] = {"right": sum(right), "of": len(right), "france": asked["france"][0]}
    return ["The capital of France is [MASK].", *lines, "unread: learnt from other sentences that "
            "name both; by chance 1 of 12 would come first"], numbers


# Each token is to be told from those before it: a causal mask, positions, and labels that are the
# next tokens. The article's code has none of the three. Of K sentences that are equally likely no
# model of the next token can do better than log K nats a sentence.
def learn_by_heart(texts: Sequence[str], tokenizer: Tokenizer, *, causal: bool, steps: int,
                   seed: int = 0) -> tuple[GPT, list[float]]:
    """A GPT-2 that has read these texts at every step, and its nats a text at each."""
    switches = SIZES | GPT_PRESETS["gpt2"] | {"block_size": 64, "causal": causal}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **switches), generator(seed, "gpt"))
    shard, n = shard_of(tokenizer, texts), len(texts)

    def loss(step: int) -> Tensor:
        idx, mask = document_batch(shard, step, batch_size=n, block_size=64, seed=seed)
        return next_token_nats(model, idx, mask[:, 1:]) / n

    curve = fit(loss, muon_and_adamw(model), steps)
    return model.eval(), curve


def says_it_back(steps: int = 100) -> Told:
    """003: a GPT-2 learns a sentence by heart and says it back; what the causal mask is for."""
    tokenizer, other = train_bpe([SENTENCE], 300), SENTENCE.replace("简单", "复杂")
    end = tokenizer.special("<|endoftext|>")
    model, curve = learn_by_heart([SENTENCE], tokenizer, causal=True, steps=steps)
    rollout = generate(model, [[end]], 60, temperature=0.0, stop=end)
    said = tokenizer.decode([i for i in rollout.rows()[0] if i != end])
    lines = [f"read  {SENTENCE}", f"says  {said}",
             f"{curve[0]:.1f} nats at the start, {curve[-1]:.3f} after {steps} steps"]
    numbers = {"said": said, "first_nats": curve[0], "last_nats": curve[-1]}
    for name, causal in (("mask", True), ("no_mask", False)):
        _, curve = learn_by_heart([SENTENCE, other], tokenizer, causal=causal, steps=2 * steps)
        numbers[f"two_{name}"] = curve[-1]
    return [*lines, f"two sentences that begin alike: {numbers['two_mask']:.3f} nats each, of at "
            f"least log 2 = {np.log(2):.3f}; without the mask {numbers['two_no_mask']:.3f}, for it "
            "has seen the answer"], numbers


def alike(steps: int = 250, seed: int = 0) -> Told:
    """003: words that are used alike get embeddings alike."""
    texts = [f"the {a} {verb} the {b}." for verb, (some, others) in KINDS.items()
             for a, b in product(some, others)]
    tokenizer = train_bpe(texts, 700)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **SIZES), generator(seed, "alike"))
    shard, classes = shard_of(tokenizer, texts), [kind for pair in KINDS.values() for kind in pair]

    def precision() -> float:
        near = {word: {x.strip() for x, _ in neighbours(model, tokenizer, word, 3)}
                for kind in classes for word in kind}
        return sum(len(near[w] & set(kind)) for kind in classes for w in kind) / (3 * len(near))

    def loss(step: int) -> Tensor:
        idx, mask = document_batch(shard, step, batch_size=16, block_size=32, seed=seed)
        return next_token_nats(model, idx, mask[:, 1:]) / 16

    before, curve = precision(), fit(loss, muon_and_adamw(model), steps)
    after = precision()
    lines = [f"{word:9}" + "  ".join(f"{x.strip()} {cosine:.2f}" for x, cosine in
                                     neighbours(model, tokenizer, word, 4))
             for word in (kind[0] for kind in classes)]
    return [*lines, f"of each word's three nearest {after:.2f} are of its own kind, at the start "
            f"{before:.2f}"], {"before": before, "after": after, "last_nats": sum(curve[-10:]) / 10}


# loss = E_q [-log p(x | z)] + weight KL(q(z | x) || p(z)): the article's has no KL, and its decoder
# starts from the encoder's state, so that nothing goes through z
def apples_and_phones(steps: int = 300, seed: int = 0) -> Told:
    """004: a VAE of three words, each said back from two numbers, and what lies between them."""
    tokenizer = train_bpe(WORDS * 4, 300)
    config = VAEConfig(vocab_size=tokenizer.vocab_size, n_latent=2, **SIZES | {"n_layer": 1})
    model = VAE(config, generator(seed, "vae"))
    shard = shard_of(tokenizer, [" " + word for word in WORDS])

    def loss(step: int) -> Tensor:
        idx, mask = document_batch(shard, step, batch_size=3, block_size=32, seed=seed)
        noise = torch.randn(3, 2, generator=generator(seed, "noise", step))
        h, mu, logvar = model(idx, mask, idx, noise)
        nll = -linear_logprob(h, model.head.weight, idx[:, 1:], mask=mask[:, 1:]).logp.sum(1)
        return negative_elbo(nll, gaussian_kl(mu, logvar), weight=0.02)[0]

    fit(loss, muon_and_adamw(model), steps)
    said, model = {}, model.eval()
    for first, last in ((WORDS[0], WORDS[1]), (WORDS[1], WORDS[2])):
        z = latent.between(model, tokenizer, first, last, 5)
        said[f"{first} to {last}"] = [text.strip() for text in latent.say(
            model, tokenizer, z, temperature=0.0, seed=0, max_new_tokens=20)]
    return [f"{way}:  " + "  ".join(texts) for way, texts in said.items()], {"said": said}


def optimizers_for(name: str, model: nn.Module, lr: float,
                   decay: float) -> list[torch.optim.Optimizer]:
    """An optimiser by name; the decay of SGD and Adam is L2, a part of the gradient.

    Muon takes the matrices of the blocks, AdamW the rest.
    """
    if name == "Muon":
        return make_optimizers(model, lr=lr, muon_lr=lr, weight_decay=decay, betas=(0.9, 0.98))
    kind = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    more = {"momentum": 0.9} if name == "SGD" else {"betas": (0.9, 0.98)}
    optimizer = kind(model.parameters(), lr=lr, weight_decay=decay, **more)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr  # for set_lr
    return [optimizer]


def verse_curve(name: str, lr: float, decay: float, *, steps: int, seed: int) -> list[float]:
    """Nats a character of the verse at each step: weights and batches are the seed's alone."""
    tokenizer = train_bpe([VERSE], 261, pattern=CHAR_PATTERN)
    shard = shard_of(tokenizer, [VERSE])
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **SIZES), generator(seed, "verse"))

    def loss(step: int) -> Tensor:
        idx = lm_batch(shard, step, batch_size=8, block_size=32, seed=seed)
        return next_token_nats(model, idx) / (8 * 32)

    return fit(loss, optimizers_for(name, model, lr, decay), steps)


def paint(axes, summary: dict, rows: list[dict]) -> bool:
    """The loss of each optimiser over the steps, a mean over seeds."""
    colours = (figures.MUTED, figures.INK, figures.YARD, figures.OURS)
    for (name, found), colour in zip(summary.items(), colours, strict=True):
        axes.plot(found["curve"], color=colour, lw=1.5,
                  label=f"{name}\n{found['loss']:.2f}\nat {found['lr']:g}")
    axes.set_xlabel("step")
    return True


def optimisers(out: Path | None = None, *, grid: dict = GRID, steps: int = 120,
               seeds: Sequence[int] = (1, 2, 3)) -> Told:
    """003: SGD, Adam, AdamW and Muon on one task, the next character of a sonnet.

    Rate and decay are the best of the grid at seed 0, the numbers those of other seeds. Draws
    OUT/optimisers.png.
    """
    found = {}
    for name, (rates, decays) in grid.items():
        at = [(np.mean(verse_curve(name, lr, decay, steps=steps, seed=0)[-10:]), lr, decay)
              for lr, decay in product(rates, decays)]
        _, lr, decay = min(at)
        curves = [verse_curve(name, lr, decay, steps=steps, seed=seed) for seed in seeds]
        last = [float(np.mean(curve[-10:])) for curve in curves]
        found[name] = {"loss": float(np.mean(last)), "least": min(last), "most": max(last),
                       "lr": lr, "decay": decay, "first": [curve[0] for curve in curves],
                       "curve": np.mean(curves, 0)}
    if out is not None:
        figures.draw(out, found, [], "optimisers", "Four optimisers", "loss, nats a character", "",
                     paint)
    lines = [f"{name:7}{x['loss']:.2f} nats a character after {steps} steps ({x['least']:.2f} to "
             f"{x['most']:.2f} over {len(seeds)} seeds), rate {x['lr']:g}, decay {x['decay']:g}"
             for name, x in sorted(found.items(), key=lambda x: x[1]["loss"])]
    return lines, {name: {k: v for k, v in x.items() if k != "curve"} for name, x in found.items()}
