"""A language model as a variational autoencoder: z ~ p(z) = N(0, 1), then a text x ~ p(x | z).

    log p(x) >= ELBO(x) = E_q(z|x) [log p(x | z)] - KL(q(z | x) || p(z))

It is the bound of RLHF under other names, at beta 1, and bayes.py has both: z stands where a text
stood, p(z) is the reference, log p(x | z) the score, q(z | x) the policy, p(z | x) the posterior,
log p(x) is log Z. A q that is p(z) whatever the text is a policy that has never left its reference:
a decoder that can do without z lets that happen, which is called collapse (Bowman et al.,
arXiv:1511.06349); free bits and word dropout are against it.

z reaches the decoder in two ways only (Optimus, arXiv:2004.04092): as what stands at position 0,
which all can see, and added to each token's embedding; in an LSTM as the first state and beside
each input. Left out: priors other than N(0, 1), a q with covariances, encoders pretrained.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nanokl import UserError
from nanokl.checkpoint import Pretrained
from nanokl.gpt import GPT, GPTConfig
from nanokl.gpt import PRESETS as GPT_PRESETS
from nanokl.transformer import KVCache, Transformer, TransformerConfig
from nanokl.trunks import mean


@dataclass
class VAEConfig(TransformerConfig):
    """Sizes and switches are the decoder's; the encoder differs in depth and sees both sides."""

    arch: Literal["transformer", "lstm"] = "transformer"  # of both; an LSTM has width and depth
    n_latent: int = 32  # numbers in z; 0: no encoder, the plain language model
    encoder_layers: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.n_latent < 0 or self.encoder_layers < 1:
            raise UserError(f"n_latent is {self.n_latent} and encoder_layers "
                            f"{self.encoder_layers}: give at least 0 and 1")
        if self.arch not in ARCHS:
            raise UserError(f"arch is {self.arch!r}: give one of {', '.join(ARCHS)}")


class GPTDecoder(GPT):
    """p(x | z): a GPT with z (B, Z) in each token's embedding, and once more at position 0."""

    def __init__(self, config: VAEConfig, rng: torch.Generator | None):
        shared = {f.name: getattr(config, f.name) for f in fields(TransformerConfig)}
        super().__init__(GPTConfig(**shared), rng)
        self.n_latent = config.n_latent
        if config.n_latent:
            self.everywhere, self.first = (nn.Linear(config.n_latent, config.n_embd, bias=False)
                                           for _ in range(2))
            for way in (self.everywhere, self.first):  # together no louder than a token
                nn.init.normal_(way.weight, std=0.02 * config.n_latent**-0.5, generator=rng)

    def forward(self, idx: Tensor, z: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) of idx (B, T), which follow what is in the cache."""
        extra = None
        if self.n_latent:
            extra = self.everywhere(z)[:, None].repeat(1, idx.shape[1], 1)  # (B, T, C)
            if cache is None or cache.pos == 0:
                extra[:, 0] += self.first(z)
        return super().forward(idx, extra=extra, cache=cache)


class TransformerEncoder(Transformer):
    """A text's features (B, C): the mean hidden state of an encoder that sees both sides."""

    def __init__(self, config: VAEConfig, rng: torch.Generator | None):
        super().__init__(replace(config, causal=False, n_layer=config.encoder_layers))
        self.init_weights(rng)

    def forward(self, idx: Tensor, mask: Tensor) -> Tensor:
        return mean(super().forward(idx, mask), mask)


class LSTMCache:
    """An LSTM's state after what it has read: two of (layers, B, C), None before the first."""

    state = None

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (n,) of the batch alone."""
        self.state = tuple(x[:, rows] for x in self.state)


def init_lstm(module: nn.Module, rng: torch.Generator | None) -> None:
    """U(-1, 1) / sqrt(C) for an LSTM and what is linear, a tenth for embeddings."""
    for name, parameter in module.named_parameters():
        width = 0.1 if name.startswith("wte") else parameter.shape[-1] ** -0.5
        nn.init.uniform_(parameter, -width, width, generator=rng)


class LSTMDecoder(nn.Module):
    """p(x | z): an LSTM that starts from a state made of z (B, Z) and reads z with each token."""

    def __init__(self, config: VAEConfig, rng: torch.Generator | None):
        super().__init__()
        C, self.config = config.n_embd, config
        self.wte = nn.Embedding(config.vocab_size, C)
        self.lstm = nn.LSTM(C + config.n_latent, C, config.n_layer, batch_first=True)
        if config.n_latent:
            self.start = nn.Linear(config.n_latent, 2 * config.n_layer * C)
        init_lstm(self, rng)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight

    def new_cache(self, batch: int, length: int) -> LSTMCache:
        return LSTMCache()

    def forward(self, idx: Tensor, z: Tensor, cache: LSTMCache | None = None) -> Tensor:
        """Hidden states (B, T, C) of idx (B, T), which follow what is in the cache."""
        (B, T), state = idx.shape, cache and cache.state
        with torch.autocast(idx.device.type, enabled=False):
            x = torch.cat((self.drop(self.wte(idx)), z[:, None].expand(B, T, -1)), -1)
            if state is None and self.config.n_latent:
                start = self.start(z).tanh().view(B, 2, self.config.n_layer, -1)
                state = tuple(start.permute(1, 2, 0, 3).contiguous())  # two of (layers, B, C)
            h, state = self.lstm(x, state)
        if cache is not None:
            cache.state = state
        return self.drop(h)

    def logits(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., V), float32."""
        return self.head(h).float()


