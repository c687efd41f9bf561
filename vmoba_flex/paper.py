"""The paper's settings for Wan 2.1 (arXiv 2506.23858, Sec. 4), as arguments of ``VMoBAConfig``."""

from typing import Any, Literal

from vmoba_flex.approx_blocks import ApproxBlocks
from vmoba_flex.checks import check_choice
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Threshold, TopK

Setting = Literal["training", "inference"]

_SETTINGS = ("training", "inference")

# Block shapes (temporal, spatial, spatiotemporal) at a grid, and k of each kind where the paper ran inference there.
_AT_GRID: dict[tuple[int, int, int], tuple[tuple[Any, Any, Any], tuple[int, int, int] | None]] = {
    (21, 30, 52): ((3, (5, 13), (7, 5, 13)), (2, 6, 18)),
    (21, 45, 80): ((3, (9, 10), (7, 15, 20)), (2, 10, 9)),
    (24, 36, 64): ((3, (6, 8), (8, 12, 8)), None),
    (36, 30, 52): ((3, (5, 13), (12, 10, 13)), None),
}
_ANY_GRID = (ApproxBlocks(8), ApproxBlocks(48), ApproxBlocks(72))


def paper_arguments(setting: Setting, grid: tuple[int, int, int] | None) -> dict[str, Any]:
    """Arguments of ``VMoBAConfig``; see ``VMoBAConfig.paper``.

    Raises:
        TypeError: if ``grid`` has a wrong type.
        ValueError: if ``setting`` is unknown, or ``grid`` is not three sizes of at least 1.
    """
    check_choice("setting", setting, _SETTINGS)
    arguments = blocks_at(grid)
    k = None if grid is None else _AT_GRID.get(BlockPartition(grid, (1, 1, 1)).grid, (None, None))[1]
    if setting == "training":
        return arguments | {"rule": Threshold(0.25, pool="head", max_density=0.25)}
    rule = TopK(density=0.25) if k is None else dict(zip(arguments, map(TopK, k), strict=True))
    return arguments | {"rule": rule, "dense_steps": 0.25}


def blocks_at(grid: tuple[int, int, int] | None) -> dict[str, Any]:
    """The paper's block shape of each kind at a grid, or at any.

    Raises:
        TypeError: if ``grid`` has a wrong type.
        ValueError: if it is not three sizes of at least 1.
    """
    blocks = _ANY_GRID
    if grid is not None:
        if not isinstance(grid, tuple | list):
            raise TypeError(
                "grid must be None for any video, or a tuple of 3 ints (frames, height, width) in tokens, such as "
                f"(21, 30, 52) for Wan 2.1 at 81x480x832, got {grid!r}"
            )
        blocks, _ = _AT_GRID.get(BlockPartition(grid, (1, 1, 1)).grid, (blocks, None))
    return dict(zip(("temporal", "spatial", "spatiotemporal"), blocks, strict=True))
