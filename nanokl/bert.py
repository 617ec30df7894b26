"""BERT: the bidirectional trunk with a masked-language-model head, and fill_mask.

The head runs on masked positions only: `linear_logprob(model.transform(h[predict]),
model.head.weight, targets[predict], bias=model.head.bias)`. Left out: next-sentence prediction
(RoBERTa, arXiv:1907.11692, found it of no use).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanokl import UserError
from nanokl.checkpoint import Pretrained
from nanokl.tokenizer import Tokenizer
from nanokl.transformer import Transformer, TransformerConfig, make_norm


@dataclass
class BERTConfig(TransformerConfig):
    causal: bool = False  # every position sees the whole text
    head_transform: bool = False  # dense + GELU + norm before the tied head, as in the original


PRESETS = {  # switches only; sizes are the caller's
    "nano": {},
    "bert": {"norm": "layer", "norm_first": False, "position": "learned", "activation": "gelu",
             "bias": True, "qk_norm": False, "zero_init": False, "n_segment": 2, "eps": 1e-12,
             "head_transform": True},
}


class BERT(Transformer, Pretrained):
    """p(token at a masked position | the rest of the text) = softmax(head(transform(h)))."""

    Config = BERTConfig

    def __init__(self, config: BERTConfig, rng: torch.Generator | None = None):
        super().__init__(config)
        self.transform: nn.Module = nn.Identity()
        if config.head_transform:
            dense = nn.Linear(config.n_embd, config.n_embd)
            self.transform = nn.Sequential(dense, nn.GELU(), make_norm(config))
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        self.head.weight = self.wte.weight
        self.init_weights(rng)

    def logits(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., V), float32."""
        return self.head(self.transform(h)).float()


@torch.no_grad()
def fill_mask(model: BERT, tokenizer: Tokenizer, text: str, top_k: int = 5):
    """The top_k tokens for the one [MASK] in text: [(token, probability, filled text), ...]."""
    before, mask, after = text.partition("[MASK]")
    if not mask or "[MASK]" in after:
        raise UserError(f"{text!r} holds {text.count('[MASK]')} [MASK]: write exactly one")
    if not 1 <= top_k <= model.config.vocab_size:
        raise UserError(f"top_k is {top_k}: give 1 to {model.config.vocab_size}")
    # A word's leading space belongs to its token: the mask swallows it.
    space = " " if before.endswith(" ") else ""
    left, right = tokenizer.encode(before.removesuffix(" ")), tokenizer.encode(after)
    ids = [tokenizer.special("[CLS]"), *left, tokenizer.special("[MASK]"), *right,
           tokenizer.special("[SEP]")]
    if len(ids) > model.config.block_size:
        raise UserError(f"the text has {len(ids)} tokens, the model's context "
                        f"{model.config.block_size}: shorten it")
    h = model(torch.tensor([ids], device=model.wte.weight.device))[0, 1 + len(left)]  # (C,)
    p, token = model.logits(h).softmax(-1).topk(top_k)
    filled = [tokenizer.decode([*left, t, *right]) for t in token.tolist()]
    names = [tokenizer.decode([t]).removeprefix(space) for t in token.tolist()]
    return list(zip(names, p.tolist(), filled, strict=True))
