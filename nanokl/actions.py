"""What each next token is worth, the whole vocabulary at once, and not only the one that was drawn.

    grad J = E sum_t [ sum_a grad pi(a | s_t) (Q(s_t, a) - beta log pi(a | s_t) / ref(a | s_t))
                       + (adv_t - Q(s_t, y_t)) grad log pi(y_t | s_t) ]          for any Q(s, a)
    the first sum is -beta grad KL(pi || ref exp(Q / beta) / z), of one step

adv_t has the price of the tokens after t; that of t itself is in the first sum, exactly. Q learns
to foresee adv_t: what it knows no longer depends on which token happened to be drawn. The critic's
states and embeddings give it, Q(s, a) = action(h(s)) . wte[a], so that ref exp(Q / beta) / z is a
head of two parts, and linear_logprob has its KL. Expected policy gradients, arXiv:1706.05374; a
baseline that knows the action, arXiv:1611.02247; the KL is the policy step of soft actor-critic,
arXiv:1801.01290. Left out: targets from other policies' texts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Head = tuple[Tensor, Tensor]  # hidden states (B, T, C) and a weight (V, C): logits are h W^T


# logits + (T / beta) Q, all divided by the temperature T, is log ref + Q / beta + const
def improved(ref: Head, q: Head, *, beta: float, temperature: float) -> Head:
    """The head of ref exp(Q / beta) / z, for the heads of ref and of Q; without gradient."""
    (h, weight), (h_q, weight_q) = ref, q
    h_q, weight_q = temperature / beta * h_q.detach().to(h), weight_q.detach()
    return torch.cat((h, h_q), -1), torch.cat((weight, weight_q), 1)


def action_values(q: Head, tokens: Tensor) -> Tensor:
    """Q(s_t, y_t), shaped like tokens (B, T), float32."""
    h, weight = q
    return (h.float() * F.embedding(tokens, weight)).sum(-1)


# L = 1/2 mean (Q - adv)^2
def regression(Q: Tensor, adv: Tensor, mask: Tensor) -> tuple[Tensor, dict]:
    """Half the squared error of Q, mean over True tokens, and the share of adv^2 it explains."""
    miss = ((Q - adv).square() * mask).sum()
    info = {"advantage_explained": 1 - (miss / (adv.square() * mask).sum()).detach()}
    return 0.5 * miss / mask.sum().clamp(min=1), info
