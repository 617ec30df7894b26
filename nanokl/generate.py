"""Sampling with a KV cache: prompts -> Rollout.

Ragged prompts start together at position 0 and are padded on the right: while row i is still
inside its prompt, its next token is forced. So every token has the position that it has in
training, and no row can see padding. Left out: beam search, stopping strings.
"""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokl import UserError
from nanokl.layers import Linear
from nanokl.rollout import Rollout

TILE = 256  # tokens whose probabilities are summed together before the CDF is looked at
WINDOW = 16  # slots by which a compiled step's view of its cache grows


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
    z = truncate(logits if temperature == 1.0 else logits / temperature, top_k, top_p)
    (B, V), n = z.shape, -(-z.shape[1] // TILE)
    m = z.amax(1, keepdim=True)
    e = z.new_empty(B, n * TILE)  # exp(z - m); the last tile ends in zeros
    torch.sub(z, m, out=e[:, :V]).exp_()
    e[:, V:] = 0
    e = e.view(B, n, TILE)
    # Two CDFs, over the tiles and within one, in float64: rounding errors must not add up.
    cdf = F.pad(e.sum(-1).double().cumsum(-1), (1, 0))  # (B, n + 1), the mass before each tile
    total = cdf[:, -1:]
    at = u[:, None].double() * total
    tile = (torch.searchsorted(cdf, at, right=True) - 1).clamp(max=n - 1)  # NaN logits: the loss
    low, high = cdf.gather(1, tile), cdf.gather(1, tile + 1)  # will say so
    within = e[torch.arange(B, device=e.device), tile[:, 0]].double().cumsum(-1)  # (B, TILE)
    place = torch.searchsorted(within, (at - low) / (high - low) * within[:, -1:], right=True)
    token = (tile * TILE + place).clamp(max=V - 1)
    return token[:, 0], (z.gather(1, token) - m - total.log()).to(z.dtype)[:, 0]


def pack_prompts(prompts: list[list[int]], config, max_new_tokens: int) -> tuple[Tensor, Tensor]:
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


def cast_once(model, device: torch.device):
    """The model with its matrices in autocast's dtype, sharing the rest; itself without autocast.

    Autocast would cast what goes through each layer at every step, and frozen weights too.
    """
    if not torch.is_autocast_enabled(device.type):
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin, dtype = copy.deepcopy(model, shared), torch.get_autocast_dtype(device.type)
    for module in twin.modules():
        if isinstance(module, Linear):
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    return twin


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
    idx, n_prompt = (x.to(device) for x in pack_prompts(prompts, model.config, max_new_tokens))
    B, T = idx.shape
    u = (torch.rand(B, max_new_tokens, generator=rng) if u is None else u).to(device)
    out = Rollout(idx, torch.zeros(B, T - 1, dtype=torch.bool, device=device),
                  torch.zeros(B, T - 1, device=device), n_prompt,
                  torch.zeros(B, dtype=torch.bool, device=device))
    model = model if isinstance(model, Compiled) else cast_once(model, device)
    with torch.autocast(device.type, enabled=False):
        _fill(out, model, u, stop, temperature=temperature, top_k=top_k, top_p=top_p)
    end = int((n_prompt + out.mask.sum(1)).max())
    return Rollout(idx[:, :end], out.mask[:, : end - 1], out.logp[:, : end - 1], n_prompt,
                   out.stopped)


def _next_logits(model, cache, token: Tensor) -> Tensor:
    """After token (B,), the next one's logits (B, V)."""
    return model.logits(model(token[:, None], cache=cache)[:, -1])


def _fill(out: Rollout, model, u: Tensor, stop: int | None, **sampling) -> None:
    """Writes the response tokens, their mask and logp, and which rows have stopped."""
    (B, T), max_new_tokens = out.idx.shape, u.shape[1]
    cache, compiled = model.new_cache(B, T), isinstance(model, Compiled)
    start = int(out.n_prompt.min())
    rows, first = torch.arange(B, device=u.device), out.n_prompt  # those still in the batch
    # 1. prefill: what all prompts have; it gives each row a token
    h = model(out.idx[:, :start], cache=cache)[:, -1]
    token, logp = sample(model.logits(h), u[:, 0], **sampling)
    step = model.stepper(cache, **sampling) if compiled else (
        lambda token, u: sample(_next_logits(model, cache, token), u, **sampling))
    for t in range(start, T):
        # 2. keep it where the row is past its prompt and not yet finished
        alive = (t >= first) & (t < first + max_new_tokens) & ~out.stopped[rows]
        token = torch.where(alive, token, out.idx[rows, t])
        out.idx[rows, t], out.mask[rows, t - 1], out.logp[rows, t - 1] = token, alive, logp * alive
        if stop is not None:
            out.stopped[rows] |= alive & (token == stop)
        # 3. when a quarter of the rows have finished, go on with the others. A GPU would have to
        #    wait for the answer: it is asked now and then.
        may_end = stop is not None or t + 1 >= start + max_new_tokens
        if may_end and (u.device.type == "cpu" or t % 8 == 0 or t + 1 == T):
            going = ((t + 1 < first + max_new_tokens) & ~out.stopped[rows]).nonzero()[:, 0]
            if not len(going):
                return
            if len(going) <= 0.75 * len(rows) and not compiled:
                rows, first, token = rows[going], first[going], token[going]
                cache.keep(going)
        # 4. the next token of each row, at the number u that belongs to it
        new = (t + 1 - first).clamp(0, max_new_tokens - 1)
        token, logp = step(token, u[rows, new])


def _keep_guards(guards) -> list[bool]:
    """Compiled's own model never changes: of the guards on it, those on its weights will do.

    They are there where weights are frozen into the code, as on a CPU, and tell models apart.
    """
    return [not guard.name.startswith("model") or guard.guard_type == "ID_MATCH"
            for guard in guards]


def _capture(function, rewind):
    """One call of function as a CUDA graph: its results, and what makes them again in place.

    Before it come two calls, rewound, on a stream of their own: they compile, and make libraries
    allocate what they keep, which a capture must not see.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
            rewind()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return results, graph.replay


class Compiled:
    """A model for many rollouts from fixed weights: a copy of it whose one-token step is compiled.

    Goes to `generate` in the model's place; make it under the same autocast. The first rollout of
    a batch size and length (rounded up to WINDOW) takes up to a minute more. On a CPU it needs
    torch 2.13 and a C++ compiler, and packs the weights for the matrix units; on a GPU a step is
    one CUDA graph, kept with its cache for each shape. Finished rows stay until all have. torch
    keeps the copy until `torch.compiler.reset()`. UserError for n-grams, and other devices.
    """

    def __init__(self, model):
        if model.config.ngram_rows:
            raise UserError("a model with n-gram embeddings cannot be compiled for sampling: "
                            "give generate the model itself")
        device = model.head.weight.device
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"sampling is not compiled on {device.type}: give generate the model")
        self.model = copy.deepcopy(cast_once(model, device)).eval()
        self.config, self.head = self.model.config, self.model.head
        self.logits = self.model.logits
        self._graphs = {} if device.type == "cuda" else None  # shape and sampling -> _Graph
        # A graph's replays check no guards, and weights are not among those of a GPU.
        options = {"guard_filter_fn": _keep_guards} if self._graphs is None else None
        self._next_logits = torch.compile(_next_logits, fullgraph=True, dynamic=False,
                                          options=options)

    def __call__(self, idx: Tensor, cache=None) -> Tensor:
        return self.model(idx, cache=cache)

    def new_cache(self, batch: int, length: int):
        """A cache a window longer than need be: few shapes, and never seen whole."""
        return self.model.new_cache(batch, (-(-length // WINDOW) + 1) * WINDOW)

    def stepper(self, cache, **sampling):
        """(token (B,), u (B,)) -> the next token and its logp, from where the cache stands."""
        start = cache.pos
        cache.make_static()
        if self._graphs is None:
            steps = itertools.count(start + 1)
            return lambda token, u: sample(self._on_cpu(cache, token, next(steps)), u, **sampling)
        key = (*cache.idx.shape, *sampling.values())
        if key not in self._graphs:
            step = lambda token, u: sample(self._step(cache, token), u, **sampling)  # noqa: E731
            self._graphs[key] = _Graph(step, cache)
        return self._graphs[key].begin(cache)

    def _on_cpu(self, cache, token: Tensor, n_seen: int) -> Tensor:
        """A step with packed weights, on the windows of the cache that hold n_seen tokens."""
        from torch._inductor import config  # takes a second

        cache.slots = torch.arange(-(-n_seen // WINDOW) * WINDOW)
        torch._dynamo.mark_dynamic(cache.slots, 0)
        with config.patch(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN",
                          autotune_num_choices_displayed=0,
                          max_autotune_report_choices_stats=False):
            return self._step(cache, token)

    def _step(self, cache, token: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=256):  # shapes; 8 are too few
            return self._next_logits(self.model, cache, token)


class _Graph:
    """A step as one CUDA graph: it reads and writes the very tensors that it was captured with."""

    def __init__(self, step, cache):
        B, device = len(cache.idx), cache.idx.device
        self.cache, start = cache, cache.pos.clone()
        self.token = torch.zeros(B, dtype=torch.int64, device=device)
        self.u = torch.zeros(B, device=device)
        self.results, self.replay = _capture(lambda: step(self.token, self.u),
                                             lambda: cache.pos.copy_(start))

    def begin(self, cache):
        """Starts from another cache of the same shape."""
        if cache is not self.cache:
            for mine, other in zip((*self.cache.k, *self.cache.v, self.cache.pos),
                                   (*cache.k, *cache.v, cache.pos), strict=True):
                mine.copy_(other)
        return self

    def __call__(self, token: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Results that hold until the next call."""
        self.token.copy_(token)
        self.u.copy_(u)
        self.replay()
        return self.results
