"""What the properties draw from: partitions, rules, gate scores, queries, keys and values.

Strategies construct and never filter. Block counts and block shapes are drawn and multiplied, raggedness is drawn
apart, and tokens are capped by the sizes drawn. Integer values make ties common and float32 arithmetic exact.
"""

import dataclasses
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from vmoba_flex import BlockPartition, BySteps, Remember, Tail, Threshold, TopK
from vmoba_flex.call import BACKENDS, DISPATCHES
from vmoba_flex.config import KINDS, ApproxBlocks, VMoBAConfig
from vmoba_flex.rules import GATES, NORMALIZE, POOLS, Rule
from vmoba_flex.selection.mass import block_mass


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs of one attention call."""

    query: Tensor
    key: Tensor
    value: Tensor
    partition: BlockPartition
    rule: Rule
    scale: float | None = None
    text_lengths: Tensor | None = None
    tail: Tail | None = None

    def with_leaves(self) -> "Problem":
        """The same problem on copies of query, key and value that require gradients."""
        leaves = {name: getattr(self, name).detach().clone().requires_grad_() for name in ("query", "key", "value")}
        return dataclasses.replace(self, **leaves)

    def to(self, target: torch.device | torch.dtype) -> "Problem":
        """The same problem on another device or in another dtype."""
        moved = {name: getattr(self, name).to(target) for name in ("query", "key", "value")}
        lengths = None if self.text_lengths is None else self.text_lengths.to(moved["query"].device)
        return dataclasses.replace(self, **moved, text_lengths=lengths)

    @property
    def gqa(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]


@st.composite
def partitions(draw: st.DrawFn, text: bool = True) -> BlockPartition:
    """1 to 12 blocks of 1 to 12 tokens before the last block of each axis is cut short."""
    counts = draw(
        st.sampled_from([(1, 1, 1), (4, 1, 1), (3, 1, 1), (1, 2, 3), (1, 3, 2), (2, 2, 2), (2, 1, 3), (3, 2, 2)])
    )
    block = draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 2, 3), (2, 3, 1), (3, 1, 2), (1, 3, 4)]))
    cut = draw(st.tuples(*(st.integers(0, size - 1) for size in block)))
    grid = tuple(max(count * size - less, size) for count, size, less in zip(counts, block, cut, strict=True))
    prefix, suffix = draw(st.sampled_from([(0, 0), (0, 0), (3, 0), (0, 2), (1, 4)])) if text else (0, 0)
    return BlockPartition(grid, block, prefix=prefix, suffix=suffix)


@st.composite
def causal_partitions(draw: st.DrawFn, text: bool = True) -> BlockPartition:
    """The same in chunks of 1 to 5 frames, which blocks may divide or not, of which the last may be shorter."""
    partition = draw(partitions(text))
    return dataclasses.replace(partition, causal_frames=draw(st.integers(1, 5)))


@st.composite
def rules(draw: st.DrawFn, num_blocks: int, pool: str | None = None, exact: bool = False) -> Rule:
    """Both rules over all of their pools, or one, and all gates, with the extremes k = 1, k = N and tau = 1 common.

    A third of them keep up to two blocks always.

    With ``exact``, none that takes exponentials, which no two devices or precisions round alike.
    """
    gate = "mean" if exact else draw(st.sampled_from(GATES))
    if pool is None:
        pool = draw(st.sampled_from(POOLS))
    block = st.integers(0, num_blocks - 1)
    always = draw(st.just(()) | st.just(()) | st.lists(block, min_size=1, max_size=2).map(tuple))
    if pool != "block" and draw(st.booleans()):
        if draw(st.booleans()):
            return TopK(draw(st.integers(1, num_blocks)), pool=pool, gate=gate, always=always)
        return TopK(density=draw(shares()), pool=pool, gate=gate, always=always)
    max_density = draw(st.none() | shares())
    normalize = "minmax" if exact else draw(st.sampled_from(NORMALIZE))
    return Threshold(draw(shares()), pool=pool, max_density=max_density, normalize=normalize, gate=gate, always=always)


def shares() -> st.SearchStrategy[float]:
    """Numbers in (0, 1]: round ones, at which sums hit the target exactly, and any others."""
    return st.sampled_from([0.25, 0.5, 1.0]) | st.floats(0.01, 1.0)


@st.composite
def by_steps(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> BySteps[Any]:
    """Up to five values one after another, from steps and then from shares on."""
    steps = draw(st.sets(st.integers(1, 12), max_size=2))
    shares = draw(st.sets(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=2))
    return BySteps({start: draw(values) for start in (0, *sorted(steps), *sorted(shares))})


@st.composite
def configs(draw: st.DrawFn) -> VMoBAConfig:
    """Blocks of up to 6 tokens a side or about so many; one rule, one per kind or one for each of 12 layers.

    Rules and tails that change by steps, and any cycle.
    """
    sides = st.integers(1, 6)
    about = st.integers(1, 100).map(ApproxBlocks)
    cycle = draw(st.just(KINDS) | st.lists(st.sampled_from(KINDS), min_size=1, max_size=5).map(tuple))
    steps, half = (st.integers(0, 12) | st.floats(0, most, exclude_max=True) for most in (1, 0.5))
    one = rules(4) | by_steps(rules(4))
    by_kind = st.fixed_dictionaries(dict.fromkeys(sorted(set(cycle)), one))
    rule = draw(one | by_kind | st.lists(one, min_size=12, max_size=12).map(tuple))
    dispatch = draw(st.sampled_from(DISPATCHES))
    remembers = st.builds(Remember, st.integers(1, 9), st.sampled_from(["device", "cpu"]), st.integers(1, 2**40))
    tails = st.none() | st.builds(Tail, st.integers(1, 64) | st.tuples(sides, sides, sides))
    return VMoBAConfig(
        draw(sides | about),
        draw(st.tuples(sides, sides) | about),
        draw(st.tuples(sides, sides, sides) | about),
        rule,
        cycle=cycle,
        dense_layers=draw(st.integers(0, 3) | st.lists(st.integers(-5, 5), max_size=3).map(tuple)),
        dense_steps=draw(steps | st.tuples(half, half)),
        dispatch=dispatch,
        tail=draw(st.none() if dispatch == "dense" else tails | by_steps(tails)),
        backend=draw(st.sampled_from(BACKENDS)),
        remember=draw(st.none() if dispatch == "dense" else st.none() | remembers),
    )


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def gates(draw: st.DrawFn, partition: BlockPartition, masses: bool = False) -> Tensor:
    """float32 gate scores ``(B, H, video tokens, N)``: small integers with many ties, constants, or reals.

    With ``masses``, the estimated attention masses of these.
    """
    batch, heads = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3)]))
    shape = (batch, heads, partition.num_video_tokens, partition.num_blocks)
    generator = draw(generators())
    levels = draw(st.sampled_from([1, 2, 4, None]))
    if levels is None:
        scores = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-9, 1.0, 1e4]))
    else:
        scores = torch.randint(levels, shape, generator=generator).float() - levels // 2
    return block_mass(scores, partition, head_dim=1) if masses else scores


@st.composite
def problems(
    draw: st.DrawFn, dtype: torch.dtype = torch.float32, exact: bool = False, heads: int | None = None,
    causal: bool = False,
) -> Problem:  # fmt: skip
    """Inputs of one call.

    With ``exact``, queries and keys are integers, and so are the block means: float32 computes the gate exactly, ties
    included; rules take no exponentials of it. ``heads`` fixes the query and key heads. With ``causal``, the partition
    is.
    """
    partition = draw(causal_partitions() if causal else partitions())
    rule = draw(rules(partition.num_blocks, exact=exact))
    batch = draw(st.integers(1, 2))
    key_heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)])) if heads is None else (heads, 1)
    generator = draw(generators())
    shape = (partition.num_tokens, 8)

    def tensor(heads: int, scale: int = 1) -> Tensor:
        if exact:
            return torch.randint(-2, 3, (batch, heads, *shape), generator=generator).to(dtype) * scale
        return torch.randn((batch, heads, *shape), generator=generator).to(dtype)

    common = math.lcm(*partition.block_sizes().tolist())
    query, key, value = tensor(key_heads * groups), tensor(key_heads, common), tensor(key_heads)
    text = partition.prefix + partition.suffix
    least = int(causal)  # where text attends only text, all of it but none
    lengths = draw(st.none() | st.lists(st.integers(least, text), min_size=batch, max_size=batch)) if text else None
    return Problem(
        query, key, value, partition, rule,
        scale=draw(st.sampled_from([None, None, 0.05, 1.0])),
        text_lengths=None if lengths is None else torch.tensor(lengths),
    )  # fmt: skip
