"""A pretrained model as the trunk of another: its texts read, its hidden states pooled.

reward.py and classify.py put heads on it. Left out: adapters; a trunk is trained as a whole, or
from some block on.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from nanokl import UserError, checkpoint
from nanokl.bert import BERT
from nanokl.gpt import GPT

TRUNKS = {"BERT": BERT, "GPT": GPT}


def load_trunk(folder: Path, **overrides) -> nn.Module:
    """The pretrained model of a checkpoint folder, of any kind in TRUNKS."""
    kind = checkpoint.read_config(folder)["model"]
    if kind not in TRUNKS:
        raise UserError(f"{folder} holds a {kind}: give a run of {' or '.join(TRUNKS)}")
    return checkpoint.load(folder, TRUNKS[kind], **overrides)


def without_heads(trunk: nn.Module) -> None:
    """A trunk's own heads play no part, and DDP stops where a parameter gets no gradient."""
    for name, p in trunk.named_parameters():  # a tied weight comes once, as wte's
        if name.startswith(("head.", "transform.", "value.")):
            p.requires_grad_(False)


def embed(trunk: nn.Module, idx: Tensor, segment: Tensor | None = None,
          extra: Tensor | None = None) -> Tensor:
    """The input (B, T, C) of a trunk's blocks, a GPT's embeddings of n-grams with it."""
    if getattr(trunk.config, "ngram_rows", None):
        extra = trunk.ngrams(idx) if extra is None else extra + trunk.ngrams(idx)
    return trunk.embed(idx, segment, extra)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, T, C) -> (B, C) over the tokens that are True in mask (B, T)."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def pooled(trunk: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """(B, C) of texts, padded on the right, from their blocks' input x (B, T, C).

    The mean over an encoder's real tokens, or a causal model's last one, which alone has seen the
    whole text. In four parts by length, for of texts as they come two thirds would be padding.
    """
    length = mask.sum(1)
    order, parts = length.argsort(stable=True), []
    for rows in order.chunk(4):
        T = int(length[rows[-1]])
        h = trunk.encode(x[rows, :T], mask[rows, :T])
        last = h[torch.arange(len(rows), device=h.device), length[rows] - 1]
        parts.append(last if trunk.config.causal else mean(h, mask[rows, :T]))
    return torch.cat(parts)[order.argsort()]


def hide_tokens(tokenizer, idx: Tensor, hide: Tensor) -> None:
    """[MASK] in the place of idx (B, T) where hide (B, T or more) is True, special tokens kept.

    GPT-2's only special token stands for it there.
    """
    hide = hide[:, : idx.shape[1]] & ~torch.isin(idx, torch.tensor(tokenizer.special_ids))
    idx[hide] = tokenizer.special("[MASK]" if "[MASK]" in tokenizer.specials else "<|endoftext|>")
