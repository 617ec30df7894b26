"""The report of a run: figures, one self-contained HTML page, and the merged summary.

Reads RUN/{gpt,bert,reward,ppo}/{summary.json,metrics.jsonl,flags.json}, RUN/ppo/samples.jsonl and
summaries of other policies, RUN/ppo-* and RUN/trainers/*, heads, RUN/minilm and RUN/classes/*, and
VAEs, RUN/vae/*: files only, no model. A policy's posterior.json, often of more texts, stands for
what its summary says of it. The page has no script, loads nothing, and reads on a phone, in the
dark and on paper.
"""

import shlex
from collections import defaultdict
from datetime import datetime
from html import escape
from pathlib import Path

from nanokl import UserError
from nanokl import figures as fig
from nanokl.metrics import duration, write_json, write_text
from nanokl.report_tables import (
    Stage,
    heads,
    latent_stages,
    latents,
    number,
    policies,
    read_stage,
    samples,
    table,
    ways,
)

STAGES = {  # in order: the program, and the section of the page
    "gpt": ("train_pretrain.py gpt", "Pretraining"),
    "bert": ("train_pretrain.py bert", "Pretraining"),
    "reward": ("train_rlhf.py reward", "Reward model"),
    "ppo": ("train_rlhf.py ppo", "Policy (PPO)"),
}
# The headline: stage, metric, format, unit, and what to hold it against.
TILES = [
    ("gpt", "bits_per_byte", ".3f", "bits per byte", "GPT on held-out text; raw bytes cost 8. "
     "The model has {parameters} parameters"),
    ("bert", "mlm_accuracy", ".3f", "of masked tokens", "guessed right by the encoder on held-out "
     "text; {mlm_nats_per_token} nats each"),
    ("reward", "pair_accuracy", ".3f", "of pairs", "ordered by the reward model as a single "
     "rater did, unseen snippets; human ceiling {human_ceiling}, coin .5"),
    ("ppo", "reward_mean", ".2f", "sd of reward", "Mean score of the policy; the reference model "
     "that it started from has {reward_ref_mean}"),
    ("ppo", "kl_nats_per_sequence", ".2f", "nats of KL", "How far a sequence of the policy is from "
     "the reference. Before the first update {kl_at_step_0}, and |ratio − 1| at most "
     "{first_ratio_max_deviation}"),
    ("ppo", "objective", ".2f", "sd of objective", "What PPO maximises, reward − beta KL with beta "
     "= {beta} a nat; the reference has {objective_ref}"),
    ("ppo", "distinct_2", ".3f", "distinct-2", "Different pairs of neighbouring tokens over all "
     "pairs, low where a policy repeats itself; the reference has {distinct_2_ref}"),
]
# The reward model beside people: metric, yardstick, its name.
AGREEMENT = {"Pair accuracy": ("pair_accuracy", "human_ceiling", "human ceiling"),
             "Pearson r": ("pearson_r", "human_r", "one human")}
