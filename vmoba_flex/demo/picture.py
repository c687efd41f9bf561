"""Draws what the demo did: the clip, where one query looks, and by kind of layer the blocks, its choice, the tiles."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vmoba_flex import BlockPartition
from vmoba_flex.demo import canvas
from vmoba_flex.demo.denoise import LEVEL
from vmoba_flex.demo.run import TILE, LayerResult
from vmoba_flex.demo.story import Story
from vmoba_flex.demo.tailed import TAILED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Shades and outlines that differ in greyscale and for the colour-blind.
TILE_COLOURS = ("#eeeeee", "#7fb0d6", "#0b3c66")
OWN, CHOSEN = "#ffffff", "#ffb000"

# Inches, as all lengths here. Each frame has a slot of 16 : 9, whatever its own shape.
WIDTH, MARGIN, GAP = 16.0, 0.4, 0.07
RATIO = 9 / 16
SMALL = (WIDTH - 2 * MARGIN - 7 * GAP) / 8
LARGE = 1.88
COLUMNS = (MARGIN, MARGIN + 2 * (LARGE + GAP) + 0.3, MARGIN + 6 * (LARGE + GAP) + 0.95)


def draw(story: Story, path: str | Path) -> None:
    """Writes the picture to `path` as a PNG, 1760 pixels wide."""
    from matplotlib.figure import Figure

    strip_step, kind_step = SMALL * RATIO + 0.42, 2 * LARGE * RATIO + GAP + 0.72
    strips, top = _strips(story), 1.72
    tall = top + len(strips) * strip_step + 3 * kind_step + 1.1
    figure = Figure(figsize=(WIDTH, tall), dpi=110, facecolor="white")

    title = "VMoBA: every query chooses the blocks of the video that it attends"
    canvas.text(figure, MARGIN, 0.5, title, size=20, weight="bold")
    caption = (
        "VMoBA cuts the video into blocks; a query attends its own block and the blocks whose mean key matches it best "
        f"({story.rule}).\nIt skips the rest, or attends it by the means of cells (a tail). Layers take turns at "
        "cutting in time (1D), in space (2D) and in both (3D): what one layer misses is in reach of the next."
    )
    canvas.text(figure, MARGIN, 0.7, caption, size=11.5, va="top", linespacing=1.5)
    for title, images in strips.items():
        canvas.text(figure, MARGIN, top - 0.08, title, weight="bold")
        for column, t in enumerate(story.latent_frames(8)):
            axes = _frame_axes(figure, story, t, MARGIN + column * (SMALL + GAP), top, SMALL)
            canvas.show(axes, images[t], story.grid)
        top += strip_step
    top += 0.12
    for index in range(len(story.results)):
        _draw_kind(figure, story, index, top)
        top += kind_step
    _draw_legend(figure, story, top - 0.25)
    figure.savefig(path, format="png")


def _strips(story: Story) -> dict[str, list[np.ndarray]]:
    """The rows of frames, by title: an image for each latent frame."""
    frames, height, width = story.grid
    tokens = f"{frames} x {height} x {width} = {frames * height * width:,}"
    clip = "Frames that the model was not trained on" if story.held_out else "The clip"
    names = ("full", "sparse", "tail", "noisy")
    full, sparse, tail, noisy = (f"{story.psnr(name, 'clip'):.1f} dB to the clip" for name in names)
    plain = {
        f"{clip}, as {tokens} tokens. The square marks one of them: the query that we follow.": "clip",
        f"With noise of level {LEVEL:g}: {noisy} (dB of peak signal-to-noise ratio: more is nearer)": "noisy",
        f"Denoised by the model under full attention: {full}": "full",
        f"Denoised by the model under VMoBA: {sparse}, {story.psnr('sparse', 'full'):.1f} dB to full attention's": (
            "sparse"
        ),
        f"The same with a tail in {' and '.join(TAILED)} layers, at the same density: {tail}, "
        f"{story.psnr('tail', 'full'):.1f} dB to full attention's": "tail",
    }
    strips = {title: [canvas.plain(frame) for frame in story.videos[name]] for title, name in plain.items()}
    heat = torch.stack([each / each.max() for each in story.attention]).mean(0).view(story.grid)
    title = "Where that query looks under full attention, in the three layers below together (brighter: more)"
    strips[title] = [canvas.glowing(*pair) for pair in zip(story.frames, heat, strict=True)]
    return strips


def _draw_kind(figure: "Figure", story: Story, index: int, top: float) -> None:
    """One row: the partition, the blocks that the query chose, the tile map."""
    result, attention = story.results[index], story.attention[index]
    partition = result.partition
    ids = partition.block_ids().view(story.grid)
    selected = result.selection[story.head, story.row]
    kept = attention[selected[ids.flatten()]].sum().item()
    step_down = LARGE * RATIO + GAP

    canvas.text(figure, COLUMNS[0], top - 0.12, f"{result.kind} layer", size=14, weight="bold")
    canvas.text(figure, COLUMNS[0] + 0.98, top - 0.12, _cut_in_words(result))
    choice = f"{int(selected.sum())} of {partition.num_blocks} blocks, which hold {kept:.0%} of its full attention"
    coarse = None if result.tail is None else story.as_cells(result)
    rest = "the rest is skipped" if coarse is None else "the rest by cells"
    canvas.text(figure, COLUMNS[1], top - 0.12, f"The query attends {choice}; {rest}")
    shares = f"recall {result.recall:.2f}" + (f", overlap {result.overlap:.2f}" if result.tail is not None else "")
    measures = f"density {result.density:.2f}, tiles run {result.tile_density:.2f}\n{shares}"
    canvas.text(figure, COLUMNS[2] - 0.3, top - 0.17, measures, size=10, linespacing=1.2)
    for index, t in enumerate(story.latent_frames(4)):
        left, down = COLUMNS[0] + index % 2 * (LARGE + GAP), top + index // 2 * step_down
        axes = _frame_axes(figure, story, t, left, down, LARGE, mark=False)
        canvas.show(axes, canvas.tinted(story.frames[t], ids[t], partition.num_blocks), story.grid)
        for block, corner, size in _cells(ids[t], partition):
            canvas.outline(axes, corner, size, "white", 0.8)
            # Below the middle, to leave room for the frame's own number.
            place = (corner[0] + 0.5 * size[0], corner[1] + 0.62 * size[1])
            canvas.label(axes, *place, str(block), 9, ha="center", va="center")
    for index, t in enumerate(story.latent_frames(8)):
        left, down = COLUMNS[1] + index % 4 * (LARGE + GAP), top + index // 4 * step_down
        axes = _frame_axes(figure, story, t, left, down, LARGE)
        frame, keep = story.frames[t], selected[ids[t]]
        seen = canvas.dimmed(frame, keep) if coarse is None else canvas.coarse(frame, keep, coarse[t])
        canvas.show(axes, seen, story.grid)
        for block, corner, size in _cells(ids[t], partition):
            if selected[block]:
                own = block == ids[story.token]
                canvas.outline(axes, corner, size, OWN if own else CHOSEN, 2.4 if own else 1.8, inset=0.25)
    _draw_tiles(figure, story, result, COLUMNS[2], top, 2 * step_down - GAP)


def _cut_in_words(result: LayerResult) -> str:
    bt, bh, bw = result.partition.block
    count, frames = result.partition.num_blocks, f"{bt} frame" + "s" * (bt > 1)
    return {
        "1D": f"{count} slabs in time, {frames} each",
        "2D": f"{count} windows in space, {bh} x {bw}",
        "3D": f"{count} cubes, {frames} x {bh} x {bw}",
    }[result.kind]


def _cells(ids: Tensor, partition: BlockPartition) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """The blocks of one frame: id, corner (x, y) and size (w, h) in tokens."""
    (height, width), (_, bh, bw) = ids.shape, partition.block
    corners = [(x, y) for y in range(0, height, bh) for x in range(0, width, bw)]
    return [(int(ids[y, x]), (x, y), (min(bw, width - x), min(bh, height - y))) for x, y in corners]


def _draw_tiles(figure: "Figure", story: Story, result: LayerResult, left: float, top: float, size: float) -> None:
    """The tile map of one head, the blocks' colours along both axes, the query's row marked."""
    from matplotlib.colors import ListedColormap

    tiles = result.tiles[story.head].numpy()
    count = len(tiles)
    axes = canvas.axes(figure, left, top, size, size)
    axes.imshow(tiles, cmap=ListedColormap(TILE_COLOURS), vmin=0, vmax=2, extent=(0, count, count, 0))
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"keys: {count} tiles of {TILE}, sorted by block", fontsize=9, labelpad=3)
    axes.set_ylabel(f"queries: {count} tiles", fontsize=9, labelpad=3)
    axes.yaxis.set_label_position("right")
    order = result.partition.block_ids().sort(stable=True)
    colours = canvas.palette(result.partition.num_blocks)[order.values]
    canvas.axes(figure, left, top - 0.1, size, 0.1).imshow(colours[None], aspect="auto")
    canvas.axes(figure, left - 0.1, top, 0.1, size).imshow(colours[:, None], aspect="auto")
    for strip in figure.axes[-2:]:
        strip.set_axis_off()
    place = (order.indices == story.row).nonzero().item() / TILE
    arrow = {"arrowstyle": "-|>", "color": "black"}
    axes.annotate("", (-0.05 * count, place), (-0.14 * count, place), arrowprops=arrow, annotation_clip=False)
    axes.text(-0.18 * count, place, "the query", rotation=90, ha="center", va="center", fontsize=9)


def _draw_legend(figure: "Figure", story: Story, top: float) -> None:
    from matplotlib.patches import Patch

    names = ("tile skipped", "tile runs, masked", "tile runs in full")
    handles = [
        Patch(fc="#555555", ec=colour, lw=2, label=name, path_effects=canvas.stroke(4))
        for colour, name in ((OWN, "the query's own block"), (CHOSEN, "a block that it chose"))
    ]
    handles.append(Patch(fc="#6d7f57", ec="#555555", label="skipped, by the means of cells"))
    handles += [Patch(fc=colour, ec="#555555", label=name) for colour, name in zip(TILE_COLOURS, names, strict=True)]
    axes = canvas.axes(figure, MARGIN, top, WIDTH - 2 * MARGIN, 0.25)
    axes.set_axis_off()
    axes.legend(handles=handles, loc="center left", ncols=6, frameon=False, fontsize=10.5, borderaxespad=0, borderpad=0)
    layers = ", ".join(str(result.layer) for result in story.results)
    notes = (
        "Density: share of (query, block) pairs attended. Tiles run: share of the 128 x 128 tiles that FlexAttention "
        "computes; a tile runs as soon as one of its 128 queries wants it.\n"
        "Recall: share of full attention on attended keys. Overlap: share of attention on the same keys as full "
        "attention's, with the tail.\n"
        f"They are means over {len(story.results[0].tiles)} heads; the rest is from head {story.head}. Query and "
        f"key are the trained model's in its layers {layers}, on the noisy video. {story.credit}"
    )
    canvas.text(figure, MARGIN, top + 0.33, notes, size=9.5, color="#444444", va="top", linespacing=1.4)


def _frame_axes(
    figure: "Figure", story: Story, t: int, left: float, top: float, size: float, mark: bool = True
) -> "Axes":
    """Axes in token units for latent frame `t`, with its number, and the query's mark where it lies."""
    _, height, width = story.grid
    axes = canvas.axes(figure, left, top, size, size * RATIO)
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False, aspect="equal")
    axes.set_axis_off()
    canvas.label(axes, 0.012 * width, 0.02 * height, f"t = {t}", 7.5, ha="left", va="top")
    if mark and t == story.token[0]:
        place = (story.token[2] + 0.5, story.token[1] + 0.5)
        axes.plot(*place, "s", ms=8, mfc="none", mec="white", mew=2, zorder=5, path_effects=canvas.stroke(4))
    return axes
