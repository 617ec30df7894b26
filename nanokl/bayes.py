"""How many nats from Bayes-optimal: log Z between bounds, and the gap of a policy, from samples.

    log w(y) = r(y) / beta + log ref(y) - log q(y),  y ~ q        E_q[w] = Z, for any proposal q
    E_q log mean_k w(y_k) <= log Z <= E log mean_k w(y_k) with one of the y_k drawn from pi*
    gap(pi) = log Z - J(pi) / beta = KL(pi || pi*),   J(pi) = E_pi[r] - beta KL(pi || ref)
    Bayes fraction = (J(pi) - J(ref)) / (beta log Z - J(ref)):  0 is the reference, 1 the posterior

For P prompts with K texts of the reference and K of the policy each; every prompt has a log Z of
its own, and means over prompts come with their standard errors. Half the texts are the reference's
because the policy's own cannot see what it never says: they find a collapsed policy perfect. Half
are the policy's because the reference's own are blind where beta is small. Where the weight lies on
few texts (`Account.doubts`), log Z has a lower end only.
Burda et al. arXiv:1509.00519; Zhao et al. arXiv:2404.17546. Left out: Pareto-smoothed weights.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanokl import UserError
from nanokl.metrics import mean_se

# The gate. Log-normal weights of fewer than 50 effective texts leave log Z low by tenths of a nat.
LEAST_ESS, LARGEST_SHARE, LARGEST_HALVING = 50.0, 0.2, 0.2
PSEUDO = "pseudo-upper, not a bound"
REPLACED = 64  # how many of a proposal's texts a draw of the posterior replaces in turn, at most


@dataclass
class Texts:
    """K texts for each of P prompts, (P, K) each; log-probs of whole responses, in nats."""

    score: Tensor  # of the whole text: the r that the policy was trained on
    logp: Tensor  # under the policy
    logp_ref: Tensor  # under the reference
    kl: Tensor | None = None  # of the policy's own: KL(policy || ref), exact or k1, of the text

    def __post_init__(self):
        for field in fields(self):
            x = getattr(self, field.name)
            if x is not None:
                assert x.ndim == 2 and x.shape == self.score.shape, (field.name, x.shape)
                setattr(self, field.name, x.detach().cpu().double())  # MPS has no float64


def log_weights(score: Tensor, logp_ref: Tensor, logp_q: Tensor, *, beta: float) -> Tensor:
    """log w of texts drawn from q, in nats, shaped like what is given."""
    assert beta > 0, beta
    return score / beta + logp_ref - logp_q


def mixture(logp_ref: Tensor, logp_policy: Tensor) -> Tensor:
    """log q of the proposal (ref + policy) / 2; it makes w at most 2 exp(r / beta)."""
    return torch.logaddexp(logp_ref, logp_policy) - math.log(2)


def log_mean_exp(x: Tensor) -> Tensor:
    """log mean_k exp x_k over the last dimension."""
    return x.logsumexp(-1) - math.log(x.shape[-1])


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last dimension: K if all are equal, 1 if one has it all."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp()


def largest_share(log_w: Tensor) -> Tensor:
    """max w / sum w over the last dimension."""
    return (log_w.amax(-1) - log_w.logsumexp(-1)).exp()


# Never negative. A bias that falls as 1/K is still as large as this.
def halving(log_w: Tensor) -> Tensor:
    """log Z of all texts minus its mean over every second and the others, in nats."""
    a, b = log_w[..., ::2], log_w[..., 1::2]
    return log_mean_exp(log_w) - (log_mean_exp(a) + log_mean_exp(b)) / 2


# Pinning turns the law of K texts, Q, into Q mean(w) / Z, and E log mean w = log Z + a KL. Texts
# of one proposal may lose any. Of a mixture's halves the one that would have said y* loses one, at
# chances ref(y*) : policy(y*); if another did, it could fall short of log Z.
def pinned_upper(log_w: Tensor, log_w_star: Tensor, from_ref: Tensor | None = None) -> Tensor:
    """log mean w after y* ~ pi* has replaced one of K, averaged over which: (M,) for M such y*.

    log_w (K,), log_w_star (M,). from_ref (M,): y*'s chance to replace one of the first half, the
    reference's; without it all are from one proposal.
    """
    none, K, n = log_w.new_full((1,), -torch.inf), len(log_w), 1 if from_ref is None else 2
    before = torch.cat([none, log_w[:-1].logcumsumexp(0)])
    after = torch.cat([log_w[1:].flip(0).logcumsumexp(0).flip(0), none])
    others = torch.logaddexp(before, after).view(n, -1)  # no sum is taken from another
    others = others[:, :: math.ceil(others.shape[1] / REPLACED)]
    upper = torch.logaddexp(others, log_w_star[:, None, None]).mean(2) - math.log(K)  # (M, n)
    return upper[:, 0] if n == 1 else from_ref * upper[:, 0] + (1 - from_ref) * upper[:, 1]


def cross_pinned(log_w: Tensor, from_ref: Tensor, log_law: Tensor, *, otherwise=math.nan) -> Tensor:
    """Upper end of log Z (P,): every second text gives y*, the others take it in, and the reverse.

    All (P, 2K), the reference's texts first. y* is drawn, in expectation, from the softmax of
    log_law: of log w that law is only close to pi* (a pseudo-upper); 0 at exact samples and -inf
    elsewhere make it a bound. A half without a y* counts as `otherwise`.
    """
    out = []
    for w, chance, law in zip(log_w, from_ref, log_law, strict=True):  # one prompt at a time
        for a, b in ((0, 1), (1, 0)):
            some = law[a::2] > -torch.inf
            p, star = law[a::2][some].softmax(0), (w[a::2][some], chance[a::2][some])
            out.append(p @ pinned_upper(w[b::2], *star) if len(p) else w.new_tensor(otherwise))
    return torch.stack(out).view(-1, 2).mean(1)


# Rejection: y ~ ref stays with probability exp((r(y) - r_max) / beta), and is a sample of pi* then.
def accepted(score: Tensor, *, beta: float, r_max: float, rng: torch.Generator) -> Tensor:
    """Which of the reference's texts stay, (P, K) bool."""
    if score.max() > r_max + 1e-6:
        raise UserError(f"a text scores {score.max().item():g}, above r_max {r_max:g}: give the "
                        "reward's upper bound, or none")
    u = torch.rand(score.shape, dtype=torch.float64, generator=rng)
    return u < ((score - r_max) / beta).exp()


