"""How many nats from Bayes-optimal: log Z between bounds, and the gap of a policy, from samples.

    log w(y) = r(y) / beta + log ref(y) - log q(y),  y ~ q        E_q[w] = Z, for any proposal q
    E_q log mean_k w(y_k) <= log Z <= E log mean_k w(y_k) with one of the y_k drawn from pi*
    gap(pi) = log Z - J(pi) / beta = KL(pi || pi*),   J(pi) = E_pi[r] - beta KL(pi || ref)
    Bayes fraction = (J(pi) - J(ref)) / (beta log Z - J(ref)):  0 is the reference, 1 the posterior

P prompts, each with K texts of the reference and K of the policy, and with a log Z of its own;
means over prompts come with their standard errors. The policy's own texts cannot see what it never
says, and find a collapsed policy perfect; the reference's own are blind where beta is small. Where
the weight lies on few texts (`Account.doubts`), log Z has a lower end only.
Burda et al. arXiv:1509.00519; Zhao et al. arXiv:2404.17546. Left out: Pareto-smoothed weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokl import UserError
from nanokl.metrics import mean_se

# The gate. Log-normal weights of fewer than 50 effective texts leave log Z low by tenths of a nat.
# A median does not see the few prompts that are low by whole nats: with some of sd 4 to 6 among 8
# (512 to 8192 texts) a third of what passes is .2 nats low in the mean; with none below ESS 10 2 %.
LEAST_ESS, WORST_ESS, LARGEST_SHARE, LARGEST_HALVING = 50.0, 10.0, 0.2, 0.2
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
        for name, x in vars(self).items():
            if x is not None:
                assert x.ndim == 2 and x.shape == self.score.shape, (name, x.shape)
                setattr(self, name, x.detach().cpu().double())  # MPS has no float64


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


def halving(log_w: Tensor) -> Tensor:
    """log Z less its mean over every second text and the others: a 1 / K bias is still so large."""
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
                        "reward's upper bound")
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
    numbers: dict[str, float]  # ess_median, ess_least, ...; what doubts asks; none at beta 0
    upper_kind: str | None = None  # what log_z_nats_upper is: PSEUDO, or a bound

    def doubts(self) -> list[str]:
        """Why log Z is not to be trusted: nothing if it is."""
        if not self.beta:
            return ["beta is 0"]
        names = ("ess_median", "ess_least", "largest_share_median", "halving_nats")
        ess, worst, share, step = map(self.numbers.get, names)
        checks = [(ess >= LEAST_ESS, f"ESS {ess:.3g} of {LEAST_ESS:g}"),
                  (worst >= WORST_ESS, f"one prompt's ESS {worst:.3g} of {WORST_ESS:g}"),
                  (share <= LARGEST_SHARE, f"largest weight {share:.2g}, {LARGEST_SHARE} allowed"),
                  (step <= LARGEST_HALVING, f"halving {step:.2g} nats, {LARGEST_HALVING} allowed")]
        return [text for fine, text in checks if not fine]  # NaN is not fine

    def summary(self) -> dict:
        """Means over prompts with standard errors, None if unknown; for beta > 0 also `_lower` and
        `_upper` ends. gap_nats, gap_reward, bayes_fraction: at the lower log Z, the end that is
        kind to the policy, if it is trusted. kl_nats_per_sequence is the mean of Texts.kl.
        """
        v, doubts = self.values, self.doubts()
        out = {"beta": self.beta, "prompts": len(v["objective"]), "texts_per_prompt": self.texts,
               "trusted": not doubts, "untrusted_because": doubts,
               "log_z_upper_kind": self.upper_kind, **self.numbers}
        for name, x in v.items():
            out[name], out[f"{name}_se"] = mean_se(x)
        out["below_one_bit"] = out["entropy_nats_per_sequence"] < math.log(2)
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
        little = ": less than one bit is left" if s["below_one_bit"] else ""
        out = ["objective       {objective}, reference {reward_ref_mean}; reward {reward_mean}, "
               "KL {kl_nats_per_sequence} nats, beta {beta:g}",
               "entropy         {entropy_nats_per_sequence} nats, reference "
               f"{{entropy_ref_nats_per_sequence}}{little}"]
        out += _evidence(s) if self.beta else [
            "log Z           infinite, since beta is 0, and no gap: the posterior is the reference "
            "on the", f"{'':16}texts of highest reward; {s['share_at_best']:.0%} of the policy's "
            "have the highest that was seen"]
        return [line.format(**_shown(s)) for line in out]


def _shown(s: dict) -> dict:
    """A summary with `mean +- se` in the place of each number that has an error."""
    return s | {name: " +- ".join("?" if s[x] is None else f"{s[x]:.2f}"
                                  for x in (name, f"{name}_se")) for name in s if f"{name}_se" in s}


def told(s: dict, why: str = "") -> tuple[str, str]:
    """Gap in nats and Bayes fraction of a summary as texts: plain only where they are trusted."""
    t = _shown(s)
    if s.get("gap_nats_lower") is None:  # beta 0, or no summary
        return "–", "–"
    if s["trusted"]:
        return t["gap_nats"], t["bayes_fraction"]
    # more log Z is a larger gap, and takes the fraction towards 0
    sign, end = ("<=", "upper") if s["objective"] >= s["reward_ref_mean"] else (">=", "lower")
    return (f">= {t['gap_nats_lower']} (unreliable{why})",
            f"{sign} {t[f'bayes_fraction_{end}']} (unreliable{why})")


def _evidence(s: dict) -> list[str]:
    """What is to be said of log Z, the gap and the Bayes fraction."""
    gap, fraction = told(s, f": {'; '.join(s['untrusted_because'])}")
    if s["trusted"]:
        gap += ("; upper {gap_nats_upper} ({log_z_upper_kind})\n                {gap_reward} in "
                "reward; upper {gap_reward_upper}")
        fraction += ", between {bayes_fraction_lower} and {bayes_fraction_upper}"
    elif s["log_z_upper_kind"] != PSEUDO:  # a bound from above does not depend on the weights
        gap += ", <= {gap_nats_upper} ({log_z_upper_kind})"
    return ["log Z           >= {log_z_nats_lower} nats; upper {log_z_nats_upper} "
            "({log_z_upper_kind})", "                by the reference alone {log_z_nats_ref_only}, "
            "by the policy alone {log_z_nats_policy_only}",
            f"gap, nats       {gap}", f"Bayes fraction  {fraction}",
            "weights         ESS {ess_median:.3g} of {texts_per_prompt} texts, least "
            "{ess_least:.3g}; largest {largest_share_median:.2g}, halving {halving_nats:.2g} nats"]


def account(ref_half: Texts, policy_half: Texts, *, beta: float, r_max: float | None = None,
            rng: torch.Generator | None = None, delta: float = 0.05) -> Account:
    """The account of a policy from K of the reference's texts and K of its own for P prompts.

    r_max: an upper bound of the reward, if it has one; then rng draws exact samples, and the mean
    log Z lies between log_z_nats_bernstein_lower and _upper with probability 1 - delta.
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
    out = Account(float(beta), 2 * K, values, {}, PSEUDO if beta else None)
    if beta:
        own = policy_half.score / beta + policy_half.logp_ref - policy_half.logp
        log_w = log_weights(score, logp_ref, mixture(logp_ref, logp), beta=beta)
        from_ref = (logp_ref - logp).sigmoid()
        upper, ess = cross_pinned(log_w, from_ref, log_w), effective_sample_size(log_w)
        values |= {"log_z_nats_ref_only": log_mean_exp(ref_half.score / beta),
                   "log_z_nats_policy_only": log_mean_exp(own), "log_z_nats_upper": upper,
                   "log_z_nats_lower": log_mean_exp(log_w), "log_z_nats_pseudo_upper": upper}
        out.numbers |= {"ess_median": ess.median().item(), "ess_least": ess.min().item(),
                        "largest_share_median": largest_share(log_w).median().item(),
                        "halving_nats": halving(log_w).mean().item()}
        if r_max is not None:
            found = accepted(ref_half.score, beta=beta, r_max=r_max, rng=rng)
            _add_bounds(out, found, log_w, from_ref, r_max / beta, delta)
        for end in ("lower", "upper"):
            gap = values[f"log_z_nats_{end}"] - values["objective"] / beta
            values |= {f"gap_nats_{end}": gap, f"gap_reward_{end}": beta * gap}
    return out


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
