"""GPT: the causal trunk with a head that scores the next token.

`forward` gives hidden states; losses go through `linear_logprob(h, model.head.weight, ...)`,
which never builds the (B, T, V) logits. `logits(h)` is for sampling.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanokl.checkpoint import Pretrained
from nanokl.transformer import Linear, Transformer, TransformerConfig


@dataclass
class GPTConfig(TransformerConfig):
    tied: bool = True  # the head shares the token embedding's weight
    value_head: bool = False  # a scalar per position: the critic of PPO


PRESETS = {  # switches only; sizes are the caller's
    "nano": {},
    "gpt2": {"norm": "layer", "embed_norm": False, "position": "learned", "activation": "gelu_tanh",
             "bias": True, "qk_norm": False, "zero_init": False, "eps": 1e-5},
}


class GPT(Transformer, Pretrained):
    """p(idx[:, t+1] | idx[:, :t+1]) = softmax(head(h[:, t]))."""

    Config = GPTConfig

    def __init__(self, config: GPTConfig, rng: torch.Generator | None = None):
        super().__init__(config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.wte.weight
        if config.value_head:
            self.value = nn.Linear(config.n_embd, 1)
        self.init_weights(rng)
        if config.value_head:
            nn.init.zeros_(self.value.weight)  # values start at 0, like the rewards' mean

    def logits(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., V), float32."""
        return self.head(h).contiguous().float()
