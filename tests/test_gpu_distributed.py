"""Calls shared out over GPUs, by NCCL, held to the same call on one GPU."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.strategies import Problem
from tests.test_distributed import RULES, eager_and_compiled, problem, put_together, shared_out, whole
from vmoba_flex import BlockPartition
from vmoba_flex.distributed import TokenShards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]

# By name: "auto" takes FlashAttention-4 for larger problems only.
FASTEST = "flash" if importlib.util.find_spec("flash_attn") else "triton"
PARTITION = BlockPartition((5, 16, 12), (2, 8, 6), prefix=3, suffix=20)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4 if torch.cuda.device_count() >= 4 else 2, "nccl") as pool:
        yield pool


def assert_equals_one_gpu(
    pool: RankPool, rule: Any, heads: int, shards: TokenShards | None = None, dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> None:  # fmt: skip
    case = problem(rule, heads, partition=PARTITION, head_dim=64).to(dtype)
    expected, expected_stats = whole(case.to(torch.device("cuda")), **options)
    for size in {2, pool.size}:
        results = pool.run(shared_out, case, size, "cuda", shards, options)
        for _, stats in results:
            for x, y in zip(stats, expected_stats, strict=True):
                assert torch.equal(x, y.cpu())
        ranks = [tensors for tensors, _ in results[:size]]
        for i, (one, *parts) in enumerate(zip(expected, *ranks, strict=True)):
            actual = put_together([part.float() for part in parts], shards, PARTITION, add=i > 0)
            error = (actual - one.cpu().float()).norm() / one.float().norm().cpu()
            assert error <= 2 * torch.finfo(dtype).eps, (i, size)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dispatch", ["packed", "dense"])
def test_each_rule_equals_one_gpu(pool, rule, dispatch):
    kernels = ("triton", FASTEST) if dispatch == "packed" else ("auto", "auto")
    assert_equals_one_gpu(pool, rule, 6, dispatch=dispatch, backend=kernels[0])
    assert_equals_one_gpu(pool, rule, 5, TokenShards(text="replicated"), dispatch=dispatch, backend=kernels[1])


@pytest.mark.parametrize("dispatch", ["tiles", "shared"])
def test_compiled_dispatches_equal_one_gpu(pool, dispatch):
    for rule in (RULES[6], RULES[8]):
        assert_equals_one_gpu(pool, rule, 6, dispatch=dispatch, backend="triton")


@pytest.mark.parametrize("dispatch", ["packed", "tiles"])
def test_more_gpus_than_heads(pool, dispatch):
    for rule in RULES:
        assert_equals_one_gpu(pool, rule, 1, dispatch=dispatch, backend="triton")


def test_float32(pool):
    assert_equals_one_gpu(pool, RULES[6], 6, dtype=torch.float32, dispatch="packed")


def compiled_errors(case: Problem) -> tuple[int, list[float]] | None:
    """How many graphs two calls took, and how far their outputs and gradients are from eager ones, on a rank."""
    found = eager_and_compiled(case, 2, "cuda", "inductor", {"dispatch": "packed", "backend": "triton"})
    if found is None:
        return None
    graphs, (eager, *results) = found
    pairs = [pair for actual in results for pair in zip(actual, eager, strict=True)]
    return graphs, [float((x - y).norm() / y.norm()) for x, y in pairs]


@pytest.mark.parametrize("rule", [RULES[6], RULES[8]], ids=["head", "global"])
def test_compiled(pool, rule):
    case = problem(rule, 6, partition=PARTITION, head_dim=64).to(torch.bfloat16)
    for graphs, errors in pool.run(compiled_errors, case, limit_s=300)[:2]:
        assert graphs == 1
        assert max(errors) <= 2 * torch.finfo(torch.bfloat16).eps, errors
