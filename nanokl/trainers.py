"""Other ways to the posterior than PPO: RLOO, GRPO, DPO, KL-DPG, and SFT on its samples.

All take PPO's rollouts, measurement, minibatches and steps. What differs is here: each prompt has
a group of K responses, which are each other's yardstick in the place of a critic, and a response
has one advantage for all its tokens. Tensors over groups are (G, K), rows of one prompt side by
side in a batch; log_ratio (G, K) is the sum over a response of logp - logp_ref.

    method   samples of   follows                                    leads to
    ppo      policy       grad J, with a critic (ppo.py)             pi*
    rloo     policy       grad J                                     pi*
    grpo     policy       neither J nor any KL's gradient            not pi*
    dpo      policy       Bradley-Terry of all pairs, soft labels    pi*
    dpg      policy       -grad KL(pi* || pi), by prompts            pi*
    sft      ref          likelihood of K samples, reweighted        pi*, as K grows

At pi* the advantages of rloo and dpg and the gradient of dpo are 0 for each single response, not
only in the mean: what noise is left is that of the way there. Left out: per-token rewards, drawn
preference labels, replay.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from nanokl import UserError, ppo
from nanokl.gpt import GPT
from nanokl.kl import MEANING, KLConfig, k3
from nanokl.logprob import linear_logprob
from nanokl.reward import bradley_terry
from nanokl.rollout import Rollout

# where each method but ppo charges the KL, by its own formula
PLACEMENT = {
    "rloo": "k1 per sequence in the reward, less the mean of the group's others (right)",
    "grpo": f"k3 per token in the loss ({MEANING['k3', 'loss', 'token']})",
    "dpo": "beta log policy/ref is the reward that learns; no price by itself (right)",
    "dpg": "in the target, ref exp(score / beta) / Z; no price by itself (right)",
    "sft": "in the weights exp(score / beta) of ref's samples; no price by itself (right)",
}


@dataclass(kw_only=True)
class TrainerConfig(ppo.PPOConfig):
    """PPO's settings, of which the others need n_epoch, minibatch, clip and max_grad_norm."""

    method: Literal["ppo", "rloo", "grpo", "dpo", "dpg", "sft"] = "ppo"  # the way to the posterior
    group: int | None = None  # samples a prompt: 1 for ppo, 8 for the others

    def __post_init__(self):
        super().__post_init__()
        least = 1 if self.method == "ppo" else 2
        if self.group is None:
            self.group = 1 if self.method == "ppo" else 8
        if self.group < least:
            raise UserError(f"group is {self.group}: {self.method} needs at least {least} samples "
                            "a prompt")
        if self.minibatch % self.group:
            raise UserError(f"minibatch is {self.minibatch}: give a multiple of group, "
                            f"{self.group}, whose samples stay together")
        given = [f"{f.name} {x}" for f in fields(KLConfig) if (x := getattr(self, f.name))
                 != f.default]
        if given and self.method != "ppo":
            raise UserError(f"{', '.join(given)}: only ppo heeds --kl_estimator, --kl_place and "
                            f"--kl_per, {self.method} charges the KL by its own formula: leave "
                            "them out, or choose --method ppo")

    def uses_worth(self, beta: float) -> bool:
        """It goes with shaping, and with a price and place for a token's own KL in the loss."""
        return (self.worth and self.shaping and self.method == "ppo" and beta > 0 and not self.env
                and self.kl_choice == KLConfig().kl_choice)

    @property
    def kl_placement(self) -> str:
        """Where the method charges the KL, and what it follows there."""
        own = "; of its own step partly in the loss, exactly" if self.uses_worth(1.0) else ""
        return PLACEMENT.get(self.method) or self.kl_in_words(self.gamma) + own

    @property
    def kl_warning(self) -> str | None:
        """One line for who has chosen a wrong one."""
        if "(wrong" not in self.kl_placement:
            return None
        return (f"warning: KL as {self.kl_placement}; right are, at gamma 1, k1 in the reward "
                "(ppo's default, and rloo), k2 per sequence in the loss, exact in both")


