"""The figures of a report: four kinds of plot, painted once, given as PNG and as inline SVG.

In the SVG the colours are CSS variables, so that a page can turn them round for dark mode and
print. Leaves out what is in the figures (report.py), a global style, and pyplot with its state.
matplotlib is imported only when something is drawn.
"""

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

from nanokl import UserError

# One meaning for each colour: `ours` is this run, `yard` the yardstick beside it (people,
# best-of-n, perfection), `muted` what is given or raw. Blue and orange stay apart under every
# common colour blindness. report.css has the same names, with a second value each for the dark.
COLOURS = {"ink": "#24292f", "muted": "#68727d", "grid": "#e3e6ea", "ours": "#2468a5",
           "yard": "#b9560b"}  # fmt: skip
INK, MUTED, GRID, OURS, YARD = COLOURS.values()
# marks of `dots`: this run, its yardstick, then what is given, which is left open
MARKS = [("o", OURS, OURS), ("D", YARD, YARD), *((mark, MUTED, "none") for mark in "s^vPX")]
# of `frontier`; an SMC text's KL is not known, but at most what it is drawn at
SAMPLERS = {"best-of-n": "D-", "SIR": "s-", "Metropolis": "^-", "SMC, at most": "<"}
WINDOWS = 30  # a moving mean is over twice this part of a curve


# over w = 2k+1 neighbours:   mean = sum y / w,   se = sqrt(sum (y - mean)^2 / (w - 1) / w)
def smooth(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving mean (n,) of y (n,) and its standard error (n,); windows shrink towards the ends."""
    k = len(y) // WINDOWS
    padded = np.pad(np.asarray(y, float), k, constant_values=np.nan)
    w = np.lib.stride_tricks.sliding_window_view(padded, 2 * k + 1)  # (n, 2k+1)
    n = np.isfinite(w).sum(1)
    mean = np.nansum(w, 1) / n
    return mean, np.sqrt(np.nansum((w - mean[:, None]) ** 2, 1) / np.maximum(n - 1, 1) / n)


def draw(folder: Path, summary: dict, rows: list[dict], name: str, title: str, y: str,
         caption: str, paint: Callable, *what) -> str:
    """FOLDER/NAME.png, and as HTML <figure>; "" if paint(axes, summary, rows, *what) is False."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed and a report is drawn with it: "
                        "pip install 'nanokl[plot]'") from None
    # text stays text: found, copied, in the page's own font; the same figure is the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanokl"}):
        figure = Figure(figsize=(4.6, 3.3))  # inches: 10 points are legible on a phone 330 px wide
        axes = figure.add_axes((0.135, 0.15, 0.62, 0.655))  # the same in all: columns line up
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=MUTED)
        axes.locator_params(nbins=5)
        axes.grid(color=GRID, linewidth=0.8)
        if not paint(axes, summary, rows, *what):
            return ""
        axes.xaxis.label.set_color(MUTED)
        if named := len(axes.get_legend_handles_labels()[0]):
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False,
                        labelcolor="mec", fontsize=9, labelspacing=0.5 if named > 6 else 1.2,
                        handlelength=1.2, borderpad=0)
        # the y axis is named above it, level, where a phone's reader need not turn their head
        figure.text(0.008, 0.945, title, color=INK, fontsize=11, fontweight="bold")
        figure.text(0.008, 0.87, y, color=MUTED)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
        svg = _inline_svg(figure, label=f"{title}: {y}")
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _inline_svg(figure, *, label: str) -> str:
    """<svg> of the page's width and colours: no fixed size, no addresses, no clashing ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', buffer.getvalue(), flags=re.DOTALL)
    view, body = svg.groups()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # nobody points at these, and figures would clash
    for name, light in COLOURS.items():
        body = body.replace(light, f"var(--{name})")
    return f'<svg {view} role="img" aria-label="{escape(label)}">{body}'


def _line_and_band(axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> np.ndarray:
    """Moving mean with its band of one s.e. over the faint raw points; returns the mean (n,)."""
    (middle, _), (mean, se) = smooth(x), smooth(y)
    pick = np.unique(np.linspace(0, len(x) - 1, 300).astype(int))  # more would only fill the file
    few = len(x) < WINDOWS  # nothing to average: the points themselves, joined
    line = {"color": colour, "label": f"{label}\n{mean[-1]:.{3 if abs(mean[-1]) < 1 else 2}f}"}
    axes.plot(middle[pick], mean[pick], "o-" if few else "-", lw=1.8, ms=3, **line)
    if not few:
        axes.plot(x[pick], y[pick], ".", color=colour, alpha=0.25, ms=4, mew=0)
        band = (middle[pick], (mean - se)[pick], (mean + se)[pick])
        axes.fill_between(*band, color=colour, alpha=0.25, linewidth=0)
    return mean


def column(rows: list[dict], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The values (n,), (n,) of two metrics over the rows that have both, null left out."""
    pairs = [(r[x], r[y]) for r in rows if r.get(x) is not None and r.get(y) is not None]
    xy = np.array(pairs, dtype=float).reshape(-1, 2)
    return xy[:, 0], xy[:, 1]