SD = "sd of the reference's scores"  # unit of a reward model's scores; a function has its own
# Figures: stage, file, title, y axis, caption, painter and what to paint.
FIGURES = [
    ("gpt", "gpt_loss", "GPT loss", "nats per token",
     "Validation is a full pass over a pinned slice. The first, steep steps may leave the frame.",
     fig.curves, {"loss_nats_per_token": "training", "val_nats_per_token": "validation"}),
    ("bert", "bert_loss", "BERT loss", "nats per masked token",
     "On the masked tokens alone; the masks of validation are fixed.",
     fig.curves, {"loss_nats_per_token": "training", "mlm_nats_per_token": "validation"}),
    ("reward", "reward_accuracy", "Pair accuracy", "share of pairs, by domain",
     "Pairs ordered as one rater did, on unseen snippets; ceiling: the mean of all other raters.",
     fig.dots, AGREEMENT["Pair accuracy"]),
    ("reward", "reward_pearson", "Pearson r", "correlation with the mean rating, by domain",
     "One human is held against the mean of the others.", fig.dots, AGREEMENT["Pearson r"]),
    ("reward", "reliability", "Reliability", "share that came true",
     "On the line, what is given 70 % comes true in 70 % of cases. A dot's area is its share of "
     "the answers.", fig.reliability),
    ("reward", "reward_loss", "Reward model loss", "nats per pair",
     "Bradley-Terry on comparisons by single raters; a coin has 0.69.",
     fig.curves, {"loss_nats_per_pair": "training", "val_nats_per_pair": "validation"}),
    ("reward", "rating_loss", "Rating loss", "sd of the ratings, squared",
     "Where the mean rating of each text is what is learnt; always guessing the mean has 1.",
     fig.curves, {"loss_sd2_per_text": "training"}),
    ("ppo", "posterior", "From prior to posterior", f"objective, {SD}",
     "The gap that is left to the posterior's beta log Z is beta KL(policy || posterior). A band "
     "is what is not known of log Z. Where too few texts have all the weight there is none, and "
     "the posterior's level is at least where it is drawn.", fig.evidence),
    ("ppo", "ppo_reward_kl", "Reward against KL", SD,
     "The most reward that any policy can have at a KL (dotted: at least so much), what samplers "
     "of the reference reach with n texts and no training (SMC, steered by the critic, at most at "
     "the KL where it stands), and what training pays and gets. "
     "Training is on all prompts, everything else on the few on which the gap is measured.",
     fig.frontier),
    ("ppo", "overoptimisation", "Proxy and gold", SD,
     "The policy is trained on a reward model of one half of each text's ratings; one of the other "
     "half only watches. Where they part, PPO gets what the first has wrong (Gao et al. 2022).",
     fig.overoptimisation),
    ("ppo", "ppo_reward", "Reward and objective", SD,
     "The distance between the two is what the KL costs.",
     fig.curves, {"objective": "objective", "reward_mean": "reward"}),
    ("ppo", "ppo_kl", "KL from the reference", "nats per sequence",
     "Exact over the whole vocabulary, and estimated from the sampled tokens alone.",
     fig.curves, {"kl_k1_nats_per_sequence": "k1 estimate", "kl_nats_per_sequence": "exact"}),
    ("ppo", "ppo_entropy", "Entropy", "nats per token",
     "Uncertainty about the next token; at 0 the policy says only one thing.",
     fig.curves, {"entropy_nats_per_token": "policy"}),
]  # fmt: skip
def merge(run: Path, stages: dict[str, Stage]) -> dict:
    """All summaries, and wall_seconds from RUN/started to the last stage's end, or their sum."""
    summaries = {name: stage.summary for name, stage in stages.items() if stage.summary}
    try:
        end = max(datetime.fromisoformat(s["date"]) for s in summaries.values())
        wall = end.timestamp() - float((run / "started").read_text())
    except (OSError, KeyError, ValueError, TypeError):
        wall = sum(summary.get("wall_seconds") or 0.0 for summary in summaries.values())
    peak = max((s.get("peak_memory_gib") or 0.0 for s in summaries.values()), default=0.0)
    return {"wall_seconds": round(wall, 1), "peak_memory_gib": peak, **summaries}


def command(stage: str, flags: dict) -> str:
    """The command line that has these flags, to be pasted into a shell."""
    program = "train_pretrain.py vae" if stage.startswith("vae/") else STAGES[stage][0]
    words = ["python", *program.split()]
    for name, value in {**flags, "resume": None}.items():  # a repeat starts afresh
        if value is not None:  # None is always the default
            switch = f"--{name}" if value else f"--no-{name}"
            words.append(switch if isinstance(value, bool) else f"--{name}={value}")
    return shlex.join(words)


def reward_unit(ppo: Stage) -> str:
    """SD of a reward model's scores, which are normalised; what a function gives is as it is."""
    paid_by = ppo.flags.get("reward") or ppo.flags.get("env") or ""
    return "units of the reward" if ".py:" in paid_by else SD


