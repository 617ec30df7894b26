"""Sampling with a KV cache: prompts -> Rollout.

Ragged prompts start together at position 0 and are padded on the right: while row i is still
inside its prompt, its next token is forced. So every token has the position that it has in
training, and no row can see padding. Left out: beam search, stopping strings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokl import UserError


@dataclass
class Rollout:
    """Prompts and sampled responses; logp is under the very distribution that was sampled."""

    idx: Tensor  # (B, T) int64, right of the last token arbitrary
    mask: Tensor  # (B, T-1) bool, True where idx[:, t+1] is a response token (the stop one too)
    logp: Tensor  # (B, T-1) float32, 0 outside the mask
    n_prompt: Tensor  # (B,) int64
    stopped: Tensor  # (B,) bool, the stop token was sampled

    def responses(self) -> list[list[int]]:
        """Response ids of each row."""
        return [row[k:] for row, k in zip(self.rows(), self.n_prompt.tolist(), strict=True)]

    def rows(self) -> list[list[int]]:
        """Prompt and response ids of each row, without padding."""
        n_total = (self.n_prompt + self.mask.sum(1)).tolist()
        return [row[:n] for row, n in zip(self.idx.tolist(), n_total, strict=True)]


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}: give 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: give at least 1, or leave it out")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p is {top_p}: give 0 < top_p <= 1, or leave it out")


def truncate(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Keeps the top_k largest (B, V) logits, then the smallest set whose probability is top_p."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True)
        p = ranked.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # the mass before a token already suffices
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def sample(logits: Tensor, u: Tensor, *, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None) -> tuple[Tensor, Tensor]:
    """Draws a token for each row of logits (B, V), where its CDF reaches u (B,); and its logp (B,).

    One uniform number a token ties a row's draw to that row alone, whatever else is in the batch.
    Temperature 0 takes the largest logit, at logp 0.
    """
    if temperature == 0.0:
        return logits.argmax(-1), torch.zeros_like(u)
    logp = truncate(logits / temperature, top_k, top_p).log_softmax(-1)
    cdf = logp.double().exp().cumsum(-1)  # float64: V rounding errors must not add up
    token = torch.searchsorted(cdf, u[:, None].double() * cdf[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)  # NaN logits: the loss will say so
    return token[:, 0], logp.gather(1, token)[:, 0]


def _pack_prompts(prompts: list[list[int]], config, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, longest prompt + max_new_tokens) and prompt lengths (B,)."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if not prompts or not all(map(len, prompts)):
        raise UserError("an empty prompt: give at least one token (such as <|endoftext|>)")
    n_prompt = torch.tensor([len(p) for p in prompts])
    T = max(map(len, prompts)) + max_new_tokens
    if config.block_size < T:
        raise UserError(f"a prompt of {T - max_new_tokens} tokens and {max_new_tokens} new ones do"
                        f" not fit the context of {config.block_size}: shorten one of them")
    return torch.tensor([[*p, *[0] * (T - len(p))] for p in prompts]), n_prompt


@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop: int | None = None,
             rng: torch.Generator | None = None, u: Tensor | None = None) -> Rollout:
    """Continues each prompt by up to max_new_tokens tokens, or until `stop` is sampled.

    Row i's j-th token is drawn at u[i, j]; `rng`, on the CPU, draws u (B, max_new_tokens) if None.
    Call `.eval()` first. UserError for a prompt empty or too long, and for values out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    device = model.head.weight.device
    idx, n_prompt = (x.to(device) for x in _pack_prompts(prompts, model.config, max_new_tokens))
    B, T = idx.shape
    u = (torch.rand(B, max_new_tokens, generator=rng) if u is None else u).to(device)
    logp = torch.zeros(B, T - 1, device=device)
    mask = torch.zeros(B, T - 1, dtype=torch.bool, device=device)
    stopped = torch.zeros(B, dtype=torch.bool, device=device)
    cache = model.new_cache(B, T)
    start = int(n_prompt.min())
    h = model(idx[:, :start], cache=cache)[:, -1]  # prefill: what all prompts have
    for t in range(start, T):
        # 1. draw a token for every row
        new = (t - n_prompt).clamp(0, max_new_tokens - 1)  # which of its new tokens this is
        draw = u.gather(1, new[:, None])[:, 0]
        token, token_logp = sample(model.logits(h), draw, temperature=temperature, top_k=top_k,
                                   top_p=top_p)
        # 2. keep it where the row is past its prompt and not yet finished
        alive = (t >= n_prompt) & (t < n_prompt + max_new_tokens) & ~stopped
        idx[:, t] = torch.where(alive, token, idx[:, t])
        logp[:, t - 1], mask[:, t - 1] = token_logp * alive, alive
        if stop is not None:
            stopped |= alive & (token == stop)
        # 3. go on while a row has tokens to come
        if bool((stopped | (t + 1 >= n_prompt + max_new_tokens)).all()):
            idx, logp, mask = idx[:, : t + 1], logp[:, :t], mask[:, :t]
            break
        h = model(idx[:, t : t + 1], cache=cache)[:, -1]
    return Rollout(idx, mask, logp, n_prompt, stopped)
