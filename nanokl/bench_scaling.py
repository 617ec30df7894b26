"""How cost grows: of the log-prob op with V and N, of a training step with model size and T.

The op is that of bench_logprob.py, with its inputs and its checks, in float32. A training step is
that of bench_pretrain.py (forward, backward, clipping, optimisers; bfloat16 where that is fast),
with its checks, as many tokens in each. Its memory is beyond weights and optimiser states, with the
gradients.
"""

from pathlib import Path

from nanokl import UserError, bench_logprob, bench_pretrain
from nanokl.figures import GRID, INK, MUTED, OURS, YARD

SIZES = ((2, 128), (4, 256), (6, 384), (8, 512))  # layers, width
LABELS = {"V": "vocabulary V (N 1,024, d 256)", "N": "tokens N (V 8,192, d 256)",
          "size": "parameters (T 128)", "T": "context T (4 layers, 256 wide)"}


def _op(n: int, v: int, *axes: str) -> dict:
    return {"name": f"op: N {n}, d 256, V {v}", "N": n, "d": 256, "V": v, "dtype": "float32",
            "outputs": ["logp"], "axes": list(axes), "variants": ("nanokl", "naive")}


def _model(n_layer: int, n_embd: int, t: int, tokens: int, *axes: str) -> dict:
    name = f"step: {n_layer} layers, {n_embd} wide, T {t}"
    return {"name": name, "n_layer": n_layer, "n_head": n_embd // 32, "n_embd": n_embd, "T": t,
            "B": tokens // t, "V": 4096, "axes": list(axes), "variants": ("training step",)}


CASES = (
    *(_op(1024, v, "V") for v in (2048, 32768, 131072)), _op(1024, 8192, "V", "N"),
    *(_op(n, 8192, "N") for n in (256, 4096)),
    *(_model(*size, 128, 2048, "size") for size in SIZES),
    *(_model(4, 256, t, 2048, "T") for t in (64, 256, 1024)),
    {**_op(64, 512, "V", "N"), "name": "tiny op", "extra": True},
    {**_model(1, 32, 16, 64, "size", "T"), "name": "tiny step", "extra": True},
)  # fmt: skip


VARIANTS = {name: bench_logprob.VARIANTS[name] for name in ("nanokl", "naive")}
VARIANTS["training step"] = bench_pretrain.step


def _points(result: dict, axis: str, name: str, key: str) -> tuple[list[float], list[float]]:
    """x and y of a variant over the cases that vary `axis`, by x; failures are left out."""
    pairs = []
    for entry in result["cases"]:
        for row in entry["variants"]:
            if axis in entry["case"]["axes"] and row["name"] == name and row.get(key):
                x = row["check"]["parameters"] if axis == "size" else entry["case"][axis]
                pairs.append((x, row[key]))
    pairs.sort()
    return [x for x, _ in pairs], [y for _, y in pairs]


def _panel(axes, result: dict, axis: str, key: str, scale: float) -> None:
    """One cost along one axis, both logarithmic, beside what would be in proportion to it."""
    from matplotlib.ticker import LogLocator, NullLocator

    names = {"nanokl": ("nanokl", OURS), "naive": ("naive", YARD), "training step": ("", OURS)}
    for name, (label, colour) in names.items():
        x, y = _points(result, axis, name, key)
        if x:
            y = [scale * value for value in y]
            axes.plot(x, y, "o-", color=colour, lw=1.8, ms=4, label=label)
        if len(x) > 1 and name != "naive" and axis != "T":
            slope = -1 if key == "units_per_second" else 1
            line = [y[-1] * (value / x[-1]) ** slope for value in x]
            axes.plot(x, line, "--", color=MUTED, lw=1, label="in proportion", zorder=0)
    flat = axis == "T"  # what hardly grows is shown from 0
    axes.set(xscale="log", yscale="linear" if flat else "log")
    if flat:
        axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-9))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks = sorted({x for name in names for x in _points(result, axis, name, key)[0]})
    axes.set_xticks(ticks, [_short(x) for x in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    for short in (axes.xaxis, axes.yaxis):
        short.set_minor_locator(NullLocator())
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=MUTED)
    axes.grid(color=GRID, linewidth=0.8)


def _short(x: float) -> str:
    """Two or three digits, k for a thousand, M for a million."""
    size, letter = (1e6, "M") if x >= 1e6 else (1e3, "k") if x >= 1e3 else (1, "")
    return f"{x / size:.{0 if x >= 10 * size else 1}f}".removesuffix(".0") + letter


def finish(result: dict, folder: Path) -> None:
    """FOLDER/scaling.png: time and memory of the op, tokens/s and memory of a training step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed, and the figure is drawn with it: pip install "
                        "'nanokl[plot]'; the numbers are written") from None
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplots(2, 4)
    for (upper, lower), (axis, label) in zip(panels.T, LABELS.items(), strict=True):
        op = axis in ("V", "N")
        cost, scale, title, beyond = (
            ("seconds_median", 1e3, "op: milliseconds", "inputs and gradients") if op else
            ("units_per_second", 1.0, "training step: tokens/s", "weights and optimisers"))
        _panel(upper, result, axis, cost, scale)
        _panel(lower, result, axis, "memory_bytes", 2.0**-20)
        upper.set_title(title, loc="left", fontsize=10, color=INK)
        lower.set_title(f"MiB beyond {beyond}", loc="left", fontsize=10, color=INK)
        lower.set_xlabel(label, color=MUTED)
    panels[0][0].legend(frameon=False, labelcolor="linecolor", fontsize=9)
    figure.savefig(folder / "scaling.png", dpi=150, metadata={"Software": None})
