"""The strategies reach the edge cases that the properties are about."""

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st

from tests.strategies import Problem, configs, gates, partitions, problems
from vmoba_flex import BlockPartition, BySteps, Threshold, TopK
from vmoba_flex.config import ApproxBlocks
from vmoba_flex.selection.gate import gate


@pytest.mark.parametrize(
    "edge",
    [
        lambda p: p.num_blocks == 1,
        lambda p: p.num_blocks > 8,
        lambda p: p.num_video_tokens == 1,
        lambda p: any(g % b for g, b in zip(p.grid, p.block, strict=True)),
        lambda p: all(g % b for g, b in zip(p.grid, p.block, strict=True)),
        lambda p: all(c > 1 for c in p.cells),
        lambda p: p.prefix and not p.suffix,
        lambda p: p.prefix and p.suffix,
        lambda p: 1 in p.block_sizes() and p.num_blocks > 1,
    ],
)
def test_partitions_reach(edge):
    find(partitions(), edge)


@pytest.mark.parametrize(
    "edge",
    [
        lambda p: p.gqa and p.key.shape[1] > 1,
        lambda p: p.query.shape[0] > 1,
        lambda p: isinstance(p.rule, TopK) and p.rule.k == p.partition.num_blocks > 1,
        lambda p: isinstance(p.rule, TopK) and p.rule.density is not None and p.rule.pool == "head",
        lambda p: isinstance(p.rule, Threshold) and p.rule.tau == 1,
        lambda p: isinstance(p.rule, Threshold) and p.rule.tau < 0.3 and p.rule.normalize == "softmax",
        lambda p: isinstance(p.rule, Threshold) and p.rule.max_density is not None and p.rule.pool == "block",
        lambda p: isinstance(p.rule, Threshold) and p.rule.tau < 0.3 and p.rule.pool == "global",
    ],
)
def test_problems_reach(edge):
    find(problems(), edge)


@pytest.mark.parametrize(
    "edge",
    [
        lambda c: isinstance(c.temporal, ApproxBlocks) and isinstance(c.spatiotemporal, tuple),
        lambda c: isinstance(c.rule, Mapping) and len(c.rule) == 2,
        lambda c: isinstance(c.rule, Threshold) and c.rule.max_density is not None,
        lambda c: isinstance(c.rule, BySteps) and any(0 < start < 1 for start, _ in c.rule.pairs),
        lambda c: isinstance(c.rule, tuple) and isinstance(c.rule[0], BySteps),
        lambda c: isinstance(c.tail, BySteps) and None in c.tail.values,
        lambda c: isinstance(c.dense_steps, float) and c.dense_steps > 0,
        lambda c: isinstance(c.dense_layers, int) and c.dense_layers > len(c.cycle),
        lambda c: isinstance(c.dense_layers, tuple) and min(c.dense_layers, default=0) < 0,
        lambda c: isinstance(c.dense_steps, tuple) and isinstance(c.dense_steps[0], float),
        lambda c: len(c.cycle) > len(set(c.cycle)) > 1,
    ],
)
def test_configs_reach(edge):
    find(configs(), edge)


def test_gates_have_ties_and_constants():
    partition = BlockPartition((2, 2, 2), (1, 1, 2))
    find(gates(partition), lambda g: g.unique().numel() == 1)
    find(gates(partition), lambda g: 1 < g.unique().numel() <= 4)
    find(gates(partition), lambda g: g.unique().numel() == g.numel())


@given(problems(exact=True))
def test_exact_problems_have_exact_gates(problem: Problem):
    scores = gate(problem.query, problem.key, problem.partition)
    assert torch.equal(scores, scores.round())
    assert scores.abs().max() * 2 < 2**24


@given(st.data())
def test_partitions_stay_small(data: st.DataObject):
    partition = data.draw(partitions())
    assert partition.num_tokens <= 200
    assert math.prod(partition.block) <= 12