class LSTMEncoder(nn.Module):
    """A text's features (B, C): an LSTM's state after its last token. The decoder sees none."""

    def __init__(self, config: VAEConfig, rng: torch.Generator | None):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lstm = nn.LSTM(config.n_embd, config.n_embd, config.encoder_layers, batch_first=True)
        init_lstm(self, rng)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, idx: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(idx.device.type, enabled=False):
            h = self.lstm(self.drop(self.wte(idx)))[0]
        return self.drop(h[torch.arange(len(h), device=h.device), mask.sum(1) - 1])


ARCHS = {"transformer": (TransformerEncoder, GPTDecoder), "lstm": (LSTMEncoder, LSTMDecoder)}


class VAE(nn.Module, Pretrained):
    """Texts idx (B, T) with their separators at both ends, mask (B, T) True at real tokens."""

    Config, presets = VAEConfig, {"nano": {}, "gpt2": GPT_PRESETS["gpt2"]}

    def __init__(self, config: VAEConfig, rng: torch.Generator | None = None):
        super().__init__()
        self.config = config
        encoder, decoder = ARCHS[config.arch]
        self.decoder = decoder(config, rng)
        if config.n_latent:
            self.encoder = encoder(config, rng)
            self.encoder.wte = self.decoder.wte  # what a word is, is learnt from both
            self.latent = nn.Linear(config.n_embd, 2 * config.n_latent)
            nn.init.normal_(self.latent.weight, std=config.n_embd**-0.5, generator=rng)
            nn.init.zeros_(self.latent.bias)

    @property
    def head(self) -> nn.Module:
        return self.decoder.head

    @property
    def blocks(self) -> nn.ModuleList:
        """What multiplies every token by matrices, for counts of FLOPs."""
        parts = [getattr(self, name) for name in ("encoder", "decoder") if hasattr(self, name)]
        return nn.ModuleList(part.lstm if self.config.arch == "lstm" else part.blocks
                             for part in parts)

    def encode(self, idx: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """q(z | x) = N(mu, exp(logvar)): two of (B, Z), float32."""
        if not self.config.n_latent:
            return 2 * (torch.zeros(len(idx), 0, device=idx.device),)
        return self.latent(self.encoder(idx, mask)).float().chunk(2, dim=-1)

    def forward(self, idx: Tensor, mask: Tensor, shown: Tensor, noise: Tensor):
        """Of texts, what the decoder sees of them (B, T) and noise (B, Z) ~ N(0, 1):

        hidden states (B, T - 1, C), which predict idx[:, 1:], and mu, logvar (B, Z).
        """
        mu, logvar = self.encode(idx, mask)
        return self.decoder(shown[:, :-1], reparametrise(mu, logvar, noise)), mu, logvar


def reparametrise(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A z ~ N(mu, exp(logvar)) of noise ~ N(0, 1), through which gradients go (arXiv:1312.6114)."""
    return mu + (0.5 * logvar).exp() * noise


# KL(N(mu, s^2) || N(0, 1)) = (mu^2 + s^2 - 1 - log s^2) / 2
def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """In nats, of each number of z by itself: shaped like mu."""
    return (mu.square() + logvar.exp() - 1 - logvar) / 2


# loss = E[nll] + weight sum_j max(free_bits, E[KL_j]): what a number of z may cost for nothing
# (Kingma et al., arXiv:1606.04934, equation 15; means over the batch).
def negative_elbo(nll: Tensor, kl: Tensor, *, weight: float = 1.0, free_bits: float = 0.0,
                  mean=lambda x: x) -> tuple[Tensor, dict]:
    """Nats a text: nll (B,) = -log p(x | z), kl (B, Z) of q to p(z), free_bits in nats each.

    `mean` averages over processes that have a part of the batch each. Returns (loss, info).
    """
    each = kl.mean(0)  # (Z,)
    paid = mean(each.detach()) > free_bits
    loss = nll.mean() + weight * torch.where(paid, each, free_bits).sum()
    return loss, {"kl": each.sum(), "nll": nll.mean()}


class LatentCache:
    """A decoder's cache, with the z (B, Z) of each row."""

    def __init__(self, cache, z: Tensor):
        self.cache, self.z = cache, z

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (n,) of the batch alone."""
        self.cache.keep(rows)
        self.z = self.z[rows]


class Given(nn.Module):
    """p(x | z) of one z (Z,) a row, z (B, Z): a model for `generate`."""

    def __init__(self, vae: VAE, z: Tensor):
        super().__init__()
        self.decoder, self.config, self.z = vae.decoder, vae.config, z

    @property
    def head(self) -> nn.Module:
        return self.decoder.head

    def logits(self, h: Tensor) -> Tensor:
        return self.decoder.logits(h)

    def new_cache(self, batch: int, length: int) -> LatentCache:
        return LatentCache(self.decoder.new_cache(batch, length), self.z)

    def forward(self, idx: Tensor, cache: LatentCache) -> Tensor:
        return self.decoder(idx, cache.z, cache.cache)
