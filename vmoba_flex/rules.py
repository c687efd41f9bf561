"""The two rules that decide how many blocks a query attends, and the pools that blocks compete in."""

import dataclasses
import math
from typing import Any

POOLS = ("query", "block", "head", "global")


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps a fixed number of (query, block) pairs per pool, best first (arXiv 2506.23858, Sec. 3).

    A pool with R queries keeps ``k * R`` pairs. Own blocks rank first and count. Ties go to the lower block id, then
    the lower query index, then the lower head.

    Attributes:
        k: blocks per query, on average over the pool, in 1..N.
        density: instead of ``k``, the share of the N blocks in (0, 1], rounded half up, at least one block.
        pool: what competes: ``"query"`` (the blocks of one query: the paper's training-free setting), ``"head"`` (all
            pairs of one head) or ``"global"`` (all pairs of one sample).

    Raises:
        TypeError: if ``k`` or ``density`` has a wrong type.
        ValueError: if both or neither of ``k`` and ``density`` are given, or a value is out of range.

    Example:
        >>> TopK(density=0.25).blocks_per_query(72)
        18
    """

    k: int | None = None
    density: float | None = dataclasses.field(default=None, kw_only=True)
    pool: str = dataclasses.field(default="query", kw_only=True)

    def __post_init__(self) -> None:
        if (self.k is None) == (self.density is None):
            raise ValueError(f"exactly one of k and density must be given, got k={self.k!r}, density={self.density!r}")
        if self.k is not None:
            if isinstance(self.k, bool) or not isinstance(self.k, int):
                raise TypeError(f"k must be an int, got {self.k!r}")
            if self.k < 1:
                raise ValueError(f"k must lie in 1..num_blocks, got {self.k}")
        if self.density is not None:
            _check_share("density", self.density)
        _check_pool(self.pool)
        if self.pool == "block":
            raise ValueError(
                "pool must be 'query', 'head' or 'global' for TopK, got 'block': k counts the blocks of a query, and a "
                "pool of one block has no such count"
            )

    def blocks_per_query(self, num_blocks: int) -> int:
        """Blocks per query out of ``num_blocks``.

        Raises:
            ValueError: if ``k`` exceeds ``num_blocks``.
        """
        if self.density is not None:
            return max(1, math.floor(self.density * num_blocks + 0.5))
        assert self.k is not None  # __post_init__
        if self.k > num_blocks:
            raise ValueError(f"k must lie in 1..num_blocks = 1..{num_blocks}, got {self.k}")
        return self.k

    def max_pairs(self, pool_pairs: int, num_blocks: int) -> int:
        """Pairs that a pool of ``pool_pairs`` keeps, own pairs included."""
        return self.blocks_per_query(num_blocks) * (pool_pairs // num_blocks)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Keeps the best pairs of a pool until they hold a share of its similarity (arXiv 2506.23858, Sec. 3).

    Scores are scaled to [0, 1] by the pool's minimum and maximum. Own blocks are in; of the others, best first, the
    fewest that bring the share of the summed scores to ``tau``. Ties as in ``TopK``. A pool with a NaN or infinite
    score keeps everything.

    Attributes:
        tau: share of the pool's summed scores to reach, in (0, 1].
        pool: what competes: ``"query"`` (the blocks of one query), ``"block"`` (all queries of one block), ``"head"``
            (all pairs of one head: the paper's training setting, with tau 0.25) or ``"global"`` (all pairs of one
            sample).
        max_density: caps the pairs per pool at this share of them, in (0, 1], rounded half up, best first. Own blocks
            count, and stay in even where they alone exceed the cap.

    Raises:
        TypeError: if ``tau`` or ``max_density`` has a wrong type.
        ValueError: if a value is out of range.
    """

    tau: float
    pool: str = dataclasses.field(default="head", kw_only=True)
    max_density: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_share("tau", self.tau)
        if self.max_density is not None:
            _check_share("max_density", self.max_density)
        _check_pool(self.pool)

    def max_pairs(self, pool_pairs: int, num_blocks: int) -> int | None:
        """Pairs that a pool of ``pool_pairs`` may keep, own pairs included; None for no cap."""
        return None if self.max_density is None else math.floor(self.max_density * pool_pairs + 0.5)


Rule = TopK | Threshold


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def _check_pool(pool: Any) -> None:
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
