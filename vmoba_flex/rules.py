"""The two rules: how many (query, block) pairs each pool keeps."""

import dataclasses
import math
from typing import Literal, Self, cast, get_args

from torch import Tensor

from vmoba_flex.checks import check_choice, check_count, check_ids, check_int, check_positive, check_share
from vmoba_flex.partition import BlockPartition

Pool = Literal["query", "block", "head", "global"]
Normalize = Literal["minmax", "softmax"]
POOLS: tuple[Pool, ...] = get_args(Pool)
NORMALIZE: tuple[Normalize, ...] = get_args(Normalize)
Gate = Literal["mean", "cells", "spread", "exact"]
GATES: tuple[Gate, ...] = get_args(Gate)

# A rule as the schema of a custom op takes it: its words, its counts (k, then the blocks of always), its shares, and
# the tau in force where it is warmed up. Counts are apart because they stay symbolic in graphs with dynamic shapes.
FlatRule = tuple[str, list[int], list[float], Tensor | None]


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps a fixed number of (query, block) pairs per pool, best first (arXiv 2506.23858, Sec. 3).

    A pool with R queries keeps ``k * R`` pairs. Own blocks and those of ``always`` count, rank first, and are kept even
    if they are more. Ties go to the lower block id, then the lower query index, then the lower head.

    In a partition with ``causal_frames``, a pool holds the queries of one chunk, and N counts the blocks up to the
    chunk's end, which they may choose: all of them where ``k`` is more, and those of ``always`` that are among them.

    The gate scores each block for each query. All gates but ``"mean"`` give the logarithm of the attention mass that
    the query has on the block, exact or estimated. None sees prefix, suffix or the ``scale`` of a call; in place of the
    latter stands ``s = 1 / sqrt(D)``.

    | gate | score of a block |
    |---|---|
    | ``"mean"`` | the paper's: query . mean key, without ``s`` |
    | ``"cells"`` | log of the sum over its cells of ``exp(s query . mean key + log(tokens) + v / 2)`` |
    | ``"spread"`` | the same with ``log(v) / 2`` more in each exponent |
    | ``"exact"`` | log of the sum over its keys of ``exp(s query . key)``, in 0.7 of full attention's time |

    The cells are those of ``Tail()``. ``v`` estimates the variance of the scaled scores inside a cell:
    ``s**2 sum_d query_d**2 var_d``, with ``var_d`` the variance of the cell's keys along dim d. ``"cells"`` finds the
    masses of blocks whose keys differ; ``"spread"`` prefers blocks that a tail's mean keys would stand for badly.

    Attributes:
        k: blocks per query, on average over the pool, in 1..N.
        density: instead of ``k``, the share of the N blocks in (0, 1], rounded half up, at least one block.
        pool: what competes: ``"query"`` (the blocks of one query: the paper's training-free setting), ``"head"`` (all
            pairs of one head) or ``"global"`` (all pairs of one sample).
        gate: ``"mean"``, ``"cells"``, ``"spread"`` or ``"exact"``.
        always: ids of blocks that every query attends; see ``BlockPartition.blocks_of``.

    Raises:
        TypeError: if a value has a wrong type.
        ValueError: if both or neither of ``k`` and ``density`` are given, or a value is out of range.

    Example:
        >>> TopK(density=0.25).blocks_per_query(72)
        18
    """

    k: int | None = None
    density: float | None = dataclasses.field(default=None, kw_only=True)
    pool: Pool = dataclasses.field(default="query", kw_only=True)
    gate: Gate = dataclasses.field(default="mean", kw_only=True)
    always: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if (self.k is None) == (self.density is None):
            raise ValueError(f"exactly one of k and density must be given, got k={self.k!r}, density={self.density!r}")
        if self.k is not None:
            if isinstance(self.k, float):
                raise TypeError(f"k must be an int, got {self.k!r}: a share of the blocks is TopK(density={self.k!r})")
            check_int("k", self.k)
            if self.k < 1:
                raise ValueError(f"k must lie in 1..num_blocks, got {self.k}")
        if self.density is not None:
            object.__setattr__(self, "density", check_share("density", self.density))
        check_choice("pool", self.pool, POOLS)
        check_choice("gate", self.gate, GATES)
        if self.pool == "block":
            raise ValueError(
                "pool must be 'query', 'head' or 'global' for TopK, got 'block': k counts the blocks of a query, and a "
                "pool of one block has no such count"
            )
        object.__setattr__(self, "always", check_ids("always", self.always))

    @classmethod
    def of_flat(cls, words: str, counts: list[int], shares: list[float]) -> Self:
        """The rule with this ``flat`` form."""
        _, pool, gate = words.split()
        k, always = (None, counts) if shares else (counts[0], counts[1:])
        density = shares[0] if shares else None
        return cls(k, density=density, pool=cast(Pool, pool), gate=cast(Gate, gate), always=tuple(always))

    @property
    def flat(self) -> FlatRule:
        """The rule, as the schema of a custom op takes it."""
        counts = [] if self.k is None else [self.k]
        shares = [] if self.density is None else [self.density]
        return f"topk {self.pool} {self.gate}", [*counts, *self.always], shares, None

    def blocks_per_query(self, num_blocks: int) -> int:
        """Blocks per query out of ``num_blocks``.

        Raises:
            TypeError: if ``num_blocks`` is not an int.
            ValueError: if it is below 1, or ``k`` exceeds it.
        """
        check_positive("num_blocks", num_blocks)
        if self.density is not None:
            return max(1, math.floor(self.density * num_blocks + 0.5))
        assert self.k is not None  # __post_init__
        if self.k > num_blocks:
            raise ValueError(f"k must lie in 1..num_blocks = 1..{num_blocks}, got {self.k}")
        return self.k

    def max_pairs(self, pool_pairs: int, num_blocks: int) -> int:
        """Pairs that a pool of ``pool_pairs`` keeps, own pairs and those of ``always`` included."""
        check_count("pool_pairs", pool_pairs)
        return self.blocks_per_query(num_blocks) * (pool_pairs // num_blocks)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Keeps the best pairs of a pool until they hold a share of its weight (arXiv 2506.23858, Sec. 3).

    Own blocks and those of ``always`` are kept. The others follow, best first, until the kept weight reaches ``tau``
    times the pool's total (plus 1e-6). ``normalize`` says what a pair weighs. Ties go, and pools of a causal partition
    are, as in ``TopK``. A pool with a NaN or infinite score keeps everything.

    ``"minmax"``, the paper's: the weights are the gate's scores, scaled to [0, 1] by the pool's minimum and maximum.
    Most pairs then weigh about a half, so that tau is nearly a fixed quantile for any attention: random scores give a
    density of 0.19 at tau 0.25.

    ``"softmax"``: the weights are estimated attention masses, in float32 (float64 for float64 inputs). The mass of a
    query on block n, which has ``size_n`` tokens and the mean gate's score ``g_n``, is
    ``size_n exp(g_n / sqrt(D)) / sum_m size_m exp(g_m / sqrt(D))``. The scores of the other gates are logarithms of
    masses: their softmax is the masses, and with ``gate="exact"`` they are those of full attention. The masses of a
    query sum to 1, so that tau is a share of the pool's attention: peaked heads keep few pairs, flat heads many. In
    pools of many queries, peaked queries rank first. Prefix, suffix and the ``scale`` of a call have no effect.

    Attributes:
        tau: share of the pool's summed weights to reach, in (0, 1].
        pool: what competes: ``"query"`` (the blocks of one query), ``"block"`` (all queries of one block), ``"head"``
            (all pairs of one head: the paper's training setting, with tau 0.25) or ``"global"`` (all pairs of one
            sample).
        max_density: caps the pairs per pool at this share of them, in (0, 1], rounded half up, best first. Own blocks
            and those of ``always`` count, and are kept even if they exceed the cap.
        normalize: ``"minmax"`` or ``"softmax"``.
        gate: as in ``TopK``.
        always: as in ``TopK``.

    Raises:
        TypeError: if a value has a wrong type.
        ValueError: if a value is out of range.
    """

    tau: float
    pool: Pool = dataclasses.field(default="head", kw_only=True)
    max_density: float | None = dataclasses.field(default=None, kw_only=True)
    normalize: Normalize = dataclasses.field(default="minmax", kw_only=True)
    gate: Gate = dataclasses.field(default="mean", kw_only=True)
    always: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", check_share("tau", self.tau))
        if self.max_density is not None:
            object.__setattr__(self, "max_density", check_share("max_density", self.max_density))
        check_choice("pool", self.pool, POOLS)
        check_choice("normalize", self.normalize, NORMALIZE)
        check_choice("gate", self.gate, GATES)
        object.__setattr__(self, "always", check_ids("always", self.always))

    @classmethod
    def of_flat(cls, words: str, counts: list[int], shares: list[float]) -> Self:
        """The rule with this ``flat`` form."""
        _, pool, normalize, gate = words.split()
        cap = shares[1] if shares[1:] else None
        return cls(
            shares[0], pool=cast(Pool, pool), max_density=cap, normalize=cast(Normalize, normalize),
            gate=cast(Gate, gate), always=tuple(counts),
        )  # fmt: skip

    @property
    def flat(self) -> FlatRule:
        """The rule, as the schema of a custom op takes it."""
        return self._flat(None)

    def _flat(self, now: Tensor | None) -> FlatRule:
        cap = [] if self.max_density is None else [self.max_density]
        return f"threshold {self.pool} {self.normalize} {self.gate}", list(self.always), [self.tau, *cap], now

    def max_pairs(self, pool_pairs: int, num_blocks: int) -> int | None:
        """Pairs that a pool of ``pool_pairs`` may keep, own pairs and those of ``always`` included; None for no cap."""
        check_count("pool_pairs", pool_pairs)
        check_positive("num_blocks", num_blocks)
        return None if self.max_density is None else math.floor(self.max_density * pool_pairs + 0.5)


Rule = TopK | Threshold


def among(rule: Rule, num_blocks: int) -> Rule:
    """The rule where only the first ``num_blocks`` blocks may be chosen: all of them, if ``k`` is more."""
    always = tuple([block for block in rule.always if block < num_blocks])
    if isinstance(rule, TopK) and rule.k is not None and rule.k > num_blocks:
        return dataclasses.replace(rule, k=num_blocks, always=always)
    return rule if always == rule.always else dataclasses.replace(rule, always=always)


def check_rule_fits(rule: Rule, partition: BlockPartition) -> None:
    """Raises ``ValueError`` unless ``rule`` fits a partition. Any fits a causal one, where it chooses among a few."""
    if partition.causal_frames is not None:
        return
    num_blocks = partition.num_blocks
    if isinstance(rule, TopK):
        rule.blocks_per_query(num_blocks)
    if rule.always and rule.always[-1] >= num_blocks:
        raise ValueError(f"always must lie in 0..num_blocks - 1 = 0..{num_blocks - 1}, got {rule.always}")