# R_i = score_i - beta (log pi - log ref)(y_i);  adv_i = R_i - mean of the other R of its group.
# Kool et al. 2019, Buy 4 REINFORCE samples; Ahmadian et al. arXiv:2402.14740. E adv_i grad log pi
# is grad J: the others' mean does not depend on y_i. At pi*, R is beta log Z for every text.
def rloo_advantage(score: Tensor, log_ratio: Tensor, *, beta: float) -> Tensor:
    """Advantages (G, K), in units of the reward; not whitened, so that they vanish at pi*."""
    R = score - beta * log_ratio
    K = R.shape[1]
    return (R - R.mean(1, keepdim=True)) * K / (K - 1)


# adv_i = (score_i - mean) / (sd + 1e-4), sd over n - 1.  Shao et al. arXiv:2402.03300 section 4.1
def grpo_advantage(score: Tensor) -> Tensor:
    """Advantages (G, K) in units of the group's own sd: 0 where all of its scores are alike."""
    return (score - score.mean(1, keepdim=True)) / (score.std(1, keepdim=True) + 1e-4)


# log w = score / beta - log_ratio, so that E_pi w = Z;  w_i / Zhat_i, Zhat_i = mean of the other w.
# grad KL(pi* || pi) = -E_pi[(w / Z - 1) grad log pi].  Parshakova et al. arXiv:1912.08517;
# Korbak et al. arXiv:2206.00761 (baseline 1). Zhat_i does not depend on y_i: the mean gradient
# has the exact direction for each prompt, at E[Z / Zhat] times its length.
def dpg_weight(score: Tensor, log_ratio: Tensor, *, beta: float) -> Tensor:
    """Weights (G, K) of mean about 1, and all 1 at pi*; a single one may be huge."""
    log_w = score / beta - log_ratio
    K = log_w.shape[1]
    own = torch.eye(K, dtype=torch.bool, device=log_w.device)
    others = log_w[:, None].expand(-1, K, K).masked_fill(own, -torch.inf)
    return (log_w - others.logsumexp(2) + math.log(K - 1)).exp()


# w_i = K exp(score_i / beta) / sum_j exp(score_j / beta).  Sampling-importance-resampling (Rubin
# 1988), its mean in the place of the draw; the weights are those of AWR, arXiv:1910.00177.
def sir_weight(score: Tensor, *, beta: float) -> Tensor:
    """Weights (G, K) that turn a group of reference samples into one of pi*, about."""
    return score.shape[1] * (score / beta).softmax(1)


# mean over responses of 1/n sum_t [-min(rho adv, clip(rho) adv) + beta k3_t],  n their tokens.
# arXiv:2402.03300 eq. 3 and 4.
def grpo_loss(logp: Tensor, logp_old: Tensor, logp_ref: Tensor, adv: Tensor, mask: Tensor, *,
              clip: float, beta: float) -> tuple[Tensor, dict]:
    """The published loss, whose fixed point is not pi*, in three ways.

    The division by the sd makes reward's unit, and with it beta's, another one for each prompt and
    policy; k3's gradient is that of a forward KL, of each token alone, blind to what the token
    costs later; and the mean by response makes a long one's tokens weigh less.
    """
    share = mask.sum() / (len(mask) * mask.sum(1, keepdim=True))  # of mean over tokens -> responses
    loss, info = ppo.policy_loss(logp, logp_old, adv * share, mask, clip=clip)
    nats = k3(logp * mask, logp_ref * mask)
    return loss + beta * ppo.masked_mean(nats * share, mask), info


