"""The picture of the study of whole denoises: fidelity against density, and what each attention gains over plain."""

import os
from pathlib import Path
from statistics import mean
from typing import Any

from bench.common.report import Row
from bench.quality.denoise_report import DENOISE, DenoiseReport, gains, good, values
from bench.quality.variants import CYCLES

# Told apart without colour: line style and marker.
_STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "#0b4f8a", "linestyle": "-", "marker": "o"},
    "tail": {"color": "#d1711d", "linestyle": "--", "marker": "s"},
    "shared": {"color": "#7a7a7a", "linestyle": ":", "marker": "^"},
    "shared, tail": {"color": "#c9a227", "linestyle": "-.", "marker": "x"},
    "tail, remembered": {"color": "#2f8f6f", "linestyle": "-", "marker": "D", "markerfacecolor": "white"},
    "shared, tail, remembered": {"color": "#8a4fa0", "linestyle": "--", "marker": "v", "markerfacecolor": "white"},
}
_TITLES = {"cycle": "slabs, windows and cubes in turn", "cubes": "cubes in all layers"}


def draw(source: Path, target: Path) -> None:
    """Reads the rows of ``source`` and writes the picture, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    report = DenoiseReport.load(source)
    found = good(report.data, DENOISE)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with plt.rc_context(style):
        figure, panels = plt.subplots(2, len(CYCLES), figsize=(11, 7.6), layout="constrained", sharey="row")
        for (above, below), blocks in zip(panels.T, CYCLES, strict=True):
            for attention in _STYLES:
                rows = {key[2]: each for key, each in found.items() if key[:2] == (attention, blocks)}
                _band(above, attention, rows, {asked: values(each) for asked, each in rows.items()})
                if attention != "plain":
                    plain = {asked: found.get(("plain", blocks, asked), []) for asked in rows}
                    _band(below, attention, rows, {asked: gains(rows[asked], plain[asked]) for asked in rows})
            above.set(title=_TITLES[blocks], ylabel="PSNR to full attention's video, dB")
            below.set(xlabel="density (share of the pairs that is attended)", ylabel="over plain, dB")
            below.axhline(0, color="black", linewidth=1)
            for axes in (above, below):
                _densities(axes)
        machine = report.data["runs"][0]
        figure.suptitle(
            "Whole denoises without training, weights of full attention; bands: from the worst to the best window and "
            f"noise\n{machine['device']}, torch {machine['versions']['torch']}, {machine['date']}",
            fontsize=11,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".part")
        figure.savefig(draft, dpi=130, format="png")
        plt.close(figure)
    os.replace(draft, target)


def _band(axes: Any, attention: str, rows: dict[float, list[Row]], samples: dict[float, list[float]]) -> None:
    """A line through the means over a band from least to most, at the densities that were measured."""
    points = sorted((mean(row["density"] for row in rows[asked]), each) for asked, each in samples.items() if each)
    if not points:
        return
    densities, each = zip(*points, strict=True)
    style = _STYLES[attention]
    axes.plot(densities, [mean(x) for x in each], label=attention, **style)
    axes.fill_between(densities, [min(x) for x in each], [max(x) for x in each], color=style["color"], alpha=0.12)


def _densities(axes: Any) -> None:
    """A logarithmic axis with plain numbers, a grid and a legend."""
    ticks = (0.03, 0.06, 0.125, 0.25)
    axes.set_xscale("log")
    axes.autoscale()  # ticks would widen the limits, and lines on the old scale have narrow ones
    limits = axes.get_xlim()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(limits)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
