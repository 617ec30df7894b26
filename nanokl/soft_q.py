"""Q-learning and SARSA with a KL penalty, as tables: two ways to the posterior by single texts.

A state is a text so far, an action the next token, the reward comes with the last one, and a token
that the policy likes better than the reference costs beta times the log-ratio.

    pi(a | s) = ref(a | s) exp((Q(s, a) - V(s)) / beta)                 the policy that Q stands for
    V(s) = beta log sum_a ref(a | s) exp(Q(s, a) / beta)                its normaliser
    soft Q-learning    Q(s, a) <- Q(s, a) + rate (V(sa) - Q(s, a))      of the best policy
    SARSA              Q(s, a) <- Q(s, a) + rate (Q(sa, a') - beta log pi(a' | sa) / ref(a' | sa)
                                                  - Q(s, a))            of the policy that took a'
    expected SARSA     the same with the mean over a' ~ pi(. | sa)

At a whole text both targets are its reward. Haarnoja et al. arXiv:1702.08165 (soft Q-learning),
Rummery & Niranjan 1994 (SARSA), Levine arXiv:1805.00909. The fixed point of the first is
`exact.soft_values`. That of SARSA is `exact.policy_values`, and the policy that its Q stands for is
better than pi (Haarnoja et al. arXiv:1801.01290, lemma 2); taken in pi's place, round after round,
it comes to the posterior, too. Would pi follow Q at once, SARSA's target were V(sa), whatever a'
is: soft Q-learning again. Left out: function approximation, rewards inside a text, chance in the
environment, under which V would need a mean over what follows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanokl.exact import Levels


def policy_of(ref: Levels, Q: Levels, beta: float) -> Levels:
    """log pi(a | s) of the policy that Q stands for."""
    return [(level + q / beta).log_softmax(1) for level, q in zip(ref, Q, strict=True)]


def draw(logits: Callable[[int, int], Tensor], V: int, T: int, rng: torch.Generator):
    """A text, as the prefix's row and the token of each of its T steps; logits(t, s) gives (V,)."""
    path, s = [], 0
    for t in range(T):
        a = int(torch.multinomial(logits(t, s).softmax(0), 1, generator=rng))
        path.append((s, a))
        s = s * V + a
    return path


# The last token of a text first, so that at rate 1 a text's whole path is up to date: the world has
# no chance in it, and once each text was seen, Q is exact. Q starts at the highest reward: what has
# not been tried looks good, and so is tried.
def soft_q(ref: Levels, r: Tensor, beta: float, *, episodes: int, rng: torch.Generator,
           rate: float = 1.0, own: bool = True) -> Levels:
    """Tabular soft Q-learning; returns its policy's levels.

    Texts are drawn from the policy that Q stands for, or, if not `own`, from the reference: the
    targets do not ask who wrote them.
    """
    Q, V, T = [torch.full_like(level, r.max()) for level in ref], ref[0].shape[1], len(ref)
    for _ in range(episodes):
        path = draw(lambda t, s: ref[t][s] + Q[t][s] / beta if own else ref[t][s], V, T, rng)
        for t, (s, a) in reversed(list(enumerate(path))):
            after = s * V + a
            target = r[after]
            if t + 1 < T:
                target = beta * (ref[t + 1][after] + Q[t + 1][after] / beta).logsumexp(0)
            Q[t][s, a] += rate * (target - Q[t][s, a])
    return policy_of(ref, Q, beta)


# rate = 1 / n, n the visits of (s, a) in this round: Q is the mean of its targets.
def sarsa(ref: Levels, r: Tensor, beta: float, *, rounds: int, episodes: int,
          rng: torch.Generator, expected: bool = False) -> Levels:
    """Rounds of SARSA, `episodes` texts each, of the policy that the round before has made.

    The first round follows the reference; what a round has not visited keeps its Q, 0 at first.
    Returns the last policy's levels. T rounds are enough if each is exact: a round makes the policy
    right at the states below which it was right already.
    """
    Q, V, T = [torch.zeros_like(level) for level in ref], ref[0].shape[1], len(ref)
    policy = ref
    for _ in range(rounds):
        visits = [torch.zeros_like(level) for level in ref]
        price = [beta * torch.where(p > -torch.inf, p - q, 0)
                 for p, q in zip(policy, ref, strict=True)]
        for _ in range(episodes):
            path = draw(lambda t, s, policy=policy: policy[t][s], V, T, rng)
            for t, (s, a) in reversed(list(enumerate(path))):
                after, target = s * V + a, None
                if t + 1 == T:
                    target = r[after]
                elif expected:
                    gain = Q[t + 1][after] - price[t + 1][after]
                    target = (policy[t + 1][after].exp() * gain).sum()
                else:
                    taken = after, path[t + 1][1]
                    target = Q[t + 1][taken] - price[t + 1][taken]
                visits[t][s, a] += 1
                Q[t][s, a] += (target - Q[t][s, a]) / visits[t][s, a]
        policy = policy_of(ref, Q, beta)
    return policy
