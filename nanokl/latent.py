"""What a VAE language model has learnt, on held-out texts, all in nats a text.

    log w = log p(x | z) + log p(z) - log q(z | x),  z ~ q(z | x)
    ELBO = E log w <= E log mean_k w_k <= log p(x)         (Burda et al., arXiv:1509.00519)
    mutual information of z and x = E log q(z | x) - log q(z),  q(z) the mean of all texts' q
    active units: numbers of z whose mean differs from text to text, by a variance above .01
    shuffled-z penalty: what it costs to read a text with the z of another

log w, its means and its effective sample size are those of bayes.py: with beta 1, p(z) as the
reference, q as the proposal and log p(x | z) as the score. Left out: a bound from above, which
would ask for a z of the posterior p(z | x).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanokl import UserError, checkpoint
from nanokl.bayes import effective_sample_size, log_mean_exp, log_weights
from nanokl.data import Shard, document_eval_batches, text_batch
from nanokl.generate import generate
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.logprob import linear_logprob
from nanokl.metrics import mean_se
from nanokl.runtime import generator
from nanokl.tokenizer import Tokenizer
from nanokl.vae import VAE, Given, gaussian_kl, reparametrise

ACTIVE = 0.01  # least variance of an active unit's mean (Burda et al.)
ROWS = 256  # texts times samples that are read at once
Batches = Iterable[tuple[Tensor, Tensor]]  # idx (B, T), mask (B, T)


def normal_log_prob(z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, exp(logvar)) of (..., Z), summed over the numbers of z: (...,)."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    each = (z - mu).square() / logvar.exp() + logvar + math.log(2 * math.pi)
    return -0.5 * each.sum(-1)


def text_nll(vae: VAE, idx: Tensor, mask: Tensor, z: Tensor) -> Tensor:
    """-log p(x | z) of idx (B, T) and z (B, Z), in nats a text: (B,)."""
    h = vae.decoder(idx[:, :-1], z)
    return -linear_logprob(h, vae.head.weight, idx[:, 1:], mask=mask[:, 1:]).logp.sum(1)


@dataclass
class Latents:
    """Of N texts, in the order of their batches."""

    mu: Tensor  # (N, Z)
    logvar: Tensor  # (N, Z)
    z: Tensor  # (N, Z), one of each text's q

    @classmethod
    def of(cls, vae: VAE, batches: Batches, rng: torch.Generator) -> "Latents":
        mu, logvar = (torch.cat(parts) for parts in
                      zip(*(vae.encode(*batch) for batch in batches), strict=True))
        noise = torch.randn(mu.shape, generator=rng).to(mu)
        return cls(mu, logvar, reparametrise(mu, logvar, noise))

    def active_units(self) -> int:
        """How many numbers of z depend on the text."""
        return int(((self.mu - self.mu.mean(0)).square().mean(0) > ACTIVE).sum())

    def mutual_information(self) -> Tensor:
        """log q(z | x) - log q(z) of each text's z, (N,); the mean is at most log N."""
        parts = [log_mean_exp(normal_log_prob(some[:, None], self.mu, self.logvar))
                 for some in self.z.split(128)]  # of all N^2 pairs
        return normal_log_prob(self.z, self.mu, self.logvar) - torch.cat(parts)


