"""What runs for a choice: tiles, tiles that share a choice, packed rows."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from block_masks import to_slots
from vmoba_flex import BlockPartition, TopK, vmoba_selection
from vmoba_flex.groups import block_slots
from vmoba_flex.selection.tiles import choose_tiles

SKIPPED, WASTED, WANTED = 0.0, 0.3, 0.8  # lightness, 1 being black


def draw_tiles() -> Figure:
    """Wanted pairs, the tiles that run for them, and one choice for each tile of queries."""
    partition, rule, tile = BlockPartition.spatial((2, 8, 4), (2, 2)), TopK(density=0.25), 4
    generator = torch.Generator().manual_seed(1)
    places = torch.cartesian_prod(*(torch.linspace(-1, 1, size, dtype=torch.float64) for size in partition.grid))
    noise = 1.1 * torch.randn((2, 64, 6), generator=generator, dtype=torch.float64)
    query, key = (places.repeat(1, 2) + noise)[:, None, None]
    groups = partition.to_block_order(partition.block_ids(), dim=0)
    chosen = partition.to_block_order(vmoba_selection(query, key, partition, rule))[0, 0]
    slots = block_slots(partition, query.device, tile)
    shared = choose_tiles(to_slots(query, slots), key, partition, rule, slots)[0, 0].repeat_interleave(tile, 0)
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    wanted, of_tile = chosen[:, groups], shared[:, groups]
    runs = wanted.unflatten(0, (-1, tile)).unflatten(2, (-1, tile)).any(3).any(1)
    runs = runs.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    _matrix(left, WANTED * wanted.float(), tile)
    _matrix(middle, torch.where(wanted, WANTED, torch.where(runs, WASTED, SKIPPED)), tile)
    _matrix(right, WANTED * of_tile.float(), tile)
    left.set_title(f"each query's own choice\ndensity {wanted.float().mean():.2f}", fontsize=10)
    middle.set_title(f"tiles that run for it: {runs.float().mean():.2f}\nlight grey: computed in vain", fontsize=10)
    right.set_title(f"one choice per tile (shared)\ndensity and tiles {of_tile.float().mean():.2f}", fontsize=10)
    left.set_ylabel("queries, in block order")
    figure.supxlabel(
        "keys, in block order: 64 tokens, 8 blocks of 8. Lines: tiles of 4 x 4, in place of 128 x 128.", fontsize=9.5
    )
    return figure


def _matrix(target: Axes, lightness: Tensor, tile: int) -> None:
    size = len(lightness)
    target.imshow(lightness, cmap="Greys", vmin=0, vmax=1, interpolation="nearest", extent=(0, size, size, 0))
    lines = range(0, size + 1, tile)
    target.vlines(lines, 0, size, color="black", linewidth=0.25)
    target.hlines(lines, 0, size, color="black", linewidth=0.25)
    target.set(xticks=[], yticks=[])


CHOICES = ((0, 1), (0, 2), (1, 3), (0, 1, 2), (2,), (1, 2), (0, 3), (3,))  # of each query, its blocks
FOLLOWED, TILE = 3, 4
GREYS = ("#ffffff", "#d9d9d9", "#b0b0b0", "#878787")


def draw_packed() -> Figure:
    """Queries, their rows by block in whole tiles, and the merge; one query is followed."""
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    target = figure.subplots()
    step = 2.35
    for i in range(len(CHOICES)):
        bold = {"linewidth": 2.6} if i == FOLLOWED else {}
        _box(target, 0, i * step, 2.4, 1.6, f"query {i}", "white", **bold)
        for j, block in enumerate(CHOICES[i]):
            _box(target, 2.7 + 0.85 * j, i * step + 0.3, 0.7, 1.0, str(block), GREYS[block])
        _box(target, 20.6, i * step, 2.9, 1.6, f"output {i}", "white", **bold)
    top = -0.8
    for block, grey in enumerate(GREYS):
        rows = [i for i, chosen in enumerate(CHOICES) if block in chosen]
        rows += [None] * (-len(rows) % TILE)  # filled up to whole tiles
        for k, i in enumerate(rows):
            filling = {"hatch": "////"} if i is None else {}
            bold = {"linewidth": 2.6, "zorder": 3} if i == FOLLOWED else {}
            name = "" if i is None else f"row of query {i}"
            _box(target, 8.2, top + k, 4.0, 1, name, "white", **filling, **bold)
            if i == FOLLOWED:
                target.annotate("", (8.15, top + k + 0.5), (5.35, FOLLOWED * step + 0.8), arrowprops=_ARROW)
                target.annotate("", (20.5, FOLLOWED * step + 0.8), (16.6, top + k + 0.5), arrowprops=_ARROW)
        for k in range(0, len(rows), TILE):
            _box(target, 12.5, top + k, 4.0, TILE, f"one tile:\nkeys of block {block}", grey)
        top += len(rows) + 0.9
    for x, words in ((2.6, "queries and the\nblocks they chose"), (10.2, "rows, gathered by\nblock, in whole tiles"),
                     (14.5, "attention over\none block each"), (22.0, "merged by\nlog-sum-exp")):  # fmt: skip
        target.text(x, -1.3, words, ha="center", va="bottom", fontsize=10)
    target.text(10.2, top - 0.5, "hatched: filling", ha="center", va="top", fontsize=9.5)
    target.set(xlim=(-0.2, 23.8), ylim=(top + 0.6, -3.4))
    target.axis("off")
    return figure


_ARROW: dict[str, Any] = {"arrowstyle": "-|>", "linewidth": 1.2, "color": "black"}


def _box(target: Axes, x: float, y: float, width: float, height: float, words: str, grey: str, **style: Any) -> None:
    style = {"linewidth": 0.8} | style
    target.add_patch(Rectangle((x, y), width, height, facecolor=grey, edgecolor="black", **style))
    target.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=8.5)
