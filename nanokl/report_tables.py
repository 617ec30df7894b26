"""The tables of a report: other heads, latent variables, the ways to a posterior, samples.

Files of a run in, HTML out. Left out: figures (figures.py), and the page around (report.py).
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from nanokl import UserError, bayes
from nanokl import figures as fig
from nanokl.metrics import read_rows

WORDS = """<p>The pretrained model is a prior over texts. A score r is evidence: at the price beta
it makes a text exp(r / beta) times as likely, and the prior reweighed so is the posterior, which
nobody can sample from directly. Training comes near it: the objective is largest there, and less by
beta times the gap elsewhere, the nats that are left to gain. The Bayes fraction is 0 at the prior
and 1 at the posterior. Log Z is estimated from weighed texts of prior and policy; where few of them
have all the weight, the gap is only known to be at least so large.</p>"""
FORMULAS = (
    ("prior", "ref(y)", "generate.generate"),
    ("evidence", "exp(r(y) / beta)", "ppo.score_rollouts"),
    ("posterior", "pi*(y) = ref(y) exp(r(y) / beta) / Z", "exact.posterior, samplers.sir, smc.smc"),
    ("objective", "J(pi) = E[r] - beta KL(pi || ref)", "exact.objective, ppo.kl_penalised_reward"),
    ("gap", "log Z - J(pi) / beta = KL(pi || pi*)", "exact.gap, bayes.account"),
    ("Bayes fraction", "(J(pi) - J(ref)) / (beta log Z - J(ref))", "bayes.ratio_se"),
    ("most there is", "R*(k) = inf_b b (k + log Z_b), b any price", "frontier.most_reward"),
)


LATENT_WORDS = """<p>A VAE draws z from a prior, then a text from p(text | z). The same bound as
above, at beta 1: the ELBO is less than the text's log-probability by KL(q || posterior of z), and
many z, weighed, come nearer (IWAE). All in nats a test text. Another's z: what it costs to read a
text with the z of another, 0 where z says nothing; active units: numbers of z that differ from text
to text.</p>"""
# A VAE's numbers: the column, the metric and its format.
LATENT = (("ELBO, negative", "neg_elbo", ".2f"), ("bound, IWAE", "iwae_nll", ".2f"),
          ("reconstruction", "reconstruction", ".2f"), ("KL", "kl", ".2f"),
          ("mutual information", "mutual_information", ".2f"),
          ("another's z", "shuffled_z_penalty", ".2f"))


class Stage(NamedTuple):
    summary: dict
    rows: list[dict]
    flags: dict


def read_stage(folder: Path) -> Stage:
    """What a stage has left so far; empty where a file is missing."""

    def read(name: str) -> dict:
        try:
            return dict(json.loads((folder / name).read_text("utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError):
            raise UserError(f"{folder / name} is damaged: it has to hold one JSON object; "
                            "run the stage again") from None

    summary, account = read("summary.json"), read("posterior.json")
    if summary and account:
        summary["posterior"] = account
    return Stage(summary, read_rows(folder / "metrics.jsonl"), read("flags.json"))


def number(value: float | None, spec: str = ".3f", se: float | None = None) -> str:
    """A number with its standard error as text, with a true minus; a dash where there is none."""
    text = "–" if value is None else format(value, spec).replace("-", "−")
    return text if se is None else f"{text} ± {se:{spec}}"


def minutes(summary: dict) -> str:
    """How long a run took, as text."""
    seconds = summary.get("wall_seconds")
    return number(None if seconds is None else seconds / 60, ".1f")


def typeset(text: str) -> str:
    """A text of a program with the signs that print has and a keyboard has not."""
    for plain, sign in ((">=", "≥"), ("<=", "≤"), ("+-", "±"), ("-", "−")):
        text = text.replace(plain, sign)
    return text


def table(kind: str, head: list[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are plain text; each knows the name of its column, which a phone shows beside it."""
    head = [escape(name) for name in head]
    top = "".join(f"<th>{name}</th>" for name in head)
    rows = [zip(head, map(escape, row), strict=True) for row in rows]
    cells = ["".join(f'<td data-name="{name}">{cell}</td>' for name, cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>\n" for row in cells)
    return (f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>\n")


def heads(run: Path) -> str:
    """What other heads know of the test texts: RUN/minilm and RUN/classes/*."""
    rows = []
    for folder in (run / "minilm", *sorted((run / "classes").glob("*/"))):
        s, _, flags = read_stage(folder)
        if s:
            rows.append([folder.relative_to(run).as_posix(), str(flags.get("init", "–")),
                         str(s.get("objective", "–")),
                         *(number(s.get(key), ".3f", s.get(f"{key}_se"))
                           for key in ("pair_accuracy", "accuracy", "macro_f1")), minutes(s)])
    head = ["run", "trunk", "learns", "pair accuracy", "accuracy", "macro-F1", "minutes"]
    return f"<h2>Other heads</h2>{table('numbers', head, rows)}" if rows else ""


def latent_stages(run: Path) -> dict[str, Stage]:
    """The VAEs RUN/vae/* that are done."""
    found = {f"vae/{folder.name}": read_stage(folder)
             for folder in sorted((run / "vae").glob("*/"))}
    return {name: stage for name, stage in found.items() if stage.summary}


def latents(run: Path, stages: dict[str, Stage]) -> str:
    """What z carries, beside the plain language model, and over training."""
    rows, over_time = [], []
    for name, (s, log, flags) in stages.items():
        name = name.removeprefix("vae/")
        if flags.get("n_latent"):
            over_time += [{"step": row["step"], name: row["val_kl_nats_per_sequence"]}
                          for row in log if "val_kl_nats_per_sequence" in row]
        cells = [(f"{key}_nats_per_sequence", spec) for _, key, spec in LATENT]
        rows.append([name, *(number(s.get(key), spec, s.get(f"{key}_se")) for key, spec in cells),
                     number(s.get("active_units"), "d"), minutes(s)])
    if not rows:
        return ""
    names = sorted({name for row in over_time for name in row} - {"step"})
    figure = fig.draw(run / "figures", {}, over_time, "vae_kl", "What z carries",
                      "KL of q(z | text) to the prior, nats per text",
                      "On validation texts. At 0 the decoder does without z, which is collapse.",
                      fig.curves, dict(zip(names, names, strict=True)))
    head = ["run", *(name for name, *_ in LATENT), "active units", "minutes"]
    return (f"<h2>Language models with latent variables</h2>{LATENT_WORDS}"
            f'<div class="figures">{figure}{table("numbers", head, rows)}</div>')


def policies(run: Path) -> list[tuple[str, dict]]:
    """Names and summaries of the trained policies: ppo, ppo-*, trainers/*, all in RUN."""
    folders = [run / "ppo", *sorted(run.glob("ppo-*/")), *sorted((run / "trainers").glob("*/"))]
    return [(folder.relative_to(run).as_posix(), summary) for folder in folders
            if (summary := read_stage(folder).summary).get("objective") is not None]


def ways(named: list[tuple[str, dict]]) -> str:
    """How near each policy has come to the posterior of its beta, and what it took."""
    rows = []
    for name, s in sorted(named, key=lambda x: (x[1].get("beta") or 0, -x[1]["objective"])):
        gap, fraction = map(typeset, bayes.told(s.get("posterior") or {}))
        rows.append([name, number(s.get("beta"), "g"), number(s.get("episodes"), ","), minutes(s),
                     *(number(s.get(key), ".2f", s.get(f"{key}_se"))
                       for key in ("reward_mean", "kl_nats_per_sequence", "objective")),
                     gap, fraction])
    head = ["run", "beta", "episodes", "minutes", "reward", "KL, nats", "objective",
            "gap, nats", "Bayes fraction"]
    words = WORDS + table("formulas", ["in words", "formula", "in nanokl/"], FORMULAS)
    return f"<h2>Prior, posterior, gap</h2>{words}{table('numbers', head, rows)}" if rows else ""


def samples(path: Path) -> str:
    """The sample table, as the run has left it."""
    head = ["prompt", "before", "after", "score before", "score after", "KL, nats"]
    keys = ("score_before", "score_after", "kl_nats")
    cells = [[*(str(r.get(k, "")) for k in head[:3]), *(number(r.get(k), ".2f") for k in keys)]
             for r in read_rows(path)]
    title = "<h2>Samples</h2><p>The same prompts before and after PPO, not selected.</p>"
    return title + table("samples", head, cells) if cells else ""


