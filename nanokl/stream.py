"""One text, token by token as it is sampled, and as much of it as can be shown.

The same uniform numbers give the same tokens as `generate.generate`. What a terminal gets is whole
characters (a token may be a third of one), and no control character: a sampled escape sequence
would move the cursor, or worse. Left out: batches, top-k and top-p.
"""

import codecs
import unicodedata
from collections.abc import Iterator

import torch
from torch import Tensor

from nanokl.generate import cast_once, pack_prompts, sample
from nanokl.rollout import Rollout

BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # they turn what follows


def stream(model, prompt: list[int], u: Tensor, *, stop: int,
           temperature: float = 1.0) -> Iterator[int]:
    """Ids of a continuation, each when it is drawn, at most len(u), `stop` included.

    Token j is drawn at u[j], u (max_new_tokens,); call `.eval()` first, and this under the
    runtime's autocast, as `generate`. UserError for a prompt that is empty or too long.
    """
    device = model.head.weight.device
    idx = pack_prompts([prompt], model.config, len(u))[0][:, : len(prompt)].to(device)
    return _tokens(cast_once(model, device), idx, u.to(device), stop, temperature)


@torch.no_grad()
def _tokens(model, idx: Tensor, u: Tensor, stop: int, temperature: float) -> Iterator[int]:
    cache = model.new_cache(1, idx.shape[1] + len(u))
    for at in u.split(1):
        # whoever asks for the next token may be under autocast, and what is cast is cast
        with torch.autocast(u.device.type, enabled=False):
            logits = model.logits(model(idx, cache=cache)[:, -1])
            token, _ = sample(logits, at, temperature=temperature)
        yield int(token)
        if token == stop:
            return
        idx = token[:, None]


def one_row(prompt: list[int], response: list[int], stop: int, device) -> Rollout:
    """A prompt and its response as a Rollout of one row; logp is left at 0."""
    idx = torch.tensor([[*prompt, *response]], device=device)
    mask = (torch.arange(1, idx.shape[1], device=device) >= len(prompt))[None]
    return Rollout(idx, mask, torch.zeros(mask.shape, device=device),
                   torch.tensor([len(prompt)], device=device),
                   torch.tensor([stop in response], device=device))


def visible(text: str) -> str:
    """The text with a picture in the place of each control character but line end and tab.

    Example: "\\x1b[31m" -> "␛[31m". Those that turn the direction of writing are U+FFFD.
    """
    return "".join(map(_picture, text))


def _picture(c: str) -> str:
    if c < " " and c not in "\n\t":
        return chr(0x2400 + ord(c))
    if c == "\x7f":
        return "\u2421"
    turns = unicodedata.bidirectional(c) in BIDI
    return "\ufffd" if turns or "\x80" <= c < "\xa0" else c


class Characters:
    """Bytes that come in any pieces -> the characters that are whole, made visible."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> str:
        """What can be shown now; U+FFFD for what cannot be UTF-8 any more."""
        return visible(self._decoder.decode(piece))

    def end(self) -> str:
        """What is left: U+FFFD for half a character."""
        return visible(self._decoder.decode(b"", final=True))
