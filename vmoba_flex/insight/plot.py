"""Pictures of attention and of what was chosen; shades and shapes differ in greyscale."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vmoba_flex.config import KINDS, VMoBAConfig
from vmoba_flex.insight.crossover import Timing, break_even
from vmoba_flex.insight.masses import overlap_of, true_mass
from vmoba_flex.insight.measure import HeadReport, check_sample, choose, layer_of, sample_rows
from vmoba_flex.insight.records import Record
from vmoba_flex.rules import Rule
from vmoba_flex.tail import Tail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHADES = "Greys"
_MARKERS = dict(zip(KINDS, ("o", "s", "^"), strict=True))
_COLOURS = dict(zip(KINDS, ("#0b3c66", "#d95f02", "#3f9f8f"), strict=True))
_CHOSEN, _OWN = "#d95f02", "#0b3c66"


def plot_inspection(reports: Sequence[HeadReport], path: Path) -> None:
    """Recall against density, a mark for each head, and their means by layer."""
    figure = _figure(12, 5)
    (heads, layers), tailed = figure.subplots(1, 2), _has_tail(reports)
    for kind in KINDS:
        here = [report for report in reports if report.kind == kind]
        if not here:
            continue
        x = [report.density for report in here]
        style: dict[str, Any] = {"marker": _MARKERS[kind], "color": _COLOURS[kind], "linestyle": "none"}
        heads.plot(x, [report.recall for report in here], label=f"{kind}: chosen", **style)
        best = [report.best_recall for report in here]
        heads.plot(x, best, label=f"{kind}: best at that density", markerfacecolor="none", **style)
        if tailed:
            overlap = [report.overlap for report in here]
            heads.plot(x, overlap, label=f"{kind}: with its tail (overlap)", alpha=0.4, **style)
    heads.set(title="What each head keeps", xlabel="density (share of pairs)", ylabel="recall (share of attention)")
    names = ("density", "tile_density", "recall", "best_recall", *["overlap"] * tailed)
    numbers = sorted({(report.model, report.layer) for report in reports})
    for name, line, marker in zip(names, ("-", "--", "-", ":", "-."), "osD^v", strict=False):
        values = [mean(getattr(r, name) for r in reports if (r.model, r.layer) == number) for number in numbers]
        layers.plot(range(len(numbers)), values, line, marker=marker, label=name.replace("_", " "))
    layers.set_xticks(range(len(numbers)), _layer_names(numbers))
    layers.set(title="Mean over heads and steps", xlabel="layer", ylabel="share")
    for axes in (heads, layers):
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="best", framealpha=0.7)
    heads.set_xlim(0, 1.03)
    figure.savefig(path, format="png")


def plot_mass(record: Record, path: Path, *, rows: int = 1024, seed: int = 0) -> None:
    """Mean attention mass of the queries of each block on each block, over ``rows`` sampled queries, head by head."""
    check_sample(rows, seed)
    partition = record.partition
    sample = sample_rows(partition, rows, seed).to(record.query.device)
    mass = true_mass(record, partition, sample)
    block = partition.block_ids(mass.device)[sample]
    blocks = partition.num_blocks
    sums = torch.zeros(len(mass), blocks, blocks, device=mass.device).index_add(1, block, mass)
    means = (100 * sums / block.bincount(minlength=blocks)[:, None]).cpu()  # NaN where no query was drawn
    figure = _figure(3.6 * len(means) + 1.2, 4.4)
    panels = figure.subplots(1, len(means), squeeze=False)[0]
    most, image = float(means.nan_to_num().max()), None
    for axes, head, values in zip(panels, record.heads, means, strict=True):
        image = axes.imshow(values.numpy(), cmap=_SHADES, vmin=0, vmax=most, interpolation="nearest")
        axes.set(title=f"head {head}", xlabel="block of the key")
    panels[0].set_ylabel("block of the query")
    assert image is not None  # a record has a head
    figure.colorbar(image, ax=list(panels), label="mean attention mass (%)")
    figure.suptitle(f"Attention mass by block: {_where(record)}, {_blocks_in_words(record.kind, partition)}")
    figure.savefig(path, format="png")


def plot_choice(
    record: Record,
    rule: Rule | VMoBAConfig,
    path: Path,
    *,
    token: tuple[int, int, int],
    head: int | None = None,
    tail: Tail | None = None,
) -> None:
    """What one query chose over the frames, on top of where it would look under full attention.

    A config brings its own tail; with one, the title says what it adds.

    Raises:
        ValueError: if ``token`` lies outside the grid, or the record has no such head.
    """
    kind, partition, plain, of_config = layer_of(record, rule)
    frames, height, width = partition.grid
    if any(not 0 <= place < size for place, size in zip(token, partition.grid, strict=True)):
        raise ValueError(f"query must lie in the grid {frames}x{height}x{width}, got {token}")
    head = record.heads[0] if head is None else head
    if head not in record.heads:
        raise ValueError(f"head must be one of the recorded {list(record.heads)}, got {head}")
    i, place = record.heads.index(head), (token[0] * height + token[1]) * width + token[2]
    query, key = record.query[i, partition.prefix + place].float(), record.key[i].float()
    logits = key @ query * len(query) ** -0.5
    valid = record.key_valid()
    attention = (logits if valid is None else logits.masked_fill(~valid, -torch.inf)).softmax(0)
    attention = attention[partition.prefix : partition.prefix + partition.num_video_tokens].cpu()
    selection = choose(record, partition, plain)
    tail, caught = of_config or tail, ""
    if tail is not None:
        row = torch.tensor([place], device=selection.device)
        overlap = overlap_of(record, partition, row, selection[:, row], tail)[i, 0]
        caught = f"; with its tail, {overlap:.0%} of its weight as in full attention"
    chosen = selection[i, place].cpu()
    ids = partition.block_ids()
    kept = attention[chosen[ids]].sum() / attention.sum()
    shown = np.linspace(0, frames - 1, min(frames, 8)).round().astype(int)
    shown[np.abs(shown - token[0]).argmin()] = token[0]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = _figure(3.2 * columns + 1.2, (3.2 * height / width + 0.5) * lines + 1.2)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    heat, image = (100 * attention / attention.max()).view(partition.grid), None
    for axes, t in zip(panels, shown, strict=False):
        image = axes.imshow(heat[t].sqrt().numpy(), cmap=_SHADES, vmin=0, vmax=10, interpolation="nearest")
        cells = ids.view(partition.grid)[t]
        _outline(axes, chosen[cells].numpy(), _CHOSEN, 2.5, "-")
        _outline(axes, (cells == ids[place]).numpy(), _OWN, 1.5, "--")
        if t == token[0]:
            axes.plot(token[2], token[1], "*", color=_OWN, markeredgecolor="white", markersize=14)
        axes.set_title(f"frame {t}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in panels[len(shown) :]:
        axes.axis("off")
    assert image is not None  # a grid has a frame
    bar = figure.colorbar(image, ax=list(panels), label="full attention (% of its largest), square-root scale")
    bar.set_ticks([0, 2, 5, 7.0711, 10], labels=["0", "4", "25", "50", "100"])
    figure.suptitle(
        f"Query {token} (star): {_where(record)}, head {head}\n{int(chosen.sum())} of "
        f"{_blocks_in_words(kind, partition)} chosen (solid), its own among them (dashed): {kept:.0%} of its attention "
        f"on the video{caught}",
        fontsize=10,
    )
    figure.savefig(path, format="png")


def plot_density(reports: Sequence[HeadReport], path: Path) -> None:
    """Density, recall and, where a tail adds to it, overlap over layers and steps, means over heads."""
    layers = sorted({(report.model, report.layer) for report in reports})
    steps = sorted({report.step for report in reports})
    names = ("density", "recall", "overlap") if _has_tail(reports) else ("density", "recall")
    figure = _figure(len(names) * max(4.5, 0.75 * len(steps) + 2.5), max(3.2, 0.32 * len(layers) + 1.8))
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        values = np.full((len(layers), len(steps)), np.nan)
        for y, layer in enumerate(layers):
            for x, step in enumerate(steps):
                here = [getattr(r, name) for r in reports if (r.model, r.layer) == layer and r.step == step]
                if here:
                    values[y, x] = mean(here)
                    shade = "white" if values[y, x] > 0.55 else "black"
                    axes.text(x, y, f"{values[y, x]:.2f}", ha="center", va="center", color=shade, fontsize=8)
        image = axes.imshow(values, cmap=_SHADES, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(steps)), steps)
        axes.set_yticks(range(len(layers)), _layer_names(layers))
        what = {"density": "pairs", "recall": "attention", "overlap": "weight as in full attention"}[name]
        axes.set(title=f"{name.capitalize()}, mean over heads", xlabel="denoising step", ylabel="layer")
        figure.colorbar(image, ax=axes, label=f"{name} (share of {what})")
    figure.savefig(path, format="png")


def plot_crossover(timings: Sequence[Timing], path: Path, device: str) -> None:
    """Times of full and sparse attention over tokens."""
    figure = _figure(11, 4.6)
    for axes, backward in zip(figure.subplots(1, 2), (False, True), strict=True):
        here = sorted((one for one in timings if one.backward == backward), key=lambda one: one.tokens)
        tokens = [one.tokens for one in here]
        axes.loglog(tokens, [1e3 * one.dense for one in here], "o-", color=_OWN, label="full attention")
        label = f"sparse, density {here[-1].density:.2f}"
        axes.loglog(tokens, [1e3 * one.sparse for one in here], "s--", color=_CHOSEN, label=label)
        even = break_even(here)
        if even is not None:
            axes.axvline(even, color="grey", linestyle=":", label=f"sparse wins from {even:,.0f} tokens")
        axes.set(title="Forward + backward" if backward else "Forward", xlabel="tokens", ylabel="time of a call (ms)")
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(device)
    figure.savefig(path, format="png")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")


def _outline(axes: Any, inside: np.ndarray, colour: str, width: float, style: str) -> None:
    """Draws the border of what is inside, between cells."""
    padded = np.pad(inside, 1)
    y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    axes.hlines(y - 0.5, x - 0.5, x + 0.5, color=colour, linewidth=width, linestyle=style)
    y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    axes.vlines(x - 0.5, y - 0.5, y + 0.5, color=colour, linewidth=width, linestyle=style)


def _has_tail(reports: Sequence[HeadReport]) -> bool:
    """Whether a tail changes what any head keeps: without one, overlap is recall."""
    return any(report.overlap != report.recall for report in reports)


def _where(record: Record) -> str:
    return f"layer {record.layer}, step {record.step}"


def _blocks_in_words(kind: str, partition: Any) -> str:
    return f"{partition.num_blocks} {kind} blocks of {'x'.join(map(str, partition.block))} tokens"


def _layer_names(layers: list[tuple[str, int]]) -> list[str]:
    several = len({model for model, _ in layers}) > 1
    return [f"{model} {layer}" if several else str(layer) for model, layer in layers]