# |mean - Z| <= sqrt(2 V L / K) + 3 B L / K,  L = log(3 / delta),  V the variance, 0 <= w <= B
def bernstein_interval(log_w: Tensor, log_bound: float, *, delta=0.05) -> tuple[Tensor, Tensor]:
    """log Z lies between these with probability 1 - delta, if w <= exp(log_bound): (...,) each.

    Audibert, Munos & Szepesvari 2009, theorem 1; its proof asks for independent texts, not for
    equal laws, so that a mixture's two halves will do. The lower end is -inf if it says nothing.
    """
    x, K, L = (log_w - log_bound).exp(), log_w.shape[-1], math.log(3 / delta)
    assert x.max() <= 1 + 1e-6, f"a weight is {x.max().item():g} times its bound"
    mean, var = x.mean(-1), x.var(-1, correction=0)
    miss = (2 * var * L / K).sqrt() + 3 * L / K
    return (mean - miss).clamp(min=0).log() + log_bound, (mean + miss).log() + log_bound


# R = sum a / sum b;  its se is that of the mean of (a - R b) / mean(b)
def ratio_se(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Ratio of two means over the same prompts, and its standard error (delta method)."""
    ratio = (a.mean() / b.mean()).item() if b.mean() > 0 else math.nan
    return ratio, mean_se((a - ratio * b) / b.mean())[1]


@dataclass
class Account:
    """What samples say of a policy; `summary` for a file, `lines` for the eye."""

    beta: float
    texts: int  # a prompt's, reference's and policy's together
    values: dict[str, Tensor]  # (P,) each; means over prompts make the summary
    numbers: dict[str, float]  # ess_median, largest_share_median, halving_nats; none at beta 0
    upper_kind: str | None = None  # what log_z_nats_upper is: PSEUDO, or a bound

    def doubts(self) -> list[str]:
        """Why log Z is not to be trusted: nothing if it is."""
        if not self.beta:
            return ["beta is 0"]
        n = self.numbers
        ess, share, step = n["ess_median"], n["largest_share_median"], n["halving_nats"]
        checks = [(ess >= LEAST_ESS, f"ESS {ess:.3g} of {LEAST_ESS:g}"),
                  (share <= LARGEST_SHARE, f"largest weight {share:.2g}, {LARGEST_SHARE} allowed"),
                  (step <= LARGEST_HALVING, f"halving {step:.2g} nats, {LARGEST_HALVING} allowed")]
        return [text for fine, text in checks if not fine]  # NaN is not fine

    def summary(self) -> dict:
        """Means over prompts with standard errors, None if unknown; for beta > 0 also `_lower` and
        `_upper` ends. gap_nats, gap_reward, bayes_fraction: at the lower log Z, if it is trusted.
        """
        v, doubts = self.values, self.doubts()
        out = {"beta": self.beta, "prompts": len(v["objective"]), "texts_per_prompt": self.texts,
               "trusted": not doubts, "untrusted_because": doubts,
               "log_z_upper_kind": self.upper_kind, **self.numbers}
        for name, x in v.items():
            out[name], out[f"{name}_se"] = mean_se(x)
        out["collapsed"] = out["entropy_nats_per_sequence"] < math.log(2)
        if self.beta:
            J_ref = v["reward_ref_mean"]
            ends = [ratio_se(v["objective"] - J_ref, self.beta * v[f"log_z_nats_{end}"] - J_ref)
                    for end in ("lower", "upper")]
            # below 0 the lower log Z gives the lower end, above it the upper
            for name, pair in zip(("_lower", "_upper", ""), (*sorted(ends), ends[0]), strict=True):
                out[f"bayes_fraction{name}"], out[f"bayes_fraction{name}_se"] = pair
        for name in ("gap_nats", "gap_reward", "bayes_fraction"):
            for se in ("", "_se"):
                value = out.get(name + se, out.get(f"{name}_lower{se}"))
                out[name + se] = None if doubts else value
        return {name: None if isinstance(x, float) and not math.isfinite(x) else x
                for name, x in out.items()}

    def lines(self) -> list[str]:
        """The account in words; what is not trusted is never a plain number."""
        s = self.summary()
        collapsed = ": collapsed, less than one bit is left" if s["collapsed"] else ""
        out = [f"objective       {_show(s, 'objective')}, reference {_show(s, 'reward_ref_mean')}; "
               f"reward {_show(s, 'reward_mean')}, KL {_show(s, 'kl_nats_per_sequence')} nats, "
               f"beta {self.beta:g}",
               f"entropy         {_show(s, 'entropy_nats_per_sequence')} nats, reference "
               f"{_show(s, 'entropy_ref_nats_per_sequence')}{collapsed}"]
        if self.beta:
            return out + _evidence_lines(s)
        return [*out, "log Z           infinite, since beta is 0, and no gap: the posterior is the "
                "reference on the", "                texts of highest reward; "
                f"{s['share_at_best']:.0%} of the policy's have the highest that was seen"]


def _show(s: dict, name: str) -> str:
    """`mean +- se` of a summary's number."""
    x, se = s[name], s[f"{name}_se"]
    return f"{'?' if x is None else f'{x:.2f}'} +- {'?' if se is None else f'{se:.2f}'}"


def _evidence_lines(s: dict) -> list[str]:
    """What a summary says of log Z, the gap and the Bayes fraction."""
    kind, why = s["log_z_upper_kind"], f"(unreliable: {'; '.join(s['untrusted_because'])})"
    out = [f"log Z           >= {_show(s, 'log_z_nats_lower')} nats; upper "
           f"{_show(s, 'log_z_nats_upper')} ({kind})",
           f"                by the reference alone {_show(s, 'log_z_nats_ref_only')}, by the "
           f"policy alone {_show(s, 'log_z_nats_policy_only')}"]
    if s["trusted"]:
        out += [f"gap             {_show(s, 'gap_nats')} nats; upper {_show(s, 'gap_nats_upper')} "
                f"({kind})", f"                {_show(s, 'gap_reward')} in reward; upper "
                f"{_show(s, 'gap_reward_upper')}",
                f"Bayes fraction  {_show(s, 'bayes_fraction')}, between "
                f"{_show(s, 'bayes_fraction_lower')} and {_show(s, 'bayes_fraction_upper')}"]
    else:  # a bound from above does not depend on the weights; the pseudo-upper does
        most = f", <= {_show(s, 'gap_nats_upper')} ({kind})" if kind != PSEUDO else ""
        better = s["objective"] >= s["reward_ref_mean"]
        fraction = _show(s, f"bayes_fraction_{'upper' if better else 'lower'}")
        out += [f"gap             >= {_show(s, 'gap_nats_lower')} nats {why}{most}",
                f"Bayes fraction  {'<=' if better else '>='} {fraction} {why}"]
    return [*out, f"weights         ESS {s['ess_median']:.3g} of {s['texts_per_prompt']} texts, "
            f"largest {s['largest_share_median']:.2g}, halving {s['halving_nats']:.2g} nats"]


def account(ref_half: Texts, policy_half: Texts, *, beta: float, r_max: float | None = None,
            rng: torch.Generator | None = None, delta: float = 0.05) -> Account:
    """The account of a policy from K of the reference's texts and K of its own for P prompts.

    r_max: an upper bound of the reward, if it has one; then rng draws the exact samples, and with
    probability 1 - delta the mean log Z lies within log_z_nats_bernstein_lower and _upper.
    """
    (P, K), own, kl = ref_half.score.shape, policy_half.score.shape, policy_half.kl.mean(1)
    if own != (P, K) or K < 2 or K % 2:
        raise UserError(f"{P} x {K} texts of the reference and {own[0]} x {own[1]} of the policy: "
                        "give as many of each for as many prompts, an even number a prompt")
    if not 0 <= beta < math.inf:
        raise UserError(f"beta is {beta}: give 0 or more")
    score, logp, logp_ref = (torch.cat([getattr(x, name) for x in (ref_half, policy_half)], 1)
                             for name in ("score", "logp", "logp_ref"))  # (P, 2K)
    reward, best = policy_half.score.mean(1), score.amax(1)
    values = {"reward_ref_mean": ref_half.score.mean(1), "reward_mean": reward,
              "kl_nats_per_sequence": kl, "objective": reward - beta * kl,
              "entropy_ref_nats_per_sequence": -ref_half.logp_ref.mean(1),
              "entropy_nats_per_sequence": -policy_half.logp.mean(1), "reward_best_seen": best,
              "share_at_best": (policy_half.score >= best[:, None] - 1e-5).double().mean(1)}
    out = Account(float(beta), 2 * K, values, {})
    if beta:
        own = log_weights(score, logp_ref, logp, beta=beta)[:, K:]
        log_w = log_weights(score, logp_ref, mixture(logp_ref, logp), beta=beta)
        from_ref = (logp_ref - logp).sigmoid()
        values |= {"log_z_nats_ref_only": log_mean_exp(ref_half.score / beta),
                   "log_z_nats_policy_only": log_mean_exp(own)}
        _add_evidence(out, log_w, from_ref)
        if r_max is not None:
            found = accepted(ref_half.score, beta=beta, r_max=r_max, rng=rng)
            _add_bounds(out, found, log_w, from_ref, r_max / beta, delta)
        for end in ("lower", "upper"):
            gap = values[f"log_z_nats_{end}"] - values["objective"] / beta
            values |= {f"gap_nats_{end}": gap, f"gap_reward_{end}": beta * gap}
    return out


def _add_evidence(out: Account, log_w: Tensor, from_ref: Tensor) -> None:
    """log Z by the mixture, from below and above, and what its weights are like."""
    upper = cross_pinned(log_w, from_ref, log_w)
    out.values |= {"log_z_nats_lower": log_mean_exp(log_w), "log_z_nats_upper": upper,
                   "log_z_nats_pseudo_upper": upper}
    out.numbers |= {"ess_median": effective_sample_size(log_w).median().item(),
                    "largest_share_median": largest_share(log_w).median().item(),
                    "halving_nats": halving(log_w).mean().item()}
    out.upper_kind = PSEUDO


def _add_bounds(out: Account, found: Tensor, log_w: Tensor, from_ref: Tensor, most: float,
                delta: float) -> None:
    """What a bounded reward allows: a bound in the place of the pseudo-upper, and an interval."""
    log_law = torch.full_like(log_w, -torch.inf)
    log_law[:, : found.shape[1]][found] = 0
    # of each prompt delta / P, so that all of them hold together
    low, high = bernstein_interval(log_w, math.log(2) + most, delta=delta / len(log_w))
    out.values |= {"log_z_nats_upper": cross_pinned(log_w, from_ref, log_law, otherwise=most),
                   "exact_sample_share": found.double().mean(1)}
    out.numbers |= {"log_z_nats_trivial_upper": most, "bernstein_confidence": 1 - delta,
                    "log_z_nats_bernstein_lower": low.mean().item(),
                    "log_z_nats_bernstein_upper": high.clamp(max=most).mean().item()}
    share = torch.stack([found[:, i::2].any(1) for i in (0, 1)]).double().mean()
    out.upper_kind = f"bound: {share:.0%} pinned on exact samples, the rest r_max / beta"
