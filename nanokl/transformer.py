"""One transformer for every model here: GPT-2, BERT and the modern default differ in switches.

    switch       gpt2        bert       nano
    causal       yes         no         yes (no in the encoder)
    norm         LayerNorm   LayerNorm  LayerNorm without bias
    norm_first   yes         no         yes
    embed_norm   no          yes        yes
    position     learned     learned    rotary
    activation   gelu_tanh   gelu       relu2
    bias         yes         yes        no
    qk_norm      no          no         yes
    zero_init    no          no         yes

A trunk maps token ids (B, T) to hidden states (B, T, C), always the same shape; heads live in
gpt.py and bert.py. Left out: sliding windows, attention dropout.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokl import UserError, require_positive, require_types
from nanokl.layers import ACTIVATIONS, Dropout, Linear

TABLE = 1 << 23  # numbers in a table of rotary positions, at most


@dataclass
class TransformerConfig:
    vocab_size: int = 4096  # tokens, specials counted
    block_size: int = 64  # longest context, tokens
    n_layer: int = 4  # blocks
    n_head: int = 6  # attention heads; must divide n_embd
    n_embd: int = 192  # channels C
    causal: bool = True  # each position sees the past only
    norm: Literal["rms", "layer"] = "layer"  # RMSNorm is three times as slow on a CPU
    norm_first: bool = True  # normalise before each sublayer (GPT-2) or after it (BERT)
    embed_norm: bool = True  # normalise the embeddings
    position: Literal["rotary", "learned"] = "rotary"  # rotary (RoFormer) or a learnt table
    activation: Literal["relu2", "gelu", "gelu_tanh"] = "relu2"  # of the MLP
    bias: bool = False  # in linear maps and norms
    qk_norm: bool = True  # queries and keys on the unit sphere (times sqrt(D))
    zero_init: bool = True  # each sublayer starts as the identity
    n_segment: int = 0  # segment embeddings (BERT has 2)
    dropout: float = 0.0  # on embeddings and sublayer outputs, in train mode only
    eps: float = 1e-6  # of the norms

    def __post_init__(self):
        require_types(self)
        require_positive(self, "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "eps")
        if self.n_embd % self.n_head:
            raise UserError(f"{self.n_head} heads do not divide a width of {self.n_embd}: "
                            "choose n_head so that n_embd / n_head is whole")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise UserError(f"rotary positions need an even head width, n_embd / n_head is "
                            f"{self.n_embd // self.n_head}: change n_head or n_embd")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout is {self.dropout}: give 0 <= dropout < 1")
        longest = TABLE * self.n_head // self.n_embd
        if self.position == "rotary" and self.block_size > longest:
            raise UserError(f"block_size is {self.block_size}: give at most {longest}, for which "
                            "there is a table of rotary positions")
        for name in ("norm", "position", "activation"):
            value, allowed = getattr(self, name), get_args(TransformerConfig.__annotations__[name])
            if value not in allowed:
                raise UserError(f"{name} is {value!r}: give one of {', '.join(allowed)}")


class KVCache:
    """What was seen so far, filled in place: each layer's k and v (B, H, T, D), token ids (B, T).

    A static cache takes one token a step, at a position that is a tensor, and shows the same slots
    whatever is in them: compilers and CUDA graphs need one shape and one address.
    """

    def __init__(self, config: TransformerConfig, batch: int, length: int, *, device, dtype):
        shape = (batch, config.n_head, length, config.n_embd // config.n_head)
        self.k, self.v = ([torch.empty(shape, device=device, dtype=dtype)
                           for _ in range(config.n_layer)] for _ in range(2))
        self.idx = torch.zeros(batch, length, device=device, dtype=torch.int64)
        self.pos = 0  # positions filled; a tensor () once the cache is static
        self.slots = None  # (W,) the positions that a static cache shows

    @property
    def static(self) -> bool:
        return isinstance(self.pos, Tensor)

    def make_static(self) -> None:
        """From here on it takes one token a step and shows all slots: attention masks the rest."""
        for v in self.v:
            v[:, :, self.pos :] = 0  # 0 times what was never written must not be NaN
        self.pos = torch.tensor(self.pos, device=self.idx.device)
        self.slots = torch.arange(self.idx.shape[1], device=self.idx.device)

    def next(self, T: int) -> slice | Tensor:
        """The positions of the next T tokens, as an index."""
        if self.static:
            assert T == 1, f"a static cache takes one token at a time, not {T}"
            return self.pos[None]
        end, length = self.pos + T, self.idx.shape[1]
        assert end <= length, f"cache of {length} positions is full at {end}"
        return slice(self.pos, end)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, H, T, D); returns everything up to its end, or all slots of a static cache."""
        at = self.next(k.shape[2])
        self.k[layer][:, :, at], self.v[layer][:, :, at] = k, v
        seen = slice(self.slots.shape[0]) if self.static else slice(at.stop)
        return self.k[layer][:, :, seen], self.v[layer][:, :, seen]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (n,) of the batch alone."""
        self.k, self.v = ([x[rows] for x in layers] for layers in (self.k, self.v))
        self.idx = self.idx[rows]


# Each pair (x_2i, x_2i+1) is a complex number, turned by its position: x e^{i t theta_i} with
# theta_i = base^(-2i/D), so that q . k depends on the distance alone; arXiv:2104.09864.
def rotary_table(length: int, D: int, base: float = 10_000.0) -> Tensor:
    """e^{i t theta} as (T, D/2, 2): cos and sin of position t times frequency i."""
    theta = base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)  # (D/2,)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * theta  # (T, D/2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns (B, H, T, D) by its positions' rows (T, D/2, 2) of the table; float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    x = torch.view_as_complex(x)  # (B, H, T, D/2)
    return torch.view_as_real(x * torch.view_as_complex(table)).flatten(-2)


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for one query (B, H, 1, D), as sums that a compiler fuses."""
    score = (q.float() * k).sum(-1) / q.shape[-1] ** 0.5  # (B, H, T)
    p = score.masked_fill(~mask, -torch.inf).softmax(-1)
    return (p[..., None] * v).sum(-2, keepdim=True).to(v.dtype)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + mask) v, over H heads."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None, rotary, cache: KVCache | None) -> Tensor:
        (B, T, C), H = x.shape, self.config.n_head
        qkv = self.qkv(x)
        if qkv.dtype is torch.bfloat16 and x.device.type == "cpu" and cache is None:
            qkv = qkv.float()  # its backward is far slower in bfloat16 there
        q, k, v = qkv.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if self.config.qk_norm:
            norm = F.rms_norm if self.config.norm == "rms" else F.layer_norm
            q, k = norm(q, (C // H,)), norm(k, (C // H,))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.to(v.dtype).contiguous(), k.to(v.dtype)  # norms and tables are float32
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        causal = self.config.causal and mask is None and T > 1
        with torch.autocast(x.device.type, enabled=False):
            if cache is not None and cache.static:
                y = attend_once(q, k, v, mask)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """down(act(up(x))), four times as wide inside."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def make_norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.eps)
    return nn.LayerNorm(config.n_embd, eps=config.eps, bias=config.bias)


class Block(nn.Module):
    """Attention and MLP, each with a residual path."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.norm_first = config.norm_first
        self.norm1, self.attn = make_norm(config), Attention(config, layer)
        self.norm2, self.mlp = make_norm(config), MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, mask, rotary, cache) -> Tensor:
        if self.norm_first:
            x = x + self.drop(self.attn(self.norm1(x), mask, rotary, cache))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attn(x, mask, rotary, cache)))
        return self.norm2(x + self.drop(self.mlp(x)))


