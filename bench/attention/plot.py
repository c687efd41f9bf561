"""Draws speed-up over the fastest dense attention, against density and against tokens, from a file of results."""

from pathlib import Path
from typing import Any

from bench.attention.report import AttentionReport
from bench.common.report import Row

_MODES = {"forward": "forward", "forward_backward": "forward + backward"}
# Told apart without colour: line style, marker and fill.
_STYLES: dict[tuple[str, str], dict[str, Any]] = {
    ("packed", "forward"): {"color": "#0b4f8a", "linestyle": "-", "marker": "o"},
    ("packed", "forward_backward"): {"color": "#d1711d", "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
    ("auto", "forward"): {"color": "#0b4f8a", "linestyle": ":", "marker": "x"},
    ("auto", "forward_backward"): {"color": "#d1711d", "linestyle": ":", "marker": "+"},
}


def draw(source: Path, target: Path) -> None:
    """Reads the rows of ``source`` and writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    report = AttentionReport.load(source)
    rows = [row for row in report.rows.values() if row["blocks"] and row["inputs"] == "random" and not row["compiled"]]
    rows = [row for row in rows if row["rule"].startswith("TopK(") and row["kind"] == "2D" and "stages" not in row]
    few = min((row["heads"] for row in rows), default=0)
    rows = [row for row in rows if row["heads"] == few]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")

    of_density = [row for row in rows if "density" in row["sections"] and row["attention"] == "packed"]
    tokens = of_density[0]["tokens"] if of_density else 0
    blocks = rows[0]["blocks"] if rows else 0
    same_shape = [row for row in rows if row["tokens"] == tokens and row["attention"] == "packed"]
    seen = _lines(left, same_shape, "density", "packed")
    densities = sorted({row["density"] for row in same_shape if "density" in row})
    if densities:
        fine = [densities[0] * (densities[-1] / densities[0]) ** (i / 50) for i in range(51)]
        left.plot(fine, [1 / x for x in fine], color="black", linewidth=1, linestyle="-.", label="1 / density")
    left.set(title=f"{tokens:,} tokens, {blocks} blocks", xlabel="density (share of the pairs that is attended)")
    ticks = [x for x in (0.05, 0.1, 0.2, 0.3, 0.5) if densities and densities[0] / 1.3 <= x <= densities[-1] * 1.3]
    _logarithmic(left, ticks, [f"{x:g}" for x in ticks], FixedLocator, FixedFormatter, NullLocator)

    of_tokens = [row for row in rows if "tokens" in row["sections"]]
    for attention in ("packed", "auto"):
        seen |= _lines(right, of_tokens, "tokens", attention)
    chosen = [row["density"] for row in of_tokens if "density" in row]
    if chosen:
        density = sum(chosen) / len(chosen)
        right.axhline(1 / density, color="black", linewidth=1, linestyle="-.", label="1 / density")
        right.set_title(f"density {density:.2f}, {blocks} blocks")
    right.set_xlabel("tokens")
    sizes = sorted({row["tokens"] for row in of_tokens})
    _logarithmic(right, sizes, [f"{x / 1000:.0f}K" for x in sizes], FixedLocator, FixedFormatter, NullLocator)
    for axes in (left, right):
        axes.set_ylabel("speed-up over the fastest dense attention")
        axes.axhline(1, color="black", linewidth=1)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    run = report.data["runs"][0]
    head_dim, dtype = (rows[0]["head_dim"], rows[0]["dtype"]) if rows else ("?", "?")
    figure.suptitle(
        f"VMoBA attention on {run['device']}, torch {run['versions']['torch']}: {few} heads, head dim {head_dim}, "
        f"{dtype}, random inputs\nmeasured against: {', '.join(sorted(seen)) or 'nothing'}",
        fontsize=11,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _lines(axes: Any, rows: list[Row], x: str, attention: str) -> set[str]:
    """Two lines of the fastest backend at each point; the dense attention they are compared with."""
    seen = set()
    for mode, label in _MODES.items():
        points: dict[float, float] = {}
        for row in rows:
            if row["attention"] == attention and f"{mode}_speed_up" in row and x in row:
                points[row[x]] = max(points.get(row[x], 0.0), row[f"{mode}_speed_up"])
                seen.add(row[f"{mode}_fastest_dense"])
        if points:
            axes.plot(
                *zip(*sorted(points.items()), strict=True), label=f"{attention}, {label}", **_STYLES[attention, mode]
            )
    return seen


def _logarithmic(axes: Any, ticks: list[Any], labels: list[str], locator: Any, formatter: Any, none: Any) -> None:
    """Logarithmic axes with plain numbers on them."""
    axes.set(xscale="log", yscale="log")
    values = [0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20]
    low, high = axes.get_ylim()
    values = [value for value in values if low <= value <= high]
    for axis, places, names in (
        (axes.xaxis, ticks, labels),
        (axes.yaxis, values, [f"{value:g}x" for value in values]),
    ):
        axis.set_major_locator(locator(places))
        axis.set_major_formatter(formatter(names))
        axis.set_minor_locator(none())
