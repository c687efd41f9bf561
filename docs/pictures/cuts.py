"""How a grid is cut, and its tokens sorted."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vmoba_flex import BlockPartition

# Neighbouring blocks differ; black numbers stay readable on all of them.
GREYS = ("#ffffff", "#b5b5b5", "#dcdcdc", "#8f8f8f")
QUERY = (1, 2, 5)  # the token whose own block is marked


def draw_blocks() -> Figure:
    """One grid, cut in the three ways, frame by frame."""
    grid = (4, 5, 7)
    kinds = {
        "temporal (1D)\nslabs of 2 frames": BlockPartition.temporal(grid, 2),
        "spatial (2D)\nwindows of 2 x 3,\nthrough all frames": BlockPartition.spatial(grid, (2, 3)),
        "spatio-temporal (3D)\ncubes of 2 x 3 x 4": BlockPartition.spatiotemporal(grid, (2, 3, 4)),
    }
    figure = Figure(figsize=(8.4, 4.7), layout="constrained")
    axes = figure.subplots(len(kinds), grid[0])
    for row, (name, partition) in zip(axes, kinds.items(), strict=True):
        ids = partition.block_ids().view(grid)
        own = int(ids[QUERY])
        for t, target in enumerate(row):
            _frame(target, ids[t], partition, own)
            if t == QUERY[0]:
                target.add_patch(Rectangle((QUERY[2] + 0.2, QUERY[1] + 0.2), 0.6, 0.6, color="black", zorder=3))
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    for t, target in enumerate(axes[0]):
        target.set_title(f"frame {t}", fontsize=10)
    words = "A grid of 4 frames x 5 x 7 tokens; numbers are block ids. Black: a query. Thick frame: its own block."
    figure.supxlabel(words, fontsize=9.5)
    return figure


def _frame(target: Axes, ids: torch.Tensor, partition: BlockPartition, own: int) -> None:
    height, width = ids.shape
    _, cells_y, cells_x = partition.cells
    for block in ids.unique().tolist():
        y, x = (ids == block).nonzero().T
        corner, size = (int(x.min()), int(y.min())), (int(x.max() - x.min()) + 1, int(y.max() - y.min()) + 1)
        t, cell = divmod(block, cells_y * cells_x)
        grey = GREYS[(cell // cells_x % 2 * 2 + cell % cells_x % 2 + t) % 4]
        target.add_patch(Rectangle(corner, *size, facecolor=grey, edgecolor="black", linewidth=1))
        if block == own:
            inner = (corner[0] + 0.1, corner[1] + 0.1), size[0] - 0.2, size[1] - 0.2
            target.add_patch(Rectangle(*inner, fill=False, edgecolor="black", linewidth=3, zorder=2))
        middle = corner[0] + size[0] / 2, corner[1] + size[1] / 2
        target.text(*middle, str(block), ha="center", va="center", fontsize=11, zorder=4)
    target.vlines(range(1, width), 0, height, color="black", linewidth=0.2)
    target.hlines(range(1, height), 0, width, color="black", linewidth=0.2)
    target.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1), aspect="equal", xticks=[], yticks=[])
    target.spines[:].set_visible(False)


def draw_order() -> Figure:
    """The tokens of a small grid in both orders, and where those of one block go."""
    partition = BlockPartition.spatiotemporal((2, 4, 4), (2, 2, 2))
    raster = partition.block_ids()
    position = partition.to_raster_order(torch.arange(len(raster)), dim=0)  # in block order, of each token
    ordered = partition.to_block_order(raster, dim=0)
    figure = Figure(figsize=(8.4, 2.2), layout="constrained")
    target = figure.subplots()
    for top, ids in ((0, raster), (3, ordered)):
        for i, block in enumerate(ids.tolist()):
            target.add_patch(Rectangle((i, top), 1, 1, facecolor=GREYS[block], edgecolor="black", linewidth=0.7))
            target.text(i + 0.5, top + 0.53, str(block), ha="center", va="center", fontsize=9)
    marked = 3
    for i in (raster == marked).nonzero().flatten().tolist():
        target.plot([i + 0.5, int(position[i]) + 0.5], [1, 3], color="black", linewidth=0.9)
    target.text(-0.4, 0.5, "raster order", ha="right", va="center")
    target.text(-0.4, 3.5, "block order", ha="right", va="center")
    target.text(
        16, 4.8, "2 frames of 4 x 4 tokens, numbered by their block of 2 x 2 x 2. Lines: where block 3 goes.",
        ha="center", va="center", fontsize=9.5,
    )  # fmt: skip
    target.set(xlim=(-5, 32.1), ylim=(5.2, -0.1))
    target.axis("off")
    return figure