# L = -mean over pairs of p log sigma(beta D) + (1 - p) log sigma(-beta D),
# D = log_ratio_i - log_ratio_j, p = sigma(score_i - score_j).  Rafailov et al. arXiv:2305.18290
# eq. 7, with the label's mean in the place of a drawn one: the same minimum with less noise.
# A pair's term is a cross-entropy, least where sigma(beta D) = p, at beta D = score_i - score_j.
# All pairs are there at once, whatever law they have, if log pi/ref = score / beta + c, and since
# pi sums to 1, c = -log Z: pi is pi*. Labels by the reward model's own odds, which are those before
# it was normalised, sigma((score_i - score_j) / gain), would lead to pi* of the price gain beta.
def dpo_loss(log_ratio: Tensor, score: Tensor, *, beta: float) -> Tensor:
    """Nats per pair (both orders) of all pairs within groups (G, K): a reward model's own loss.

    What learns here is the implicit reward beta log_ratio; E_ref exp(implicit / beta) = 1 always.
    Least at pi*: the labels are soft, Bradley-Terry's odds of the scores as they are.
    """
    label = torch.sigmoid(score[:, :, None] - score[:, None])  # (G, K, K)
    pairs = ~torch.eye(score.shape[1], dtype=torch.bool, device=score.device)
    return bradley_terry(beta * log_ratio, label, pairs.expand_as(label))[0]


def collect(policy: GPT, ref: GPT, rollout: Rollout, score: Tensor, minibatches: list[Tensor],
            config: TrainerConfig, runtime, *, beta: float, **shaping: Tensor) -> ppo.Experience:
    """Measured rollouts with the method's advantages, `group` rows of each prompt side by side.

    dpo has none; those of sft are weights. dpg's weights end at K, which is as large as a weight
    can be whose mean with K - 1 others is 1: without a bound one response would be a whole step.
    """
    if config.method == "ppo":
        return ppo.collect(policy, ref, rollout, score, minibatches, config, runtime, beta=beta,
                           **shaping)
    measured = ppo.measure(policy, ref, rollout, minibatches, config, runtime)[:5]
    logp, logp_ref, _, _, value = measured
    r = score.view(-1, config.group)
    log_ratio = (logp - logp_ref).sum(1).view_as(r)
    match config.method:
        case "rloo":
            adv = rloo_advantage(r, log_ratio, beta=beta)
        case "grpo":
            adv = grpo_advantage(r)
        case "dpo":
            adv = torch.zeros_like(r)
        case "dpg":
            adv = dpg_weight(r, log_ratio, beta=beta).clamp(max=config.group) - 1
        case "sft":
            adv = sir_weight(r, beta=beta)
    adv = adv.view(-1, 1) * rollout.mask
    return ppo.Experience(rollout, score, *measured, adv, value)


def minibatch_loss(model, policy: GPT, x: ppo.Experience, rows: Tensor, config: TrainerConfig,
                   runtime, *, beta: float) -> tuple[Tensor, dict]:
    """The method's loss on a minibatch of `Stage.minibatches`; `model` as runtime.wrap gave it."""
    if config.method == "ppo":
        return ppo.minibatch_loss(model, policy, x, rows, config, runtime)
    # Not divided by the tokens, whose number depends on what was sampled: gradients stay unbiased.
    most = len(rows) * config.turns * config.max_new_tokens / runtime.world
    rows = runtime.shard(rows)
    idx, mask, old, adv = (y[rows] for y in (x.rollout.idx, x.rollout.mask, x.logp, x.adv))
    with runtime.autocast():
        h = model(idx)[:, :-1]
        logp = linear_logprob(h, policy.head.weight, idx[:, 1:], mask=mask,
                              temperature=config.temperature).logp
    loss, info = ppo.policy_loss(logp, old, adv, mask, clip=config.clip)
    match config.method:
        case "grpo":
            loss, _ = grpo_loss(logp, old, x.logp_ref[rows], adv, mask, clip=config.clip, beta=beta)
        case "dpo":  # a group is a column of the minibatch
            log_ratio = (logp - x.logp_ref[rows]).sum(1)
            log_ratio, score = (y.view(config.group, -1).T for y in (log_ratio, x.score[rows]))
            loss = dpo_loss(log_ratio, score, beta=beta)
        case "sft":
            loss = -(adv * logp).sum() / most
        case _:
            loss = loss * mask.sum() / most
    return loss, info
