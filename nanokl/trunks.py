"""A pretrained model as the trunk of another: its texts read, its hidden states pooled.

reward.py and classify.py put heads on it. Left out: adapters; a trunk is trained as a whole, or
from some block on.
"""

from dataclasses import replace
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
    trunk = checkpoint.load(folder, TRUNKS[kind], **overrides)
    if not getattr(trunk.config, "value_head", False):
        return trunk
    plain = GPT(replace(trunk.config, value_head=False, critic_layers=0))
    plain.load_state_dict(trunk.weights_without_critic())
    return plain


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


def shared_rows(length: list[int], T: int) -> list[int]:
    """Where each text of so many tokens starts, in rows of T tokens laid end to end.

    A row has several texts. The longest first, each in the first row with room (Johnson 1973).
    """
    room, start = [], [0] * len(length)
    for i in sorted(range(len(length)), key=lambda i: -length[i]):
        row = next((r for r, left in enumerate(room) if left >= length[i]), len(room))
        if row == len(room):
            room.append(T)
        start[i] = (row + 1) * T - room[row]
        room[row] -= length[i]
    return start


def pooled(trunk: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """(B, C) of texts, padded on the right, from their blocks' input x (B, T, C).

    The mean over an encoder's real tokens, or a causal model's last one, which alone has seen the
    whole text. Texts share rows, each sees itself alone: of texts as they come two thirds would be
    padding (Krell et al., arXiv:2107.02027).
    """
    (B, T, C), length = x.shape, mask.sum(1)
    start = torch.tensor(shared_rows(length.tolist(), T), device=x.device)
    slots = -int(start.max() + 1) // T * -T  # of whole rows
    real = mask.flatten().nonzero()[:, 0]  # (N,) tokens among the padded ones
    text, place = real // T, real % T
    slot = start[text] + place  # (N,)
    # empty slots are the text -1's: a row of attention that sees nothing would be NaN
    owner = torch.full((slots,), -1, device=x.device).index_copy(0, slot, text).view(-1, T)
    rows = x.new_zeros(slots, C).index_copy(0, slot, x.flatten(0, 1).index_select(0, real))
    h = trunk.encode(rows.view(-1, T, C), owner[:, :, None] == owner[:, None, :]).flatten(0, 1)
    if trunk.config.causal:
        return h.index_select(0, start + length - 1)
    total = h.new_zeros(B, C, dtype=torch.float32)
    return total.index_add(0, text, h.index_select(0, slot).float()) / length[:, None]


def hide_tokens(tokenizer, idx: Tensor, hide: Tensor) -> None:
    """[MASK] in the place of idx (B, T) where hide (B, T or more) is True, special tokens kept.

    GPT-2's only special token stands for it there.
    """
    hide = hide[:, : idx.shape[1]] & ~torch.isin(idx, torch.tensor(tokenizer.special_ids))
    idx[hide] = tokenizer.special("[MASK]" if "[MASK]" in tokenizer.specials else "<|endoftext|>")
