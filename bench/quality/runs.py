"""The runs of the training study: variants of attention, sizes, seeds, and their order."""

import dataclasses
from typing import NamedTuple

from vmoba_flex import ApproxBlocks, Threshold, TopK, VMoBAConfig
from vmoba_flex.demo.model import Grid, Shape

MAIN, LONG, SHIPPED = "main", "long", "shipped"


class Size(NamedTuple):
    """A model and the size of its videos, in tokens (frames, height, width)."""

    shape: Shape
    grid: Grid

    @property
    def pixels(self) -> Grid:
        """Frames, rows and columns of a video."""
        t, y, x = (size * part for size, part in zip(self.grid, self.shape.patch, strict=True))
        return t, y, x


class Run(NamedTuple):
    """One training.

    Attributes:
        variant: the attention, a key of ``attentions``.
        size: a key of ``SIZES`` or ``SMALL_SIZES``.
        seed: of the initial weights and of the data.
    """

    variant: str
    size: str = MAIN
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.size}-{self.variant.replace(' ', '_')}-{self.seed}"


# The long videos have as many pixels as the main ones, in smaller patches: 55,296 tokens instead of 13,824.
SIZES = {
    MAIN: Size(Shape((2, 8, 8), dim=512, depth=9, heads=4), (16, 24, 36)),
    LONG: Size(Shape((2, 4, 4), dim=384, depth=6, heads=3), (16, 48, 72)),
    SHIPPED: Size(Shape((4, 8, 8), dim=192, depth=6, heads=3), (8, 18, 32)),
}
SMALL_SIZES = {
    MAIN: Size(Shape((2, 8, 8), dim=64, depth=3, heads=2), (4, 6, 8)),
    LONG: Size(Shape((2, 4, 4), dim=64, depth=3, heads=2), (4, 12, 16)),
    SHIPPED: Size(Shape((4, 8, 8), dim=64, depth=3, heads=2), (2, 6, 8)),
}

# The most urgent first.
RUNS = (
    Run("full"),
    Run("exact"),
    Run("full", seed=1),
    Run("exact", seed=1),
    Run("MoBA"),
    Run("shared"),
    Run("per-query pool"),
    Run("no cycle"),
    Run("full", LONG),
    Run("exact", LONG),
    Run("exact", SHIPPED),
)


def attentions(device: str, size: str) -> dict[str, VMoBAConfig]:
    """The attention of each variant.

    Dispatches are named, since ``"auto"`` takes full attention at 14K tokens. Triton gives the same bits each time. The
    model that ships has fewer tokens, and the blocks that the demo draws: about 8, 12 and 24.
    """
    kernels = "triton" if device == "cuda" else "auto"
    exact = dataclasses.replace(VMoBAConfig.paper("training"), dispatch="packed", backend=kernels)
    if size == SHIPPED:
        exact = dataclasses.replace(exact, spatial=ApproxBlocks(12), spatiotemporal=ApproxBlocks(24))
    per_query = Threshold(0.25, pool="query", max_density=0.25)
    return {
        "full": dataclasses.replace(exact, dispatch="dense", backend="auto"),
        "exact": exact,
        "shared": dataclasses.replace(exact, dispatch="shared"),
        # Three of sixteen blocks: about the density of the paper's threshold.
        "MoBA": dataclasses.replace(exact, temporal=ApproxBlocks(16), rule=TopK(density=3 / 16), cycle=("temporal",)),
        "per-query pool": dataclasses.replace(exact, rule=per_query),
        "no cycle": dataclasses.replace(exact, cycle=("spatial",)),
    }
