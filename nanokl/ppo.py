"""KL-penalised PPO: maximise E[score] - beta KL(policy || ref) over whole responses.

One batch goes through rollout -> score -> measure -> advantages -> a few epochs of minibatches.
All per-token tensors are (B, T-1), aligned with logp, and True in `mask` marks the response: of a
dialogue all of the model's replies, with gaps where the user speaks.
Ziegler et al. arXiv:1909.08593; Schulman et al. arXiv:1707.06347. Left out: a critic
that starts from other weights than the reference's.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanokl import UserError, require_positive
from nanokl.generate import generate
from nanokl.gpt import GPT
from nanokl.kl import KLConfig, at_last, k1, kl_loss, paid_in_reward
from nanokl.logprob import linear_logprob
from nanokl.reward import RewardFunction, check_scores
from nanokl.rollout import Rollout, SamplingConfig, gather

MOST = 0.95  # of a token's own price that its baseline may hold: the loss keeps a KL


@dataclass(kw_only=True)
class PPOConfig(SamplingConfig, KLConfig):
    """What the update needs to know; the scripts add data and evaluation."""

    n_epoch: int = 2  # passes over each batch
    minibatch: int = 64  # rows per gradient step
    gamma: float = 1.0  # discount; below 1 the objective is no longer E[score] - beta KL
    lam: float = 0.95  # GAE
    clip: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # of the value's move
    value_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 1.0  # gradient clipping
    critic_layers: int = 2  # of the critic's own trunk, at most the policy's; 0: it shares that one
    critic_lr: float = 1.0  # the critic's own rates, times lr and muon_lr
    shaping: bool = False  # each token is paid by what it adds to the guess of the text's score
    worth: bool = False  # what a token adds by itself is learnt of all tokens, drawn or not
    env: str | None = None  # dialogues: FILE.py:FUNCTION, such as nanokl/dialogue.py:arithmetic
    turns: int = 1  # replies of a dialogue, at most; each follows max_prompt tokens, at most

    @property
    def width(self) -> int:
        """Tokens of the longest text, with the one that starts it."""
        return 1 + self.turns * (self.max_prompt + self.max_new_tokens)

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        KLConfig.__post_init__(self)
        require_positive(self, "n_epoch", "minibatch", "clip", "value_clip", "max_grad_norm",
                         "critic_lr", "turns")
        if self.turns > 1 and self.env is None:
            raise UserError(f"turns is {self.turns} and env {self.env}: nobody answers; give --env "
                            "nanokl/dialogue.py:arithmetic, or another")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 to 1")
        if not 0 <= self.value_coef < float("inf"):
            raise UserError(f"value_coef is {self.value_coef}: give 0 or more")
        if self.shaping and self.gamma != 1:
            raise UserError(f"gamma is {self.gamma}: shaping needs 1; give --no-shaping")


@dataclass
class Experience:
    """A batch of rollouts with everything that the update reads."""

    rollout: Rollout
    score: Tensor  # (B,) of the whole text
    logp: Tensor  # (B, T-1) of the policy that sampled, by the same code as in the update
    logp_ref: Tensor  # (B, T-1)
    kl: Tensor  # (B, T-1) exact full-vocabulary KL(policy || ref) at each step
    entropy: Tensor  # (B, T-1)
    value: Tensor  # (B, T-1)
    adv: Tensor  # (B, T-1) whitened
    ret: Tensor  # (B, T-1)
    unit: Tensor | float = 1.0  # of adv, in reward: its sd before it was whitened
    beta: float = 0.0  # price of a nat in the loss, in reward
    ref: tuple[Tensor, Tensor] | None = None  # hidden states, head: for an exact KL in the loss
    worth: Tensor | None = None  # (V,) of each token in the loss, in reward


# reward_t = -beta k1_t + [t last] score,  k1_t = logp_t - logp_ref_t.
# Summed over the response its mean is E[score] - beta KL(policy || ref), and as a reward its
# policy gradient is exact. Other places are not as good: kl.py.
def kl_penalised_reward(logp: Tensor, logp_ref: Tensor, score: Tensor, mask: Tensor, *,
                        beta: float, nats: Tensor | None = None) -> Tensor:
    """(B, T-1) rewards: the price of each token, and the score on the last real token.

    `score` (B,), or each token's share of it (B, T-1); `nats`: what tokens pay for instead of k1.
    """
    nats = k1(logp, logp_ref) if nats is None else nats
    reward, score = -beta * nats * mask, score.to(logp)
    return reward + (at_last(score, mask) if score.ndim == 1 else score)


# delta_t = reward_t + gamma value_{t+1} - value_t;  adv_t = delta_t + gamma lam adv_{t+1};
# ret_t = adv_t + value_t.  arXiv:1506.02438 eq. 16.
def gae(reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns, (B, T) like everything given, 0 outside the mask.

    The value after a row's last token is 0: a response ends there, stopped or cut. What a user
    says is skipped: after the last token of a reply comes the first of the next.
    """
    adv = torch.zeros_like(reward)
    next_adv = next_value = reward.new_zeros(len(reward))
    for t in reversed(range(reward.shape[1])):
        mine, delta = mask[:, t], reward[:, t] + gamma * next_value - value[:, t]
        next_adv = torch.where(mine, delta + gamma * lam * next_adv, next_adv)
        next_value = torch.where(mine, value[:, t], next_value)
        adv[:, t] = next_adv * mine
    return adv, (adv + value) * mask