def sampled_log_weights(vae: VAE, idx: Tensor, mask: Tensor, mu: Tensor, logvar: Tensor, n: int,
                        rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """log w and -log p(x | z) of n z's for each text, (B, n) both."""
    noise = torch.randn(len(idx), n, mu.shape[1], generator=rng).to(mu)
    z = reparametrise(mu[:, None], logvar[:, None], noise)  # (B, n, Z)
    some = max(1, ROWS // len(idx))
    nll = [text_nll(vae, idx.repeat_interleave(part.shape[1], 0),
                    mask.repeat_interleave(part.shape[1], 0), part.flatten(0, 1)
                    ).view(len(idx), -1) for part in z.split(some, 1)]
    nll = torch.cat(nll, 1)
    log_q = normal_log_prob(z, mu[:, None], logvar[:, None])
    return log_weights(-nll, normal_log_prob(z), log_q, beta=1.0), nll


@torch.no_grad()
def account(vae: VAE, shard: Shard, *, samples: int, whole: bool = True) -> tuple[dict, Tensor]:
    """The numbers of the module's head with standard errors over texts; each text's bound (N,).

    `samples` z's for each text make the bound. Not `whole`: the bound and its parts alone.
    """
    rng, device = generator(0, "latent"), vae.head.weight.device
    batches = [(idx.to(device), mask.to(device)) for idx, mask in document_eval_batches(
        shard, block_size=vae.config.block_size, batch_size=128)]
    found = Latents.of(vae, batches, rng)
    other = found.z[torch.randperm(len(found.z), generator=rng)]
    sizes, columns = [len(idx) for idx, _ in batches], []
    for (idx, mask), mu, logvar, z in zip(batches, *(x.split(sizes) for x in (
            found.mu, found.logvar, other)), strict=True):
        log_w, nll = sampled_log_weights(vae, idx, mask, mu, logvar, samples, rng)
        shuffled = text_nll(vae, idx, mask, z) if whole else nll[:, 0]
        columns.append((nll.mean(1), gaussian_kl(mu, logvar).sum(1), -log_mean_exp(log_w),
                        effective_sample_size(log_w), shuffled))
    nll, kl, bound, ess, shuffled = (torch.cat(x).double() for x in zip(*columns, strict=True))
    per_text = {"iwae_nll": bound, "neg_elbo": nll + kl, "reconstruction": nll, "kl": kl}
    numbers = {}
    if whole:
        per_text |= {"mutual_information": found.mutual_information(),
                     "shuffled_z_penalty": shuffled - nll}
        numbers = {"active_units": found.active_units(), "texts": len(nll),
                   "samples_per_text": samples, "ess_median": ess.median().item()}
    for name, x in per_text.items():
        key = f"{name}_nats_per_sequence"
        numbers[key], numbers[f"{key}_se"] = mean_se(x)
    return numbers, bound


def load_plain(run: Path, tokenizer: Tokenizer, flags) -> VAE:
    """The plain language model that a VAE of these flags is held against.

    UserError for a VAE, for other tokens, and where sizes differ.
    """
    folder = checkpoint.resolve(run)
    lm, sizes = VAE.from_pretrained(folder).eval(), ("arch", "block_size", "n_layer", "n_embd")
    if lm.config.n_latent:
        raise UserError(f"--lm {run} is a VAE: give a run with --n_latent 0")
    differ = [f"{name} {getattr(lm.config, name)} and not {getattr(flags, name)}" for name in sizes
              if getattr(lm.config, name) != getattr(flags, name)]
    if load_tokenizer(folder).hash != tokenizer.hash:
        differ.append("another tokenizer")
    if differ:
        raise UserError(f"--lm {run} has {', '.join(differ)}: give one of the same size, on the "
                        "same text")
    return lm


def beside(bound: Tensor, lm_bound: Tensor) -> dict:
    """A VAE's bounds (N,) beside the plain language model's, text by text."""
    mean, se = mean_se(bound - lm_bound)
    lm, lm_se = mean_se(lm_bound)
    return {"lm_nll_nats_per_sequence": lm, "lm_nll_nats_per_sequence_se": lm_se,
            "iwae_less_lm_nats_per_sequence": mean, "iwae_less_lm_nats_per_sequence_se": se,
            "iwae_over_lm": (lm + mean) / lm}


@torch.no_grad()
def say(vae: VAE, tokenizer: Tokenizer, z: Tensor, *, temperature: float, seed: int,
        max_new_tokens: int) -> list[str]:
    """A text for each z (B, Z), all by the same uniform numbers: where z differs, texts do."""
    stop, n = tokenizer.special("<|endoftext|>"), len(z)
    most = min(max_new_tokens, vae.config.block_size - 1)
    u = torch.rand(1, most, generator=generator(seed, "say")).expand(n, -1)
    rollout = generate(Given(vae, z), [[stop]] * n, most, temperature=temperature, stop=stop, u=u)
    return [tokenizer.decode([i for i in row if i != stop]) for row in rollout.rows()]


@torch.no_grad()
def between(vae: VAE, tokenizer: Tokenizer, first: str, last: str, steps: int) -> Tensor:
    """z's on the straight line from one text's mean to another's, (steps, Z), both ends included.

    UserError for a model without z, an empty text and fewer than 2 steps.
    """
    if not vae.config.n_latent or steps < 2 or not (first.strip() and last.strip()):
        raise UserError(f"a model with {vae.config.n_latent} numbers in z, {steps} steps, between "
                        f"{first!r} and {last!r}: give a VAE, at least 2, and two texts")
    stop = tokenizer.special("<|endoftext|>")
    idx, mask = text_batch(tokenizer, [first, last], block_size=vae.config.block_size)
    idx[:, 0] = stop
    idx[torch.arange(2), mask.sum(1) - 1] = stop
    device = vae.head.weight.device
    mu, _ = vae.encode(idx.to(device), mask.to(device))
    share = torch.linspace(0, 1, steps, device=device)[:, None]
    return (1 - share) * mu[0] + share * mu[1]
