"""Paired runs -> one PNG: some frames of the pair that differs most, and PSNR frame by frame."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vmoba_flex.fidelity.comparison import Run
from vmoba_flex.fidelity.movie import GAIN, difference, frames_in_step

_SHOWN = 5
_COLOURS = ("#0b3c66", "#d95f02", "#3f9f8f", "#7b5ea7", "#8c6d31")


def draw(pairs: Sequence[Sequence[Run]], path: Path) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure

    pair = min(pairs, key=lambda runs: min(run.near.psnr for run in runs if run.near is not None))
    total, tall, wide, _ = pair[0].denoise.shape
    shown = torch.linspace(0, total - 1, min(_SHOWN, total)).round().int().tolist()
    images = {i: frames for i, frames in enumerate(frames_in_step(pair)) if i in shown}
    rows = [(run.name, [images[i][column] for i in shown]) for column, run in enumerate(pair)]
    rows += [
        (f"{run.name}\ndifference x {GAIN}", [difference(images[i][column], images[i][0]) for i in shown])
        for column, run in enumerate(pair[1:], start=1)
    ]
    size = 2.6
    row = size * tall / wide + 0.08
    figure = Figure(figsize=(1.6 + size * len(shown), 0.9 + row * len(rows) + 2.6), dpi=110, layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, len(shown), height_ratios=[row] * len(rows) + [2.4])
    for y, (name, frames) in enumerate(rows):
        for x, frame in enumerate(frames):
            axes = figure.add_subplot(grid[y, x])
            axes.imshow(frame.numpy())
            axes.set(xticks=[], yticks=[])
            if x == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            if y == 0:
                axes.set_title(f"frame {shown[x]}", fontsize=9)
    axes = figure.add_subplot(grid[len(rows), :])
    for i, run in enumerate(pair[1:]):
        if run.near is not None:
            label = f"{run.name}: {run.near.psnr:.2f} dB"
            axes.plot(run.near.frame_psnr, ".-", color=_COLOURS[i % len(_COLOURS)], label=label)
    axes.set(xlabel="frame", ylabel="PSNR to full attention, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(f"{pair[0].prompt[:90]}, seed {pair[0].seed}: of all runs, the one that differs most", fontsize=11)
    figure.savefig(path, format="png")
