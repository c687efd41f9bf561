"""The picture of fidelity against the speed of whole runs, the paper's setting among them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench.quality.denoise_report import DENOISE, DenoiseReport, good, values
from bench.quality.denoise_speed import Times, variant_of
from bench.quality.fidelity import STEPS
from bench.quality.variants import CYCLES, PLAIN, Variant

_PAPER = PLAIN.name, 0.25
"""The paper's inference: a quarter of the blocks by their mean keys, after a quarter of the steps."""

# What is remembered, colour and marker; told apart without colour by the marker and its fill.
_KINDS = {
    "chosen by a gate": ("#7a7a7a", "o"),
    "remembered": ("#0b4f8a", "s"),
    "remembered, dense steps between": ("#d1711d", "^"),
    "density falls": ("#2f8f6f", "D"),
}


class Point(NamedTuple):
    """An attention at a density: how fast and how faithful.

    Attributes:
        name: of the attention, with its density.
        blocks: a key of ``CYCLES``.
        variant: the attention.
        speed_up: of a whole run.
        fidelity: of each window, noise and model.
        paper: whether it is the paper's setting.
    """

    name: str
    blocks: str
    variant: Variant
    speed_up: float
    fidelity: list[float]
    paper: bool


def points(report: DenoiseReport, times: Times) -> Iterator[Point]:
    """All attentions that could run and whose times are known."""
    for (attention, blocks, asked), rows in good(report.data, DENOISE).items():
        variant = variant_of(rows[0])
        speed_up = None if variant.gate == "exact" else times.speed_up(variant, asked, STEPS)
        if speed_up is not None:
            paper = (attention, asked) == _PAPER
            yield Point(f"{attention}, {asked:g}", blocks, variant, speed_up, values(rows), paper)


def draw(source: Path, times: Path, target: Path) -> None:
    """Reads results of both studies and writes the picture, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    report, known = DenoiseReport.load(source), Times(json.loads(times.read_text()))
    found = list(points(report, known))
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    titles = {"cycle": "slabs, windows and cubes in turn", "cubes": "cubes in all layers"}
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, len(CYCLES), figsize=(12, 6.6), layout="constrained", sharey=True)
        for axes, blocks in zip(panels, CYCLES, strict=True):
            _panel(axes, [point for point in found if point.blocks == blocks])
            axes.set(title=titles[blocks], xlabel="speed of a whole run, times full attention")
        panels[0].set_ylabel("PSNR to full attention's video, dB (line: worst to best)")
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
        machine, other = report.data["runs"][0], json.loads(times.read_text())["runs"][0]
        figure.suptitle(
            f"Whole denoises of a small model ({machine['device']}, {machine['date']}) against the time of the same "
            f"steps\nin {known.model} at {known.tokens:,} tokens ({other['device']}, {other['date']})",
            fontsize=11,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".part")
        figure.savefig(draft, dpi=130, format="png")
        plt.close(figure)
    os.replace(draft, target)


def _panel(axes: Any, found: list[Point]) -> None:
    """Each point, and the names of those that no other beats in both speed and fidelity."""
    for kind, (colour, marker) in _KINDS.items():
        for dispatch, fill in (("packed", colour), ("shared", "white")):
            here = [each for each in found if _kind(each.variant) == kind and each.variant.dispatch == dispatch]
            if here:
                speeds, fidelities = [each.speed_up for each in here], [mean(each.fidelity) for each in here]
                style = {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": "none"}
                axes.plot(speeds, fidelities, label=f"{kind}, {dispatch}", **style)
                lows, highs = ([pick(each.fidelity) for each in here] for pick in (min, max))
                axes.vlines(speeds, lows, highs, color=colour, linewidth=0.6, alpha=0.4)
    for point in found:
        place = point.speed_up, mean(point.fidelity)
        if point.paper:
            axes.plot(*place, "*", color="black", markersize=16, label="the paper's setting")
        elif not any(each.speed_up > place[0] and mean(each.fidelity) > place[1] for each in found):
            name = axes.annotate(point.name, place, (4, 4), textcoords="offset points", fontsize=6.5, rotation=20)
            name.set_in_layout(False)
    axes.grid(alpha=0.3)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.3 * (high - low))  # for the names


def _kind(variant: Variant) -> str:
    if variant.falls:
        return "density falls"
    if variant.every:
        return "remembered, dense steps between"
    return "remembered" if variant.remembers else "chosen by a gate"
