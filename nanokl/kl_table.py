"""What each choice in kl.py does to the gradient, and how good each estimate is: exactly.

A policy and a reference on the tree of all texts of T out of V tokens, in float64. Each choice goes
through the functions of ppo.py, every text weighed by its probability, with no score, beta 1 and
values 0: what they follow should then be the gradient of KL(policy || ref), which autograd has
from the definition. What is 0 or equal is so on any tree; the other sizes are those of this one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokl import exact, ppo
from nanokl.kl import MEANING, MYOPIC, KLConfig, estimates, kl_loss, paid_in_reward


@dataclass
class World:
    """A policy, by its logits at all prefixes of one length, T levels (V^t, V), and a reference."""

    logits: list[Tensor]
    ref: exact.Levels

    @property
    def policy(self) -> exact.Levels:
        return [x.log_softmax(-1) for x in self.logits]

    def kl(self) -> Tensor:
        """KL(policy || ref) by its definition."""
        return exact.kl(exact.joint(self.policy), exact.joint(self.ref))

    def tokens(self) -> tuple[Tensor, ...]:
        """logp, logp_ref and the exact KL of each step along all texts, (V^T, T) each."""
        steps = [(p.exp() * (p - q)).sum(1) for p, q in zip(self.policy, self.ref, strict=True)]
        n = self.ref[-1].numel()
        return tuple(torch.stack([x.flatten().repeat_interleave(n // x.numel()) for x in levels], 1)
                     for levels in (self.policy, self.ref, steps))

    def gradient(self, loss: Tensor) -> Tensor:
        """That of a loss by all logits, in one vector."""
        grads = torch.autograd.grad(loss, self.logits, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])


def make_world(V: int = 4, T: int = 3, *, seed: int = 0, move: float = 0.7) -> World:
    """A random reference, and a policy that has moved away from it."""
    rng = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2, V**t, V, generator=rng, dtype=torch.float64) for t in range(T)]
    return World([(x[0] + move * x[1]).requires_grad_() for x in logits],
                 [x[0].log_softmax(-1) for x in logits])


# All texts at once instead of samples: a loss is a mean over tokens, so that a text's weight is its
# probability times the number of all tokens.
def surrogate(world: World, how: KLConfig, *, gamma: float = 1.0) -> Tensor:
    """The loss that PPO follows on-policy where all that counts is the KL, a nat at price 1."""
    logp, logp_ref, kl = world.tokens()
    mask, old = torch.ones_like(logp, dtype=torch.bool), logp.detach()
    weight = old.sum(1, keepdim=True).exp() * mask.sum()
    nats = paid_in_reward(logp, logp_ref, kl, mask, how)
    score = old.new_zeros(len(old))
    reward = ppo.kl_penalised_reward(old, logp_ref, score, mask, beta=1.0, nats=nats)
    adv, _ = ppo.gae(reward, torch.zeros_like(old), mask, gamma=gamma, lam=1.0)
    loss, _ = ppo.policy_loss(logp, old, weight * adv, mask, clip=0.2)
    if how.kl_in_loss:
        loss = loss + kl_loss(logp, logp_ref, kl, mask, how, price=weight)
    return loss


def error_and_cosine(got: Tensor, true: Tensor) -> tuple[float, float]:
    """|got - true| / |true|, and the cosine between them: NaN where one is 0 but for rounding."""
    error = ((got - true).norm() / true.norm()).item()
    if got.norm() < 1e-12 * true.norm():
        return error, float("nan")
    return error, torch.cosine_similarity(got, true, dim=0).item()


def choices() -> list[tuple[str, KLConfig, float, str]]:
    """Name, flags, gamma and meaning of each row of the table."""
    rows = [("{:6}{:7}{}".format(*key),
             KLConfig(kl_estimator=key[0], kl_place=key[1], kl_per=key[2]), 1.0, meaning)
            for key, meaning in MEANING.items()]
    return [*rows, ("k1    reward, --gamma 0", KLConfig(), 0.0, MYOPIC)]  # for the own step alone


def gradients(world: World) -> Tensor:
    """Relative error and cosine of each choice's gradient, beside the exact one (choices, 2)."""
    true = world.gradient(world.kl())
    return torch.tensor([
        error_and_cosine(world.gradient(surrogate(world, how, gamma=gamma)), true)
        for _, how, gamma, _ in choices()])


def values(world: World) -> list[tuple[str, float, float]]:
    """Of each estimator of one response's KL: its name, mean and standard deviation."""
    logp, logp_ref, kl = (x.detach() for x in world.tokens())
    p, mask, rows = logp.sum(1).exp(), torch.ones_like(logp, dtype=torch.bool), []
    for name, per in (("k1", "token"), ("k2", "token"), ("k2", "sequence"), ("k3", "token"),
                      ("k3", "sequence"), ("exact", "token")):
        place = "both" if name == "exact" else "reward"
        how = KLConfig(kl_estimator=name, kl_place=place, kl_per=per)
        x = estimates(logp, logp_ref, kl, mask, how).sum(1)
        mean = (p * x).sum()
        rows.append((f"{name:6}{per}", mean.item(), (p * (x - mean).square()).sum().sqrt().item()))
    return rows


def table(trees: int = 20) -> str:
    """Both as text, for the screen and the README."""
    worlds = [make_world(seed=seed) for seed in range(trees)]
    x = torch.stack([gradients(world) for world in worlds])  # (trees, choices, 2)
    columns = (*x.median(0).values.unbind(1), x[..., 1].amin(0), x[..., 1].amax(0))
    lines = [f"the KL's gradient, as charged, beside the exact one: medians over {trees} trees",
             "", "estimator, place, per   error cosine least   most"]
    for (name, _, _, meaning), *numbers in zip(choices(), *columns, strict=True):
        text = "{:5.2f} {:6.2f}  {:5.2f}  {:5.2f}".format(*numbers).replace("nan", "  -")
        lines.append(f"{name:24}{text}  {meaning}")
    lines += ["", f"the KL of one response, as estimated: truly {worlds[0].kl().item():.3f} nats "
              "on the first tree", "", "estimator, per            mean     sd"]
    lines += [f"{name:24}{mean:6.3f} {sd:6.3f}" for name, mean, sd in values(worlds[0])]
    return "\n".join(lines)