def curves(axes, summary: dict, rows: list[dict], labels: dict[str, str]) -> bool:
    """The metrics that `labels` names, over training; the last is the one that counts."""
    seen, late = [], []
    unit = "episodes" if rows and "episodes" in rows[-1] else "step"
    for key, label in labels.items():
        x, y = column(rows, unit, key)
        if len(x):
            colour = OURS if key == list(labels)[-1] else MUTED
            seen.append(_line_and_band(axes, x, y, colour, label))
            late.append(seen[-1][x >= 0.1 * x[-1]])
    if seen:
        # A loss falls from log V in a few steps; at full height what follows would be a flat line,
        # so the first tenth may leave the frame where it would take up most of it.
        all_y, late_y = np.concatenate(seen), np.concatenate(late)
        shown = late_y if np.ptp(all_y) > 2 * np.ptp(late_y) > 0 else all_y
        pad = 0.08 * (np.ptp(shown) or 1.0)
        axes.set(xlabel=unit, ylim=(shown.min() - pad, shown.max() + pad))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return bool(seen)


def beside_people(summary: dict, key: str, yard: str, label: str) -> tuple[list[str], list[tuple]]:
    """Domains, and (label, values, s.e.) of this run, people and given methods; None if unknown."""
    rows = dict(summary.get("domains") or {})
    if f"{key}_se" in summary:
        rows["pooled"] = summary
    ours, errors, people = ([r.get(k) for r in rows.values()] for k in (key, f"{key}_se", yard))
    none = [None] * len(rows)
    kinds = [("this run", ours, errors), (label, people, none)]
    for name, given in (summary.get("given") or {}).items():
        if key in given:
            kinds.append((f"{name} (given)", [given[key].get(row) for row in rows], none))
    return list(rows), kinds


def dots(axes, summary: dict, rows: list[dict], of: tuple[str, str, str]) -> bool:
    """A line for each domain, and on it the marks of what is `beside_people`."""
    names, kinds = beside_people(summary, *of)
    place = np.arange(len(names))[::-1]
    for (label, value, se), (mark, colour, face) in zip(kinds, MARKS, strict=False):
        value, se = np.array([value, se], float)  # None becomes NaN: not drawn
        label = label.replace(" ", "\n") if len(label) > 9 else label
        axes.plot(value, place, mark, color=colour, mfc=face, ms=7, mew=1.4, label=label)
        axes.hlines(place, value - se, value + se, color=colour, lw=1.8)
    axes.set(yticks=place, yticklabels=names, ylim=(-0.6, len(names) - 0.4))
    return bool(names)


def reliability(axes, summary: dict, rows: list[dict]) -> bool:
    """Predicted against observed frequency of the likelier answer, and the diagonal."""
    bins = summary.get("calibration") or []
    p, q, n = (np.array([b[k] for b in bins], float) for k in ("predicted", "observed", "share"))
    axes.plot([0.5, 1], [0.5, 1], color=YARD, lw=1.5, label="perfect")
    miss = summary.get("calibration_error")
    label = "this run" if miss is None else f"this run\nmiss {miss:.3f}"
    axes.plot(p, q, color=OURS, lw=1.5, label=label)
    axes.scatter(p, q, s=200 * n, color=OURS)  # area: a bin's share of the answers
    axes.set(xlim=(0.5, 1), xlabel="predicted probability of the likelier answer")
    return bool(bins)


