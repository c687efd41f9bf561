"""The picture of the results: six panels."""

import os
from pathlib import Path
from statistics import mean
from typing import Any

from bench.quality.results import loss, measured, step_ms, tokens
from bench.quality.runs import LONG, MAIN

# Told apart without colour: line style, marker and fill.
_STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "black", "linestyle": "-", "marker": "o"},
    "exact": {"color": "#0b4f8a", "linestyle": "--", "marker": "s"},
    "shared": {"color": "#4c9ed9", "linestyle": ":", "marker": "^"},
    "MoBA": {"color": "#d1711d", "linestyle": "-.", "marker": "x"},
    "per-query pool": {"color": "#7a7a7a", "linestyle": ":", "marker": "D", "markerfacecolor": "white"},
    "no cycle": {"color": "#a8a8a8", "linestyle": "--", "marker": "v", "markerfacecolor": "white"},
}
# Training losses are noisy: a point is the mean over this many.
_SMOOTHED = 10


def draw(data: dict[str, Any], target: Path) -> None:
    """Writes the picture, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with plt.rc_context(style):
        figure, panels = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
        for panel, axes in zip((_by_level, _against_full, _curves, _by_time, _pace, _layers), panels.flat, strict=True):
            panel(axes, data)
            if axes.get_yscale() == "log":  # numbers, not powers of ten
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
                axes.yaxis.set_minor_formatter("{x:g}")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
        machine = data["machine"]
        figure.suptitle(
            f"A video transformer trained on real clips with full attention and with VMoBA: {machine['device']}, torch "
            f"{machine['versions']['torch']}, {machine['date']}",
            fontsize=12,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".part")
        figure.savefig(draft, dpi=130, format="png")
        plt.close(figure)
    os.replace(draft, target)


def _by_level(axes: Any, data: dict[str, Any]) -> None:
    """Held-out loss at each noise level, mean over clips and seeds."""
    for variant, logs in measured(data, MAIN).items():
        axes.plot(data["levels"], _mean_losses(logs), label=variant, **_STYLES[variant])
    axes.set(title=f"Held-out loss after {_steps(data)} steps, {tokens(data, MAIN):,} tokens", yscale="log")
    axes.set(xlabel="noise level (share of noise)", ylabel="squared error of the velocity")
    axes.grid(alpha=0.3, which="both")


def _against_full(axes: Any, data: dict[str, Any]) -> None:
    """The same, relative to full attention of the same seeds."""
    rivals = {log["run"]["seed"]: log for log in measured(data, MAIN).get("full", [])}
    for variant, logs in measured(data, MAIN).items():
        pairs = [(log, rivals[log["run"]["seed"]]) for log in logs if log["run"]["seed"] in rivals]
        if pairs:
            ours, theirs = (_mean_losses(list(each)) for each in zip(*pairs, strict=True))
            against = [100 * (x / y - 1) for x, y in zip(ours, theirs, strict=True)]
            axes.plot(data["levels"], against, **_STYLES[variant])
    axes.axhspan(-1, 1, color="0.9")
    axes.set(title="The same, against full attention (grey: within 1 %)", xlabel="noise level (share of noise)")
    axes.set_ylabel("difference of held-out loss, %")
    axes.grid(alpha=0.3)


def _curves(axes: Any, data: dict[str, Any]) -> None:
    """Training loss over steps, mean over seeds."""
    for variant, logs in measured(data, MAIN).items():
        length = min(len(log["curve"]) for log in logs)
        losses = [mean(log["curve"][point][2] for log in logs) for point in range(length)]
        steps = [logs[0]["curve"][point][0] for point in range(length)]
        axes.plot(steps, _smooth(losses), label=variant, **_STYLES[variant] | {"marker": ""})
    axes.set(title="Training loss over steps", xlabel="steps", ylabel="squared error of the velocity", yscale="log")
    axes.grid(alpha=0.3, which="both")


def _by_time(axes: Any, data: dict[str, Any]) -> None:
    """Loss over GPU time, at the larger number of tokens."""
    for variant, logs in measured(data, LONG).items():
        log = logs[0]
        seconds = [point[1] for point in log["curve"]]
        axes.plot(
            seconds, _smooth([point[2] for point in log["curve"]]), alpha=0.5, **_STYLES[variant] | {"marker": ""}
        )
        held_out = [loss(each["loss"]) for each in log["held_out"]]
        label = f"{variant}, {log['step']:,} steps, held-out"
        axes.plot([each["seconds"] for each in log["held_out"]], held_out, label=label, **_STYLES[variant])
    axes.set(title=f"Loss over GPU time, {tokens(data, LONG):,} tokens (pale: training)", xlabel="s of training")
    axes.set(ylabel="squared error of the velocity", yscale="log")
    axes.grid(alpha=0.3, which="both")


def _pace(axes: Any, data: dict[str, Any]) -> None:
    """Time of a training step."""
    names, times = [], []
    for size in (MAIN, LONG):
        for variant, logs in measured(data, size).items():
            names.append(f"{variant}\n{tokens(data, size):,}")
            times.append(step_ms(logs[0]))
    bars = axes.barh(range(len(names)), times, color=["black" if "full" in name else "#4c9ed9" for name in names])
    axes.bar_label(bars, [f" {time:.0f}" for time in times])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Time of a training step, by attention and tokens", xlabel="ms")


def _layers(axes: Any, data: dict[str, Any]) -> None:
    """Density and recall of each layer."""
    for variant, trained in (("full", "trained with full attention"), ("exact", "trained with VMoBA exact")):
        for log in measured(data, MAIN).get(variant, [])[:1]:
            layers = [layer for layer in log.get("layers", []) if "recall" in layer]
            axes.plot([layer["recall"] for layer in layers], label=f"recall, {trained}", **_STYLES[variant])
            style = _STYLES[variant] | {"marker": "", "linewidth": 1}
            axes.plot([layer["density"] for layer in layers], label=f"density, {trained}", **style)
    axes.set(title="The paper's rule in each layer (1D, 2D, 3D in turn)", xlabel="layer", ylim=(0, 1))
    axes.set_ylabel("share of pairs, of attention mass")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _mean_losses(logs: list[dict[str, Any]]) -> list[float]:
    """Held-out loss at each level at the end of runs: the mean over clips and runs."""
    ends = [levels for log in logs for levels in log["held_out"][-1]["loss"].values()]
    return [mean(each) for each in zip(*ends, strict=True)]


def _smooth(values: list[float]) -> list[float]:
    return [mean(values[max(0, end - _SMOOTHED) : end]) for end in range(1, len(values) + 1)]


def _steps(data: dict[str, Any]) -> str:
    return "/".join(sorted({f"{log['step']:,}" for logs in measured(data, MAIN).values() for log in logs}))
