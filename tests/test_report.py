"""report and figures: one whole page from what is there, and nothing in it that is not text."""

import html
import importlib
import json
import math
import re
import statistics
import struct
import sys
from datetime import datetime, timezone
from html.parser import HTMLParser

import numpy as np
import pytest

from nanokl import UserError, figures, report, report_tables
from nanokl.report import write_report

EVIL = "<script>alert(1)</script> & \"q\" <img src='x'>\nline two {beta} \ud800"
SUMMARY = {
    "gpt": {"wall_seconds": 100.5, "peak_memory_gib": 1.5,
            "bits_per_byte": 2.0014, "val_nats_per_token": 3.53,
            "parameters": 5312256, "tokens": 10, "best_step": 9, "machine": "a <fine> machine"},
    "bert": {"wall_seconds": 50.0, "mlm_nats_per_token": 4.2, "mlm_accuracy": 0.2984},
    "reward": {
        "wall_seconds": 20.0, "pair_accuracy": 0.7412, "pair_accuracy_se": 0.0041,
        "human_ceiling": 0.8838, "pearson_r": {"movie": 0.69, "news": 0.4},
        "human_r": {"movie": 0.88, "news": 0.72}, "calibration_error": 0.0213,
        "domains": {
            name: {"pair_accuracy": acc, "pair_accuracy_se": 0.006, "human_ceiling": 0.88,
                   "pearson_r": 0.6, "human_r": 0.87, "n_pairs": 20000, "n_snippets": 1000}
            for name, acc in (("movie", 0.745), ("news", 0.641))},
        "calibration": [{"predicted": p, "observed": p, "share": 1 / 3} for p in (0.55, 0.75, 0.9)],
        "given": {"tf-idf ridge": {"pair_accuracy": {"movie": 0.7541}, "pearson_r": {}}}},
    "ppo": {"wall_seconds": 30.0, "beta": 0.1, "reward_ref_mean": -0.012, "reward_mean": 1.948,
            "reward_mean_se": 0.021, "kl_nats_per_sequence": 8.41, "kl_nats_per_sequence_se": 0.09,
            "objective": 1.107, "objective_se": 0.022, "objective_ref": -0.012,
            "first_ratio_max_deviation": 4.2e-7, "kl_at_step_0": 0.0, "distinct_2": 0.571,
            "distinct_2_ref": 0.931,
            "best_of_n": [{"n": n, "reward_mean": math.log(n), "reward_mean_se": 0.03,
                           "kl_nats_bound": math.log(n) - (n - 1) / n} for n in (1, 2, 4)]},
}  # fmt: skip
for summary in SUMMARY.values():
    summary["date"] = "2026-05-09 08:12:30+00:00"
FIGURES = {
    "gpt": {"gpt_loss"},
    "bert": {"bert_loss"},
    "reward": {"reward_accuracy", "reward_pearson", "reliability", "reward_loss"},
    "ppo": {"ppo_reward_kl", "ppo_reward", "ppo_kl", "ppo_entropy"},
}
END = datetime(2026, 5, 9, 8, 12, 30, tzinfo=timezone.utc).timestamp()  # of the last stage


def rows_of(stage):
    for step in range(1, 81):
        if stage == "gpt":
            yield {"step": step, "loss_nats_per_token": 9 / step, "lr": None}
            if step % 20 == 0:
                yield {"step": step, "val_nats_per_token": 9 / step, "val_bits_per_byte": 4 / step}
        elif stage == "bert":
            yield {"step": step, "loss_nats_per_token": None if step == 7 else 9 / step}
            yield {"step": step, "mlm_nats_per_token": 9 / step, "mlm_accuracy": step / 200}
        elif stage == "reward":
            yield {"step": step, "loss_nats_per_pair": 0.6, "val_nats_per_pair": 0.6}  # constant
        else:
            keys = (
                "reward_mean kl_nats_per_sequence kl_k1_nats_per_sequence objective "
                "entropy_nats_per_token"
            )
            yield {"step": step, "episodes": 64 * step, **dict.fromkeys(keys.split(), step / 9)}


def fake(run, *stages):
    """A run folder as the programs leave it."""
    for stage in stages:
        (run / stage).mkdir(parents=True)
        (run / stage / "summary.json").write_text(json.dumps(SUMMARY[stage]))
        rows = "".join(json.dumps(row) + "\n" for row in rows_of(stage))
        (run / stage / "metrics.jsonl").write_text(rows)
        flags = {"data": "my data", "lr": 3e-5, "resume": True, "use_x": False, "kl_target": None}
        (run / stage / "flags.json").write_text(json.dumps(flags))
    if "ppo" in stages:
        sample = {"prompt": EVIL, "before": "b", "after": EVIL, "score_before": -1.5,
                  "score_after": None, "kl_nats": 9.1}  # fmt: skip
        (run / "ppo" / "samples.jsonl").write_text((json.dumps(sample) + "\n") * 3)
    return run


