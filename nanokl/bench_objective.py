"""What equal episodes are worth: how far from the posterior nanokl and TRL have got.

All start from the same random weights (a small GPT-2-shaped model whose next-token distributions
are uneven), with one rule as reward, one beta and as many episodes, in batches of 64 with 4 epochs
of updates on each, in float32, one seed a case. The learning rate was chosen for each optimiser, of
which nanokl has two, among 3e-4, 1e-3, 3e-3 and 1e-2 at seeds that are no case (RATES). nanokl
lowers it as `train_rlhf.py ppo` does, TRL linearly to 0. What is left is TRL's own default, and
nanokl's but for four: no shaping, which asks the reward for half a text and TRL has not, the lam
.95 that goes with that, a critic at the policy's rate and not at five times it, and the momentum .9
of TRL's AdamW. PPOTrainer's critic is a second network, nanokl's two layers or ("shared critic") a
head on the policy; RLOOTrainer has none and makes two responses a prompt.

The judge belongs to none of them. It reads the trained weights in GPT-2's layout, runs them and the
first ones through `plain_logits` in float64, draws each token from the whole distribution by a full
forward pass, and sums the exact KL of the next-token distributions along its samples.

check is no error here: it is the objective J with its standard error (over the judge's samples),
its two parts, and J of the reference. The time is that of an iteration, on one thread for all, for
the model is that small.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanokl import runtime as rt
from nanokl.bayes import log_mean_exp
from nanokl.bench import Ready
from nanokl.bench_generate import gpt2_shaped, gpt2_weights, plain_logits
from nanokl.bench_ppo import good, nanokl_ppo, prompts, rule, trl_ppo, trl_rloo
from nanokl.gpt import GPT
from nanokl.metrics import mean_se

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 64, "block_size": 16}
CASES = tuple(
    {"name": f"seed {seed}", "model": SHAPE, "prompt": 4, "new": 8, "batch": 64, "epochs": 4,
     "beta": 0.1, "iterations": 50, "seed": seed, "samples": 512, "device": "cpu"}
    for seed in range(3)
)  # fmt: skip
RATES = {"nanokl": 1e-2, "PPOTrainer": 3e-3, "RLOOTrainer": 1e-3}  # AdamW's
OURS = {"dtype": "float32", "muon_lr": 3e-3}  # and the rate of Muon, which the peers have not


def reference(case: dict) -> GPT:
    """Matrices eight times the usual: 4.7 nats a token of at most 5.5, and the context matters."""
    model = gpt2_shaped(case["model"])
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.ndim == 2):
            p.mul_(8)
    return model


def held_out(case: dict) -> Tensor:
    """The judge's prompts (n, prompt), the same for every policy of a case."""
    pool, rng = prompts(case), rt.generator(case["seed"], "judge's prompts")
    return pool[torch.randint(len(pool), (case["samples"],), generator=rng)]


@torch.no_grad()
def judge(policy: dict[str, Tensor], ref: dict[str, Tensor], case: dict) -> tuple[Tensor, Tensor]:
    """Reward and KL, nats a sequence, of fresh samples of the policy: (n,) each, float64."""
    rng, H, idx = rt.generator(case["seed"], "judge"), case["model"]["n_head"], held_out(case)
    kl = torch.zeros(len(idx), dtype=torch.float64)
    for _ in range(case["new"]):
        logp, logp_ref = (plain_logits(w, idx, H)[:, -1].log_softmax(-1) for w in (policy, ref))
        kl += (logp.exp() * (logp - logp_ref)).sum(-1)
        idx = torch.cat([idx, torch.multinomial(logp.exp(), 1, generator=rng)], dim=1)
    return rule(idx, case).double(), kl


# w_t = sum_a ref(a | s_t) exp(r(s_t, a) / beta),  a ~ the summands,  s_t by weight out of K:
# E prod_t mean_K w_t = Z (Del Moral 2004), so that its logarithm is low in the mean
@torch.no_grad()
def log_evidence(ref: dict[str, Tensor], case: dict, particles: int = 16) -> Tensor:
    """log Z (n,) of the judge's prompts."""
    rng, H, V = rt.generator(case["seed"], "evidence"), *(case["model"][k] for k in
                                                          ("n_head", "vocab_size"))
    out = []
    for few in held_out(case).split(32):
        idx, total = few.repeat_interleave(particles, 0), torch.zeros(len(few), dtype=torch.float64)
        for _ in range(case["new"]):
            pay = 2.4 / case["new"] * good(torch.arange(V), idx[:, -1:], case)  # (n K, V)
            log_w = plain_logits(ref, idx, H)[:, -1].log_softmax(-1) + pay / case["beta"]
            by_prompt = log_w.logsumexp(-1).view(len(few), -1)  # (n, K)
            total += log_mean_exp(by_prompt)
            pick = torch.multinomial(by_prompt.softmax(-1), particles, True, generator=rng)
            pick = (pick + particles * torch.arange(len(few))[:, None]).flatten()
            token = torch.multinomial(log_w.softmax(-1)[pick], 1, generator=rng)
            idx = torch.cat([idx[pick], token], dim=1)
        out.append(total)
    return torch.cat(out)


def verdict(policy: dict[str, Tensor], ref: dict[str, Tensor], case: dict) -> dict[str, float]:
    """J of the policy with its standard error, its parts, J of the reference, and the gap."""
    score, kl = judge(policy, ref, case)
    J, se = mean_se(score - case["beta"] * kl)
    gap, gap_se = mean_se(log_evidence(ref, case) - score / case["beta"] + kl)
    return {"J": J, "se": se, "reward": score.mean().item(), "KL": kl.mean().item(),
            "J of ref": judge(ref, ref, case)[0].mean().item(), "gap": gap, "gap se": gap_se}


def weights_of(policy: nn.Module) -> dict[str, Tensor]:
    """A policy's weights in GPT-2's layout, whoever trained it."""
    if isinstance(policy, GPT):
        return gpt2_weights(policy)
    return {k: x.detach() for k, x in policy.state_dict().items() if k != "lm_head.weight"}


def variant(name: str, make: Callable, **flags) -> Callable[[dict], Ready]:
    """Trains and has the judge look at it; what is timed is an iteration of a run of its own."""
    def set_up(case: dict) -> Ready:
        torch.set_num_threads(1)
        ref = reference(case)
        first = {k: x.clone() for k, x in gpt2_weights(ref).items()}
        given = {**flags, "reward": lambda idx: rule(idx, case), "lr": case.get("lr", RATES[name])}
        policy, run = make(case, ref, seed=case["seed"], steps=case["iterations"], **given)
        for _ in range(case["iterations"]):
            run()
        check = verdict(weights_of(policy), first, case)
        return Ready(make(case, ref, **given)[1], case["batch"], "episode", check)

    return set_up


VARIANTS = {
    "nanokl": variant("nanokl", nanokl_ppo, **OURS),
    "nanokl, shared critic": variant("nanokl", nanokl_ppo, **OURS, critic_layers=0),
    "PPOTrainer": variant("PPOTrainer", trl_ppo, bf16=False),
    "RLOOTrainer": variant("RLOOTrainer", trl_rloo, bf16=False),
}
ENVIRONMENT = {"PPOTrainer": "peers_ppo", "RLOOTrainer": "peers"}
