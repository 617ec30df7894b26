"""GPT: the causal trunk with a head that scores the next token.

`forward` gives hidden states; losses go through `linear_logprob(h, model.head.weight, ...)`,
which never builds the (B, T, V) logits. `logits(h)` is for sampling.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from nanokl import UserError
from nanokl.checkpoint import Pretrained
from nanokl.layers import Linear
from nanokl.ngram_embedding import NgramEmbedding
from nanokl.transformer import KVCache, Transformer, TransformerConfig


@dataclass
class GPTConfig(TransformerConfig):
    tied: bool = True  # the head shares the token embedding's weight
    value_head: bool = False  # a scalar per position: the critic of PPO
    critic_layers: int = 0  # of the critic's own trunk; 0: it reads the policy's hidden states
    ngram_rows: list[int] = field(default_factory=list)  # n-grams embedded, for n = 2, 3, ...
    ngram_dropout: float = 0.5  # of each of those, in train mode only

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.critic_layers <= self.n_layer:
            raise UserError(f"critic_layers is {self.critic_layers}: give 0 (the policy's trunk) "
                            f"to {self.n_layer}, the policy's own number")
        if not 0.0 <= self.ngram_dropout < 1.0:
            raise UserError(f"ngram_dropout is {self.ngram_dropout}: give 0 <= ngram_dropout < 1")


PRESETS = {  # switches only; sizes are the caller's
    "nano": {},
    "gpt2": {"norm": "layer", "embed_norm": False, "position": "learned", "activation": "gelu_tanh",
             "bias": True, "qk_norm": False, "zero_init": False, "eps": 1e-5},
}


class GPT(Transformer, Pretrained):
    """p(idx[:, t+1] | idx[:, :t+1]) = softmax(head(h[:, t]))."""

    Config, presets = GPTConfig, PRESETS

    def __init__(self, config: GPTConfig, rng: torch.Generator | None = None):
        super().__init__(config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.wte.weight
        if config.value_head:
            self.value = nn.Linear(config.n_embd, 1)
            if config.critic_layers:
                self.critic = Transformer(replace(config, n_layer=config.critic_layers))
        if config.ngram_rows:
            self.ngrams = NgramEmbedding(config)
        self.init_weights(rng)
        if config.ngram_rows:
            self.ngrams.zero_unknown()
        if config.value_head:
            nn.init.zeros_(self.value.weight)  # values start at 0, like the rewards' mean

    def forward(self, idx: Tensor, mask: Tensor | None = None, segment: Tensor | None = None,
                extra: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C), as Transformer.forward; n-grams may begin before the cache's."""
        if self.config.ngram_rows:
            before = idx[:, :0] if cache is None else cache.idx[:, : cache.pos]
            ngrams = self.ngrams(torch.cat((before[:, 1 - self.ngrams.longest :], idx), 1))
            ngrams = ngrams[:, -idx.shape[1] :]
            extra = ngrams if extra is None else extra + ngrams
        return super().forward(idx, mask, segment, extra, cache)

    def weights_without_critic(self) -> dict[str, Tensor]:
        """The state of the language model alone: a critic that PPO made valued another reward."""
        return {name: x for name, x in self.state_dict().items()
                if not name.startswith(("value.", "critic."))}

    def values(self, idx: Tensor, h: Tensor) -> Tensor:
        """The critic's values (B, T), float32, at idx (B, T), whose hidden states are h."""
        return self.value(self.critic(idx) if self.config.critic_layers else h).float()[..., 0]

    def logits(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., V), float32."""
        return self.head(h).contiguous().float()