def tiles(stages: dict[str, Stage]) -> str:
    """The headline numbers, each with its unit, standard error where known, and yardstick."""
    out, in_sd = "", reward_unit(stages["ppo"]) == SD
    for name, key, spec, unit, note in TILES:
        unit = unit if in_sd else unit.removeprefix("sd of ")
        summary = stages[name].summary
        if summary.get(key) is not None:
            texts = {k: number(v, "," if isinstance(v, int) else ".3g")
                     for k, v in summary.items() if isinstance(v, (int, float))}
            note = escape(note.format_map(defaultdict(lambda: "–", texts)))
            value = number(summary[key], spec, summary.get(f"{key}_se"))
            out += f'<div class="tile"><b>{value}</b> {unit}<small>{note}</small></div>\n'
    return f'<div class="tiles">{out}</div>'


def agreement(summary: dict) -> str:
    """The numbers of the reward model beside people and given figures, by domain."""
    out = ""
    for title, of in AGREEMENT.items():
        names, kinds = fig.beside_people(summary, *of)
        rows = [[name, *(number(value[i], ".3f", se[i]) for _, value, se in kinds)]
                for i, name in enumerate(names)]
        out += table("numbers", [title, *(kind[0] for kind in kinds)], rows) if rows else ""
    return out


def write_report(run: Path) -> Path:
    """Write RUN/report.html, summary.json, figures/*.png; UserError: no stage, a damaged file."""
    run = Path(run)
    stages = {name: read_stage(run / name) for name in STAGES}
    latent = latent_stages(run)
    if not latent and not any(stage.summary or stage.rows for stage in stages.values()):
        raise UserError(f"{run} holds no stage to report: looked for {', '.join(STAGES)} with a "
                        "summary.json or metrics.jsonl; give the folder above them, or train first")
    sections = dict.fromkeys((heading for _, heading in STAGES.values()), "")
    named, unit = policies(run), reward_unit(stages["ppo"])
    for name, *spec in FIGURES:
        spec = [x.replace(SD, unit) if isinstance(x, str) else x for x in spec]
        seen = {**stages[name].summary, "others": [x for x in named if x[0] != "ppo"]}
        sections[STAGES[name][1]] += fig.draw(run / "figures", seen, stages[name].rows, *spec)
    sections[STAGES["reward"][1]] += agreement(stages["reward"].summary)
    body = "".join(f'<h2>{heading}</h2><div class="figures">{items}</div>\n'
                   for heading, items in sections.items() if items)
    body += heads(run) + ways(named) + latents(run, latent)
    merged = merge(run, stages | latent)
    write_json(run / "summary.json", merged)
    write_text(run / "report.html", page(run, stages, latent, merged["wall_seconds"], body))
    return run / "report.html"


def page(run: Path, stages: dict[str, Stage], latent: dict[str, Stage], wall_seconds: float,
         body: str) -> str:
    """The whole page around the sections."""
    known = {k: str(v) for s in (latent | stages).values() for k, v in s.summary.items()}
    about = [str(run), *(known[key] for key in ("date", "machine") if key in known),
             f"{duration(wall_seconds)} in all"]
    unit = reward_unit(stages["ppo"])
    begun = any(stage.summary or stage.rows for stage in stages.values())
    absent = ", ".join(name for name, stage in stages.items() if begun and not stage.summary)
    note = f"<p><b>Not finished, no summary yet: {absent}.</b></p>" if absent else ""
    commands = "\n".join(command(name, s.flags) for name, s in (stages | latent).items() if s.flags)
    css = Path(__file__).with_name("report.css").read_text("utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nanokl report: {escape(run.name)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{css}</style>
</head><body><h1>From human ratings to a KL-penalised policy</h1>
<small>{escape(" · ".join(about))}</small>{note}
{tiles(stages)}
<small>± and bars: one standard error. A nat is 1.44 bits. Rewards are in {unit};
sd: standard deviation.</small>
{body}{samples(run / "ppo" / "samples.jsonl")}
<h2>How to reproduce</h2><p>Each stage with all its flags.</p><pre>{escape(commands)}</pre>
</body></html>
"""