class Page(HTMLParser):
    """Tags with attributes, text, and whether every tag is closed in order."""

    VOID = {"meta", "br", "path", "use", "rect"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A report of all stages and its figures, made once for the tests that only look at it."""
    run = fake(tmp_path_factory.mktemp("run"), *SUMMARY)
    (run / "started").write_text(f"{END - 500}\n")
    kept, to_svg = [], figures._inline_svg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_inline_svg", lambda f, **kw: kept.append(f) or to_svg(f, **kw))
        return write_report(run), kept


@pytest.fixture(scope="module")
def whole(drawn):
    return drawn[0]


# ------------------------------------------------------------------------------------- the page
def test_the_page_is_well_formed_and_loads_nothing(whole):
    html = whole.read_text("utf-8")
    page = Page(html)
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object"} == set()
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attrs)
        assert attrs.get("xlink:href", "#")[0] == "#"  # markers, defined in the same figure
    assert not re.search(r"https?:|url\((?!#)|@import", html)
    assert 'name="viewport"' in html and "@media print" in html and "color-scheme: dark" in html


def test_figures_follow_the_colours_of_the_page(whole):
    html = whole.read_text("utf-8")
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert html.count("<svg") == sum(map(len, FIGURES.values()))
    for name, light in figures.COLOURS.items():
        values = re.findall(rf"--{name}: (#[0-9a-f]{{6}});", html)
        assert values[0] == light and len(set(values)) == 2  # light and dark
        assert light not in svgs
    assert "var(--ours)" in svgs and "var(--yard)" in svgs
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert used <= set(re.findall(r"--(\w+):", html))


def test_numbers_carry_errors_and_yardsticks(whole):
    text = re.sub(r"\s+", " ", Page(whole.read_text("utf-8")).text)
    for expected in (
        "2.001 bits per byte", "5,312,256 parameters", "0.741 ± 0.004 of pairs", "ceiling 0.884",
        "1.95 ± 0.02 sd", "8.41 ± 0.09 nats", "1.11 ± 0.02 sd", "beta = 0.1", "has −0.012",
        "tf-idf ridge (given)", "0.754", "0.745 ± 0.006", "4.2e−07", "a <fine> machine",
        "0.571 distinct-2", "has 0.931", "miss 0.021", "0:08:20 in all", "best of 1 to 4",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Not finished" not in text and "nan" not in text.split()


def test_samples_are_escaped(whole):
    page = Page(whole.read_text("utf-8"))
    shown = EVIL.replace("\ud800", "?")  # no UTF-8 for half a surrogate
    assert page.text.count(shown) == 2 * 3 and "−1.50" in page.text


def test_commands_can_be_pasted(whole):
    lines = re.search(r"<pre>(.*?)</pre>", whole.read_text("utf-8"), re.DOTALL)[1].splitlines()
    assert lines[0] == (
        "python train_pretrain.py gpt &#x27;--data=my data&#x27; --lr=3e-05 --no-use_x"
    )
    assert [line.split()[1:3] for line in lines[2:]] == [
        ["train_rlhf.py", "reward"],
        ["train_rlhf.py", "ppo"],
    ]


def test_figures_are_png_files_of_one_size(whole):
    files = sorted((whole.parent / "figures").iterdir())
    assert {file.stem for file in files} == set().union(*FIGURES.values())
    for file in files:
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
        assert struct.unpack(">II", data[16:24]) == (920, 660)


# ------------------------------------------------------------------------------------ the merge
def test_summaries_are_merged_with_the_wall_time_since_the_start(whole):
    merged = json.loads((whole.parent / "summary.json").read_text())
    # whenever the report is made
    assert merged == {"wall_seconds": 500.0, "peak_memory_gib": 1.5, **SUMMARY}


def test_wall_time_lasts_to_the_end_of_the_last_stage_or_is_the_sum(tmp_path):
    run = fake(tmp_path, "gpt", "bert", "ppo")
    (run / "started").write_text(f"{END - 300}\n")
    stages = {name: report.read_stage(run / name) for name in report.STAGES}
    stages["bert"].summary.pop("date")
    assert report.merge(run, stages)["wall_seconds"] == 180.5  # one stage does not say when
    stages["bert"].summary["date"] = "2026-05-09 08:20:30+00:00"
    assert report.merge(run, stages)["wall_seconds"] == 300 + 8 * 60
    (run / "started").write_text("yesterday")
    assert report.merge(run, stages)["wall_seconds"] == 180.5


# ------------------------------------------------------------------------------------ what lacks
def test_absent_and_unfinished_stages_are_named(tmp_path):
    run = fake(tmp_path / "run", "gpt", "bert")
    (run / "bert" / "summary.json").unlink()
    (run / "gpt" / "metrics.jsonl").unlink()
    text = Page(write_report(run).read_text("utf-8")).text
    assert "Not finished, no summary yet: bert, reward, ppo." in text
    assert "Pretraining" in text and "Policy (PPO)" not in text
    assert {file.stem for file in (run / "figures").iterdir()} == FIGURES["bert"]
    merged = json.loads((run / "summary.json").read_text())
    assert set(merged) == {"wall_seconds", "peak_memory_gib", "gpt"}


def test_bare_summaries_still_make_a_page(tmp_path):
    """Every number may be missing or null: a short run, a NaN, an older version."""
    for stage in SUMMARY:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "summary.json").write_text(
                '{"beta": null, "note": "x", "mlm_accuracy": 0.1, "best_of_n": null, "date": 7}'
            )
    (tmp_path / "gpt" / "metrics.jsonl").write_text('{"step": 1, "val_nats_per_token": 3.0}\n')
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert "–" in page.text
    assert [file.stem for file in (tmp_path / "figures").iterdir()] == ["gpt_loss"]


def test_nothing_to_report_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no stage") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["{", "[1]", "7", "\x00"])
def test_a_damaged_summary_is_named(tmp_path, damage):
    run = fake(tmp_path, "bert")
    (run / "bert" / "summary.json").write_text(damage)
    with pytest.raises(UserError, match=r"bert/summary\.json is damaged"):
        write_report(run)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'nanokl\[plot\]'"):
        write_report(fake(tmp_path, "bert"))
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "figures").exists()


# ------------------------------------------------------------------------------------- the sums
@pytest.mark.parametrize("n", [1, 2, 29, 30, 95])
def test_smooth_is_a_moving_mean_with_its_error(n):
    y = np.random.default_rng(n).normal(size=n)
    mean, se = figures.smooth(y)
    k = n // figures.WINDOWS
    for i in range(n):
        window = y[max(0, i - k) : i + k + 1].tolist()
        assert mean[i] == pytest.approx(statistics.fmean(window))
        error = statistics.stdev(window) / math.sqrt(len(window)) if len(window) > 1 else 0.0
        assert se[i] == pytest.approx(error)


def test_every_legend_is_inside_its_figure_and_beside_the_axes(drawn):
    for figure in drawn[1]:
        (axes,) = figure.axes
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= 0 and legend.y1 <= figure.bbox.y1, axes.get_xlabel()
        assert axes.bbox.x1 <= legend.x0 and legend.x1 <= figure.bbox.x1, axes.get_xlabel()
        for text in axes.get_legend().get_texts():
            assert text.get_color() in (figures.OURS, figures.YARD, figures.MUTED)


def test_a_yardstick_without_this_number_is_left_out():
    summary = {"domains": {"film": {"r": 0.5, "r_se": 0.1, "human": 0.9}},
               "given": {"rules": {"r": {"film": 0.3}}, "ridge": {"accuracy": {"film": 0.7}}}}
    names, kinds = figures.beside_people(summary, "r", "human", "one human")
    assert names == ["film"] and [k[0] for k in kinds] == ["this run", "one human", "rules (given)"]
    assert [k[1] for k in kinds] == [[0.5], [0.9], [0.3]]


# --------------------------------------------------------------------------------- the posterior
POSTERIOR = {
    "trusted": True, "gap_nats": 4.2, "gap_nats_se": 0.31, "gap_nats_lower": 4.2,
    "gap_nats_lower_se": 0.31, "gap_reward_lower": 0.42, "gap_reward_upper": 0.44,
    "bayes_fraction": 0.71, "bayes_fraction_se": 0.02, "bayes_fraction_upper": 0.72,
    "bayes_fraction_upper_se": 0.02, "bayes_fraction_lower": 0.7, "bayes_fraction_lower_se": 0.02,
    "reward_ref_mean": 0.3, "objective": 1.1,
    "frontier": [{"beta": b, "kl_nats": 1 / b, "reward_mean": 2 - b, "ess_median": 60 * b,
                  "trusted": b > 0.8} for b in (2.0, 1.0, 0.5)],
    "untrained": [{"sampler": name, "n": n, "kl_nats": math.log(n), "reward_mean": math.log(n) / 2,
                   "objective": 1.0} for n in (4, 16) for name in ("best-of-n", "SIR")],
}  # fmt: skip


def with_posterior(run, name="ppo", **changes):
    """A finished policy whose gap is known, in RUN/NAME."""
    fake(run, "ppo") if name == "ppo" else (run / name).mkdir(parents=True)
    summary = {**SUMMARY["ppo"], "episodes": 8192, "posterior": {**POSTERIOR, **changes}}
    (run / name / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def test_the_gap_is_told_and_drawn(tmp_path):
    with_posterior(tmp_path)
    page = write_report(tmp_path).read_text("utf-8")
    assert (tmp_path / "figures" / "posterior.png").exists()
    assert "4.20 ± 0.31" in page and "0.71 ± 0.02" in page and "8,192" in page
    assert "unreliable" not in page and "<h2>Prior, posterior, gap</h2>" in page
    for _, formula, functions in report_tables.FORMULAS:
        assert html.escape(formula) in page
        for name in functions.split(", "):
            module, _, function = name.partition(".")
            assert callable(getattr(importlib.import_module(f"nanokl.{module}"), function)), name


def test_a_gap_that_is_not_trusted_is_no_plain_number(tmp_path):
    nothing = dict.fromkeys(("gap_nats", "gap_nats_se", "bayes_fraction", "bayes_fraction_se"))
    with_posterior(tmp_path, trusted=False, **nothing)
    page = write_report(tmp_path).read_text("utf-8")
    assert "≥ 4.20 ± 0.31 (unreliable)" in page and "≤ 0.72 ± 0.02 (unreliable)" in page
    assert "at least" in page
    with_posterior(tmp_path, "ppo-worse", trusted=False, objective=0.2, **nothing)
    page = write_report(tmp_path).read_text("utf-8")
    assert page.count("≤ 0.72 ± 0.02 (unreliable)") == 1
    assert "≥ 0.70 ± 0.02 (unreliable)" in page  # worse than the reference: log Z brings it to 0


def test_a_policy_at_beta_0_has_no_gap(tmp_path):
    with_posterior(tmp_path)
    summary = {**SUMMARY["ppo"], "beta": 0, "posterior": {"beta": 0, "trusted": False}}
    (tmp_path / "ppo" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = write_report(tmp_path).read_text("utf-8")
    assert page.count(">–</td>") >= 2 and "(unreliable)" not in page


def painted(paint, summary, rows=()):
    """Axes after one of the figures' painters."""
    from matplotlib.figure import Figure

    axes = Figure().add_axes((0, 0, 1, 1))
    assert paint(axes, summary, list(rows))
    return axes


def test_a_band_to_the_posterior_only_where_it_is_trusted():
    """A pseudo-upper of weights that are not trusted is no end: a level, `at least`, alone."""
    for trusted, label in ((True, "posterior\n1.53"), (False, "posterior,\nat least\n1.53")):
        summary = {**SUMMARY["ppo"], "posterior": {**POSTERIOR, "trusted": trusted}}
        axes = painted(figures.evidence, summary)
        assert len(axes.patches) == trusted
        assert label in axes.get_legend_handles_labels()[1]
    (words,) = (x[4] for x in report.FIGURES if x[1] == "posterior")
    assert "A band" in words and "is at least where it is drawn" in words


def test_a_later_account_of_more_texts_stands_for_that_of_the_summary(tmp_path):
    """RUN/ppo/posterior.json, of `python -m nanokl posterior`, in table, figure and summary."""
    with_posterior(tmp_path)
    smc = {"sampler": "SMC, at most", "n": 256, "kl_nats": 9.0, "reward_mean": 2.5, "objective": 1}
    later = {**POSTERIOR, "gap_nats": 3.33, "untrained": [*POSTERIOR["untrained"], smc]}
    (tmp_path / "ppo" / "posterior.json").write_text(json.dumps(later), encoding="utf-8")
    page = write_report(tmp_path).read_text("utf-8")
    assert "3.33 ± 0.31" in page and "4.20 ± 0.31" not in page
    assert "SMC, at most" in page
    merged = json.loads((tmp_path / "summary.json").read_text())
    assert merged["ppo"]["posterior"]["gap_nats"] == 3.33
    axes = painted(figures.frontier, {**SUMMARY["ppo"], "posterior": later})
    labels = axes.get_legend_handles_labels()[1]
    assert "SMC, at most\n256" in labels and "best-of-n\n4 to 16" in labels
    (point,) = (x for x in axes.lines if x.get_label() == "SMC, at most\n256")
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (9.0, 2.5)
    (tmp_path / "ppo" / "summary.json").unlink()  # a run that has not ended
    assert report.read_stage(tmp_path / "ppo").summary == {}


def test_where_there_is_no_ppo_no_other_policy_is_lost(tmp_path, monkeypatch):
    """All that are not RUN/ppo are `others` of the figures."""
    fake(tmp_path, "gpt")
    for name in ("trainers/dpo-0.1", "trainers/rloo-0.1"):
        with_posterior(tmp_path, name)
    seen = []
    monkeypatch.setattr(figures, "draw", lambda _, summary, *rest: seen.append(summary) or "")
    write_report(tmp_path)
    assert {tuple(name for name, _ in x["others"]) for x in seen} == {
        ("trainers/dpo-0.1", "trainers/rloo-0.1")}
    with_posterior(tmp_path)
    with_posterior(tmp_path, "ppo-0.4")  # not the same as this one:
    with_posterior(tmp_path, "trainers/ppo-0.4")
    write_report(tmp_path)
    assert {name for name, _ in seen[-1]["others"]} == {
        "ppo-0.4", "trainers/dpo-0.1", "trainers/ppo-0.4", "trainers/rloo-0.1"}


def test_other_policies_stand_beside_it(tmp_path):
    with_posterior(tmp_path)
    with_posterior(tmp_path, "trainers/rloo-0.4", gap_nats=7.77)
    page = write_report(tmp_path).read_text("utf-8")
    assert page.index("4.20 ± 0.31") < page.index("7.77 ± 0.31")
    assert page.count("trainers/rloo-0.4") >= 2  # in the table, and in the figure


def test_other_heads_stand_in_a_table_and_ratings_have_their_own_loss(tmp_path):
    run = fake(tmp_path / "run", "reward")
    log = [{"step": k, "loss_sd2_per_text": 1 / k, "val_nats_per_pair": 0.6} for k in range(1, 9)]
    text = "".join(json.dumps(row) + "\n" for row in log)
    (run / "reward" / "metrics.jsonl").write_text(text)
    seen = {"minilm": {"objective": "rating", "pair_accuracy": 0.8123, "pair_accuracy_se": 0.004},
            "classes/gpt": {"objective": "classes", "accuracy": 0.6928, "accuracy_se": 0.0095,
                            "macro_f1": 0.6567, "wall_seconds": 132.0}}
    for name, summary in seen.items():
        (run / name).mkdir(parents=True)
        (run / name / "summary.json").write_text(json.dumps(summary))
        (run / name / "flags.json").write_text(json.dumps({"init": f"the/{EVIL}"}))
    page = write_report(run).read_text("utf-8")
    cells = re.findall(r"<tr>(.*?)</tr>", page.split("<h2>Other heads</h2>")[1], re.DOTALL)[1:3]
    rows = [[html.unescape(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
            for row in cells]
    assert [row[0] for row in rows] == list(seen) and "<script>" not in page
    assert rows[0][2:] == ["rating", "0.812 ± 0.004", "–", "–", "–"]
    assert rows[1][2:] == ["classes", "–", "0.693 ± 0.009", "0.657", "2.2"]
    assert (run / "figures" / "rating_loss.png").is_file()


def test_proxy_and_gold_are_drawn_where_there_is_a_gold(tmp_path):
    fake(tmp_path, "ppo")
    write_report(tmp_path)
    assert not (tmp_path / "figures" / "overoptimisation.png").exists()
    rows = "".join(json.dumps({**row, "gold_mean": 0.5}) + "\n" for row in rows_of("ppo"))
    (tmp_path / "ppo" / "metrics.jsonl").write_text(rows, encoding="utf-8")
    assert "Proxy and gold" in write_report(tmp_path).read_text("utf-8")
    assert (tmp_path / "figures" / "overoptimisation.png").exists()


@pytest.mark.parametrize("paid_by, in_sd", [
    ({}, True), ({"reward": "runs/reward"}, True), ({"reward": "x.py:right"}, False),
    ({"env": "x.py:sums"}, False), ({"env": "x.py:chat", "reward": "runs/reward"}, True),
])  # fmt: skip
def test_only_a_reward_model_counts_in_sd(tmp_path, paid_by, in_sd):
    run = fake(tmp_path, "ppo")
    flags = json.loads((run / "ppo" / "flags.json").read_text())
    (run / "ppo" / "flags.json").write_text(json.dumps(flags | paid_by))
    text = " ".join(Page(write_report(run).read_text("utf-8")).text.split())
    assert ("Rewards are in sd of the reference's scores" in text) == in_sd
    assert ("sd of reward" in text) == ("sd of objective" in text) == in_sd
    assert ("Rewards are in units of the reward" in text) == (not in_sd)
