"""BERT: the bidirectional trunk, its masked-language-model head, fill_mask, sentence embeddings.

The head runs on masked positions only: `linear_logprob(model.transform(h[predict]),
model.head.weight, targets[predict], bias=model.head.bias)`. Left out: next-sentence prediction
(RoBERTa, arXiv:1907.11692, found it of no use).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokl import UserError
from nanokl.checkpoint import Pretrained
from nanokl.data import text_batch
from nanokl.tokenizer import Tokenizer
from nanokl.transformer import Transformer, TransformerConfig, make_norm


@dataclass
class BERTConfig(TransformerConfig):
    causal: bool = False  # every position sees the whole text
    head_transform: bool = False  # dense + GELU + norm before the tied head, as in the original
    mlm_head: bool = True  # sentence encoders come without a head for masked tokens


PRESETS = {  # switches only; sizes are the caller's
    "nano": {},
    "bert": {"norm": "layer", "norm_first": False, "position": "learned", "activation": "gelu",
             "bias": True, "qk_norm": False, "zero_init": False, "n_segment": 2, "eps": 1e-12,
             "head_transform": True},
}


class BERT(Transformer, Pretrained):
    """p(token at a masked position | the rest of the text) = softmax(head(transform(h)))."""

    Config, presets = BERTConfig, PRESETS

    def __init__(self, config: BERTConfig, rng: torch.Generator | None = None):
        super().__init__(config)
        self.transform: nn.Module = nn.Identity()
        if config.head_transform and config.mlm_head:
            dense = nn.Linear(config.n_embd, config.n_embd)
            self.transform = nn.Sequential(dense, nn.GELU(), make_norm(config))
        if config.mlm_head:
            self.head = nn.Linear(config.n_embd, config.vocab_size)
            self.head.weight = self.wte.weight
        self.init_weights(rng)

    def logits(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., V), float32; UserError without a head for masked tokens."""
        if not self.config.mlm_head:
            raise UserError("this encoder has no head for masked tokens: give a BERT that has one, "
                            "or use this one for embeddings and as a trunk")
        return self.head(self.transform(h)).float()


def _as_text(tokenizer, token: int) -> str:
    """A token as it stands in a text, the space before a word with it."""
    if token in tokenizer.special_ids:
        return " " + tokenizer.decode([token])
    return tokenizer.tokens[token].decode(errors="replace")


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
    filled = [before.removesuffix(" ") + _as_text(tokenizer, t) + after for t in token.tolist()]
    names = [tokenizer.decode([t]).removeprefix(space) for t in token.tolist()]
    return list(zip(names, p.tolist(), filled, strict=True))


def longest_text(folder: Path, context: int) -> int:
    """Tokens after which a sentence encoder's texts are cut: its folder's word, or the context.

    UserError for a folder that pools otherwise than by the mean.
    """
    try:
        files = (folder / "sentence_bert_config.json", folder / "1_Pooling" / "config.json",
                 folder / "modules.json")
        length, pooling, modules = ({} if not path.is_file() else json.loads(path.read_bytes())
                                    for path in files)
        others = [key for key, on in pooling.items() if on is True and "_mode_" in key
                  and key != "pooling_mode_mean_tokens"]
        others += [x for x in [pooling.get("pooling_mode", "mean")] if x != "mean"]
        others += [module["type"] for module in modules or () if module["type"].rpartition(".")[2]
                   not in ("Transformer", "Pooling", "Normalize")]
        longest = int(min(context, max(3, length.get("max_seq_length") or context)))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} does not say how its embeddings are pooled ({error}): mend "
                        f"{' and '.join(path.name for path in files[::2])}") from None
    if others:
        raise UserError(f"{folder} has {others[0]}: only the mean of all tokens is computed here")
    return longest


@torch.no_grad()
def embed(model: BERT, tokenizer, texts: Sequence[str], *, longest: int | None = None,
          batch: int = 64) -> Tensor:
    """Embeddings (N, C) of texts, float32, of norm 1: the mean hidden state of their tokens.

    [CLS] and [SEP] count (Reimers & Gurevych, arXiv:1908.10084). Texts are cut after `longest`
    tokens, those two included; as many as the model's context unless given.
    """
    out = torch.empty(len(texts), model.config.n_embd)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that little is padding
    for i in range(0, len(texts), batch):
        rows = order[i : i + batch]
        idx, mask = text_batch(tokenizer, [texts[r] for r in rows],
                               block_size=longest or model.config.block_size)
        idx, mask = idx.to(model.wte.weight.device), mask.to(model.wte.weight.device)
        h = model(idx, mask) * mask[..., None]  # (B, T, C)
        out[rows] = F.normalize((h.sum(1) / mask.sum(1, keepdim=True)).float(), dim=1).cpu()
    return out