def frontier(axes, summary: dict, rows: list[dict]) -> bool:
    """Reward got against KL paid: the most there is, samplers, training, the final policies."""
    known = summary.get("posterior") or {}
    if most := known.get("frontier"):
        x, y, fine = (np.array([m[k] for m in most]) for k in ("kl_nats", "reward_mean", "trusted"))
        last = max(np.flatnonzero(fine), default=0)
        axes.plot(x[: last + 1], y[: last + 1], color=INK, lw=1.8, label="most there is")
        axes.plot(x[last:], y[last:], ":", color=INK, lw=1.2, label="at least")
    for name, mark in SAMPLERS.items():
        if points := [p for p in known.get("untrained") or [] if p["sampler"] == name]:
            x, y = ([p[k] for p in points] for k in ("kl_nats", "reward_mean"))
            label = " to ".join(str(p["n"]) for p in points[:: len(points) - 1 or 1])
            axes.plot(x, y, mark, color=YARD if name == "best-of-n" else MUTED, lw=1, ms=4,
                      label=f"{name}\n{label}")
    if not known and (best := summary.get("best_of_n")):
        x, y, se = (np.array([b[k] for b in best], float)
                    for k in ("kl_nats_bound", "reward_mean", "reward_mean_se"))
        axes.plot(x, y, "D-", color=YARD, lw=1.5, ms=4, label=f"best of\n1 to {best[-1]['n']}")
        axes.errorbar(x, y, se, color=YARD, fmt="none")
    kl, reward = column(rows, "kl_nats_per_sequence", "reward_mean")
    if len(kl):
        _line_and_band(axes, kl, reward, OURS, "training")
    here = known if "kl_nats_per_sequence" in known else summary  # on the frontier's own prompts
    x, y, beta = map(here.get, ("kl_nats_per_sequence", "reward_mean", "beta"))
    final = None not in (x, y, beta)
    if final:
        axes.plot(x, y, "o", color=OURS, ms=7, label=f"final\n{y:.2f}")
        x_se, y_se = map(here.get, ("kl_nats_per_sequence_se", "reward_mean_se"))
        axes.errorbar(x, y, y_se, x_se, color=OURS, fmt="none")
        axes.axline((x, y), slope=beta, color=MUTED, lw=1, ls="--", label="equal\nobjective")
    others = [({**x, **(x.get("posterior") or {})}, name) for name, x in summary.get("others", [])]
    others = sorted((x["reward_mean"], x["kl_nats_per_sequence"], name) for x, name in others)
    for i, (y, x, name) in enumerate(others):  # their names in a column, by reward like the dots
        axes.plot(x, y, "o", color=OURS, mfc="none", ms=5)
        axes.annotate(name, (x, y), (0.99, (i + 0.5) / len(others)), textcoords="axes fraction",
                      ha="right", va="center", fontsize=7, color=MUTED,
                      arrowprops={"arrowstyle": "-", "lw": 0.4, "color": MUTED})
    axes.set_xlabel("KL from the reference, nats per sequence")
    return final or len(kl) > 0


# beta log Z = J + beta gap: the prompts of the gap are few, those of J many
def evidence(axes, summary: dict, rows: list[dict]) -> bool:
    """The objective over training, between the prior's level and the posterior's."""
    known, J = summary.get("posterior") or {}, summary.get("objective")
    ends = [known.get(f"gap_reward_{end}") for end in ("lower", "upper")]
    if None in (J, *ends):
        return False
    curves(axes, summary, rows, {"objective": "objective"})
    prior, low, high = summary["objective_ref"], J + ends[0], J + max(ends)
    axes.axhline(prior, color=MUTED, lw=1.5, label=f"prior\n{prior:.2f}")
    what = "posterior"
    if known["trusted"]:
        axes.axhspan(low, high, color=YARD, alpha=0.3, lw=0)
    else:  # the pseudo-upper is no end then
        what, high = "posterior,\nat least", low
    axes.axhline(low, color=YARD, lw=1.5, label=f"{what}\n{low:.2f}")
    pad = 0.08 * (high - prior)
    axes.set_ylim(min(prior, axes.get_ylim()[0]) - pad, high + pad)
    return True


def overoptimisation(axes, summary: dict, rows: list[dict]) -> bool:
    """The reward that is trained on and the one that only watches, against sqrt(KL)."""
    kl, gold = column(rows, "kl_nats_per_sequence", "gold_mean")
    if not len(kl):
        return False
    reward = column(rows, "kl_nats_per_sequence", "reward_mean")[1]
    _line_and_band(axes, np.sqrt(kl), reward, OURS, "trained on")
    _line_and_band(axes, np.sqrt(kl), gold, YARD, "gold")
    axes.set_xlabel("square root of the KL in nats per sequence")
    return True


def confusion(axes, summary: dict, rows: list[dict]) -> bool:
    """Which class texts of each class were given: shares of the row as shades, counts as text."""
    counts, labels = np.array(summary["confusion"]), summary["labels"]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.grid(False)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=0 if len(labels) < 5 else 60)
    axes.set_yticks(places, labels, rotation=90 if len(labels) < 5 else 0, va="center")
    axes.set_xlabel("called")
    for i, j in np.ndindex(*counts.shape) if len(labels) <= 12 else ():
        axes.annotate(f"{counts[i, j]:,}\n{share[i, j]:.0%}", (j, i), ha="center", va="center",
                      fontsize=8, color=INK)
    return True