class Transformer(nn.Module):
    """The trunk: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            table = rotary_table(config.block_size, config.n_embd // config.n_head)
            self.register_buffer("rotary", table, persistent=False)
        if config.n_segment:
            self.wse = nn.Embedding(config.n_segment, config.n_embd)
        if config.embed_norm:
            self.norm_embed = make_norm(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        if config.norm_first:  # else the last block ends in a norm
            self.norm_final = make_norm(config)
        self.drop = Dropout(config.dropout)

    def init_weights(self, rng: torch.Generator) -> None:
        """N(0, .02) for matrices (GPT-2), 0 for biases and, under zero_init, for projections."""
        for name, parameter in self.named_parameters():
            closing = name.endswith(("attn.proj.weight", "mlp.down.weight"))
            if name.endswith("bias") or (closing and self.config.zero_init):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                depth = (2 * self.config.n_layer) ** 0.5 if closing else 1.0
                nn.init.normal_(parameter, std=0.02 / depth, generator=rng)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` tokens."""
        dtype, device = self.blocks[0].attn.qkv.weight.dtype, self.wte.weight.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return KVCache(self.config, batch, length, device=device, dtype=dtype)

    def _attention_mask(self, mask: Tensor | None, T: int, cache: KVCache | None) -> Tensor | None:
        """True where a query may look: ([B, 1,] T, pos + T); None where is_causal says it."""
        if cache is not None and cache.static:
            return cache.slots <= cache.pos  # (W,)
        pos = cache.pos if cache is not None else 0
        if mask is not None:
            mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]  # unseen keys
        if self.config.causal and (mask is not None or (pos and T > 1)):  # offset diagonal
            past = torch.ones(T, pos + T, dtype=torch.bool, device=self.wte.weight.device).tril(pos)
            if mask is None:
                return past
            # padding on the left would see nothing at all, which is NaN
            mask = mask & past | torch.eye(T, dtype=torch.bool, device=past.device)
        return mask

    def embed(self, idx: Tensor, segment: Tensor | None = None, extra: Tensor | None = None,
              at: slice | Tensor | None = None) -> Tensor:
        """The blocks' input (B, T, C): what each token is, at its position, alone."""
        x = self.wte(idx) if extra is None else self.wte(idx) + extra
        if self.config.position == "learned":
            at = slice(idx.shape[1]) if at is None else at
            x = x + (F.embedding(at, self.wpe.weight) if isinstance(at, Tensor)
                     else self.wpe.weight[at])
        if self.config.n_segment:
            x = x + (self.wse.weight[0] if segment is None else self.wse(segment))
        return self.drop(self.norm_embed(x) if self.config.embed_norm else x)

    def encode(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
               at: slice | Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of `embed`'s x (B, T, C); mask (B, T), or (B, T, T) by query."""
        at = slice(x.shape[1]) if at is None else at
        rotary = self.rotary[at] if self.config.position == "rotary" else None
        attention_mask = self._attention_mask(mask, x.shape[1], cache)
        for block in self.blocks:
            x = block(x, attention_mask, rotary, cache)
        return self.norm_final(x) if self.config.norm_first else x

    def forward(self, idx: Tensor, mask: Tensor | None = None, segment: Tensor | None = None,
                extra: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) of idx (B, T); mask (B, T) is False at padding.

        segment (B, T) adds its embedding to the tokens', extra (B, T, C) itself.
        With a cache, idx holds what follows. A causal model needs a mask for padding on the left
        alone: the first real token is then at position 0.
        """
        T = idx.shape[1]
        at = slice(T) if cache is None else cache.next(T)
        if isinstance(at, slice):
            assert at.stop <= self.config.block_size, f"{at.stop} tokens > {self.config.block_size}"
        assert mask is None or cache is None, "a cache takes no padding mask"
        place = at
        if self.config.causal and self.config.position == "learned" and mask is not None:
            place = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T)
        h = self.encode(self.embed(idx, segment, extra, place), mask, cache, at)
        if cache is not None:
            cache.idx[:, at] = idx
            cache.pos += T
        return h
