"""Calls shared out over the ranks of a process group, held to the same call on one process."""

import dataclasses
import functools
import inspect
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.paths import attend
from tests.ranks import RankPool
from tests.strategies import Problem
from vmoba_flex import BlockPartition, Threshold, TopK, vmoba_attention
from vmoba_flex.attention import attend as attended
from vmoba_flex.distributed import HeadBalance, TokenShards, collectives
from vmoba_flex.distributed.balance import share_out
from vmoba_flex.distributed.exchange import Layout

pytestmark = pytest.mark.xdist_group("distributed")  # one pool of processes

RULES = [
    TopK(2),
    TopK(2, pool="head"),
    TopK(density=0.4, pool="global"),
    Threshold(0.3, pool="query"),
    Threshold(0.3, pool="block", max_density=0.5),
    Threshold(0.25, pool="head"),
    Threshold(0.25, pool="head", max_density=0.3),
    Threshold(0.3, pool="global"),
    Threshold(0.9, pool="global", max_density=0.4),
]
DISPATCHES = ["tiles", "packed", "shared", "dense"]
PARTITION = BlockPartition((5, 6, 7), (2, 3, 4), prefix=3, suffix=5)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@functools.cache
def group_of(size: int) -> DeviceMesh:
    """This rank's group of ``size`` ranks: 0 and 1, or 2 and 3, for two."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return init_device_mesh(device, (dist.get_world_size() // size, size), mesh_dim_names=("copies", "ranks"))["ranks"]


def problem(
    rule: Any, heads: int, key_heads: int | None = None, partition: BlockPartition = PARTITION, **options: Any
) -> Problem:
    """A problem with ties: queries and keys are small integers, the keys of a block all the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, key_heads or heads, partition.num_tokens, 8)
    query = torch.randint(-2, 3, (2, heads, *shape[2:]), generator=generator).float()
    key = torch.randint(-1, 2, shape, generator=generator).float()
    return Problem(query, key, torch.randn(shape, generator=generator), partition, rule, **options)


def here(x: Tensor, shards: TokenShards | None, partition: BlockPartition, group: Any) -> Tensor:
    """This rank's tokens."""
    runs = Layout.of(group, shards, partition).here
    return torch.cat([x[:, :, start : start + length] for start, length in runs], 2)


def upstream(x: Tensor) -> Tensor:
    """An upstream gradient for outputs, the same at each call."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def whole(problem: Problem, **options: Any) -> tuple[list[Tensor], Any]:
    """Output, gradients and stats on one process."""
    problem = problem.with_leaves()
    output, stats = attend(problem, return_stats=True, **options)
    leaves = (problem.query, problem.key, problem.value)
    grads = torch.autograd.grad(output, leaves, upstream(output).to(output))
    return [output.detach(), *grads], stats


def shared_out(problem: Problem, size: int, device: str, shards: TokenShards | None, options: dict[str, Any]) -> Any:
    """Output, gradients and stats of this rank, on a rank."""
    group, partition = group_of(size), problem.partition
    full = problem.to(torch.device(device))
    local = [here(x, shards, partition, group) for x in (full.query, full.key, full.value)]
    part = dataclasses.replace(full, **dict(zip(("query", "key", "value"), local, strict=True))).with_leaves()
    output, stats = attend(part, return_stats=True, group=group, shards=shards, check_ranks=True, **options)
    wanted = upstream(torch.empty(*problem.query.shape[:3], problem.value.shape[-1]))
    grads = torch.autograd.grad(
        output, (part.query, part.key, part.value), here(wanted.to(output), shards, partition, group)
    )
    return [x.detach().cpu() for x in (output, *grads)], [x.cpu() for x in stats]


def put_together(parts: list[Tensor], shards: TokenShards | None, partition: BlockPartition, add: bool) -> Tensor:
    """The whole of what ranks hold; ``add``: replicated tokens are added up."""
    result = torch.zeros(*parts[0].shape[:2], partition.num_tokens, parts[0].shape[3])
    runs = (shards or TokenShards()).runs(partition, len(parts))
    for part, of_rank in zip(parts, runs, strict=True):
        at = 0
        for start, length in of_rank:
            piece = part[:, :, at : at + length]
            result[:, :, start : start + length] = piece + result[:, :, start : start + length] if add else piece
            at += length
        assert at == part.shape[2]
    return result


def assert_equals_one_process(
    pool: RankPool, problem: Problem, size: int, shards: TokenShards | None = None, exact: bool = True, **options: Any
) -> None:
    expected, expected_stats = whole(problem, **options)
    results = pool.run(shared_out, problem, size, "cpu", shards, options)
    for tensors, stats in results:
        for x, y in zip(stats, expected_stats, strict=True):
            assert torch.equal(x, y)
        assert all(map(torch.equal, tensors, results[0][0])) or size > 1
    for copy in range(0, len(results), size):
        ranks = [tensors for tensors, _ in results[copy : copy + size]]
        for i, (name, *parts) in enumerate(zip(("output", "dquery", "dkey", "dvalue"), *ranks, strict=True)):
            # Each rank's text has its own share of the gradient where text is replicated.
            actual = put_together(parts, shards, problem.partition, add=i > 0)
            if exact:
                assert torch.equal(actual, expected[i]), (name, (actual - expected[i]).abs().max())
            else:
                torch.testing.assert_close(actual, expected[i], rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_each_rule_and_dispatch_equals_one_process(pool, rule, dispatch):
    # 5 heads on 4 and on 2 ranks, and tokens that do not divide.
    assert_equals_one_process(pool, problem(rule, 5), 4, dispatch=dispatch)
    assert_equals_one_process(pool, problem(rule, 5), 2, dispatch=dispatch)