# b_t = c worth(y_t) + d beta k1_t,  (c, d) of least var(adv - b), d between 0 and MOST
def token_baseline(adv: Tensor, worth: Tensor, cost: Tensor, mask: Tensor) -> tuple[float, float]:
    """The (c, d) that leave the advantages the least scatter; all (B, T-1).

    adv leaves out what a token itself costs, which is `cost`, beta k1. Of the batch they serve, as
    the mean of whitening is: two numbers of thousands of tokens, which biases by about as little.
    """
    a, w, k = (x[mask].cpu().double() for x in (adv, worth, cost))  # MPS has no float64
    a, w, k = a - a.mean(), w - w.mean(), k - k.mean()
    slope = lambda y, x: (y @ x / (x @ x).clamp(min=1e-12)).item()  # noqa: E731
    d = min(max(slope(a, k - slope(k, w) * w), 0.0), MOST)
    return slope(a - d * k, w), d


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True, whatever lies elsewhere; 0 (with a graph) where none is."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


# 1 / sqrt(var + 1e-8), var biased like TensorFlow's moments, which PPO's settings assume
def masked_scale(x: Tensor, mask: Tensor) -> Tensor:
    """What x is multiplied by to have variance 1 over the True tokens."""
    return (masked_mean((x - masked_mean(x, mask)).square(), mask) + 1e-8).rsqrt()


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x at mean 0 and variance 1 over the True tokens; 0 elsewhere."""
    return torch.where(mask, (x - masked_mean(x, mask)) * masked_scale(x, mask), 0)


# L = -mean min(rho adv, clip(rho, 1-eps, 1+eps) adv),  rho = exp(logp - logp_old).  eq. 7
def policy_loss(logp: Tensor, logp_old: Tensor, adv: Tensor, mask: Tensor, *,
                clip: float) -> tuple[Tensor, dict]:
    """Clipped surrogate, mean over the response tokens; returns (loss, info)."""
    log_ratio = (logp - logp_old) * mask
    ratio = log_ratio.exp()
    loss = torch.maximum(-ratio * adv, -ratio.clamp(1 - clip, 1 + clip) * adv)
    with torch.no_grad():
        info = {
            "clip_fraction": masked_mean(((ratio - 1).abs() > clip).float(), mask),
            "approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
            "ratio_max_deviation": (ratio - 1).abs().max(),
        }
    return masked_mean(loss, mask), info


# L = 1/2 mean max((v - ret)^2, (v_old + clip(v - v_old, +-eps) - ret)^2)
def value_loss(value: Tensor, value_old: Tensor, ret: Tensor, mask: Tensor, *,
               clip: float) -> Tensor:
    """Half the squared error of the value, the worse of moved and clipped, over the response."""
    near = value_old + (value - value_old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((value - ret).square(), (near - ret).square()), mask)


def make_policy(ref: GPT, *, critic_layers: int = 0) -> GPT:
    """A copy of ref, without dropout, with values that start at 0.

    `critic_layers`: of the critic's own trunk, copies of ref's first ones, and no more than it has.
    With none, the value head reads the policy's hidden states, and its gradient disturbs them.
    """
    critic_layers = min(critic_layers, ref.config.n_layer)
    policy = GPT(replace(ref.config, value_head=True, dropout=0.0, ngram_dropout=0.0,
                         critic_layers=critic_layers))
    weights = ref.weights_without_critic()
    missing, extra = policy.load_state_dict(weights, strict=False)
    assert all(k.startswith(("value.", "critic.")) for k in missing) and not extra, (missing, extra)
    if critic_layers:
        policy.critic.load_state_dict({k: weights[k] for k in policy.critic.state_dict()})
    return policy.to(ref.head.weight.device)


def sample_rollouts(policy: GPT, prompts: list[list[int]], config: SamplingConfig, runtime, *,
                    stop: int, rng: torch.Generator | None = None,
                    u: Tensor | None = None) -> Rollout:
    """Responses to all prompts, each rank sampling its share, in one fixed width T.

    `u` (B, max_new_tokens): the uniform numbers, as for `generate`; drawn by `rng` if None.
    """
    u = torch.rand(len(prompts), config.max_new_tokens, generator=rng) if u is None else u
    with runtime.autocast():
        mine = generate(policy, prompts[runtime.rank :: runtime.world], config.max_new_tokens,
                        temperature=config.temperature, stop=stop, u=runtime.shard(u))
    return gather(mine, config, runtime)


def score_ids(reward: RewardFunction, ids: list[list[int]], tokenizer) -> Tensor:
    """Scores (n,) of texts, prompts included."""
    stop = tokenizer.special("<|endoftext|>")  # opens and may close a text; no part of it
    texts = [tokenizer.decode([i for i in row if i != stop]) for row in ids]
    return check_scores(reward(ids, texts), len(ids))


def score_rollouts(reward: RewardFunction, rollout: Rollout, tokenizer, runtime) -> Tensor:
    """Scores (B,) of the whole texts, each rank scoring its share."""
    score = score_ids(reward, runtime.shard(rollout.rows()), tokenizer)
    return runtime.gather(score.to(rollout.idx.device))


@torch.no_grad()
def measure(policy: GPT, ref: GPT, rollout: Rollout, minibatches: list[Tensor],
            config: SamplingConfig, runtime) -> tuple[Tensor, ...]:
    """logp, logp_ref, kl, entropy, value of the response tokens, (B, T-1) each, 0 elsewhere.

    Last come the reference's hidden states there (B, T-1, C), which the loss may need again. All
    in the very minibatches of the first epoch: the same rows in the same shapes give the same bits,
    so that the first ratio is exactly 1 in any precision.
    """
    out = torch.zeros(5, *rollout.mask.shape, device=rollout.idx.device)
    hidden = out.new_zeros(*rollout.mask.shape, ref.config.n_embd)
    for rows in minibatches:
        mine = runtime.shard(rows)
        idx, mask = rollout.idx[mine], rollout.mask[mine]
        with runtime.autocast():
            h, h_ref = policy(idx)[:, :-1], ref(idx)[:, :-1]
            new = linear_logprob(h, policy.head.weight, idx[:, 1:], mask=mask, entropy=True,
                                 temperature=config.temperature, ref=(h_ref, ref.head.weight))
            old = linear_logprob(h_ref, ref.head.weight, idx[:, 1:], mask=mask,
                                 temperature=config.temperature)
            value = policy.values(idx[:, :-1], h)
        stats = torch.stack([new.logp, old.logp, new.kl, new.entropy, value * mask], dim=1)
        out[:, rows] = runtime.gather(stats).transpose(0, 1)
        hidden[rows] = runtime.gather((h_ref * mask[..., None]).to(hidden))
    return *out, hidden


def collect(policy: GPT, ref: GPT, rollout: Rollout, score: Tensor, minibatches: list[Tensor],
            config: PPOConfig, runtime, *, beta: float, shares: Tensor | None = None,
            worth: Tensor | None = None) -> Experience:
    """Measured rollouts with their advantages, whitened; shares (B, T-1), worth (V,): shaping.py.

    With `worth` a part of what a token costs by itself is not in its advantage, but in the loss,
    where the reference is tilted by a part of the worth.
    """
    *measured, h_ref = measure(policy, ref, rollout, minibatches, config, runtime)
    (logp, logp_ref, kl, _, value), mask = measured, rollout.mask
    nats = paid_in_reward(logp, logp_ref, kl, mask, config)
    paid = score if shares is None else shares
    reward = kl_penalised_reward(logp, logp_ref, paid, mask, beta=beta, nats=nats)
    adv, ret = gae(reward, value, mask, gamma=config.gamma, lam=config.lam)
    if worth is not None:
        own, of_token = beta * nats * mask, worth[rollout.idx[:, 1:]] * mask
        c, d = token_baseline(adv + own, of_token, own, mask)
        adv, beta, worth = adv + (1 - d) * own - c * of_token, (1 - d) * beta, c * worth
    exact = worth is not None or (config.kl_in_loss and config.kl_estimator == "exact")
    return Experience(rollout, score, *measured, masked_whiten(adv, mask), ret,
                      1 / masked_scale(adv, mask), beta,
                      (h_ref, ref.head.weight) if exact else None, worth)


def minibatch_loss(model, policy: GPT, x: Experience, rows: Tensor, config: PPOConfig,
                   runtime) -> tuple[Tensor, dict]:
    """The loss on a minibatch: policy's, value's, maybe the KL's.

    `model` is the policy as runtime.wrap gave it.
    """
    # The mean over all ranks' tokens: each rank's mean is weighed by its share of them.
    share = x.rollout.mask[runtime.shard(rows)].sum() / x.rollout.mask[rows].sum()
    rows = runtime.shard(rows)
    idx, mask = x.rollout.idx[rows], x.rollout.mask[rows]
    price = x.beta / x.unit  # of a nat, in the units of adv
    with runtime.autocast():
        h = model(idx)[:, :-1]
        ref = x.ref and (x.ref[0][rows], x.ref[1])
        if x.worth is not None:
            ref = *ref, config.temperature / x.beta * x.worth
        new = linear_logprob(h, policy.head.weight, idx[:, 1:], mask=mask, ref=ref,
                             temperature=config.temperature)
        value = policy.values(idx[:, :-1], h)
    loss_pi, info = policy_loss(new.logp, x.logp[rows], x.adv[rows], mask, clip=config.clip)
    loss_v = value_loss(value, x.value[rows], x.ret[rows], mask, clip=config.value_clip)
    loss = loss_pi + config.value_coef * loss_v
    if x.worth is not None:  # the sum over the vocabulary in shaping.py
        loss = loss + price * masked_mean(new.kl, mask)
    elif config.kl_in_loss:
        loss_kl = kl_loss(new.logp, x.logp_ref[rows], new.kl, mask, config, price=price)
        loss, info = loss + loss_kl, {"kl_loss": loss_kl.detach(), **info}
    return loss * share * runtime.world, {"value_loss": loss_v.detach(), **info}
