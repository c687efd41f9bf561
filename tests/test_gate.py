"""The gate: queries against block means, in float32."""

import numpy as np
import pytest
import torch
from hypothesis import given

from tests import oracle_numpy
from tests.strategies import Problem, problems
from vmoba_flex import BlockPartition, reference, reference_gates
from vmoba_flex.selection.gate import block_means, gate


def _video(x: torch.Tensor, partition: BlockPartition) -> torch.Tensor:
    return x[:, :, partition.prefix : partition.num_tokens - partition.suffix]


def _reference(problem: Problem) -> torch.Tensor:
    p = problem.partition
    return reference_gates.gate(_video(problem.query, p), _video(problem.key, p), reference.block_ids(p.grid, p.block))


@given(problems(exact=True))
def test_exact_where_arithmetic_is_exact(problem: Problem):
    scores = gate(problem.query, problem.key, problem.partition)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.double(), _reference(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_in_float32(dtype):
    partition = BlockPartition((5, 12, 12), (2, 5, 5), prefix=3, suffix=2)
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = _reference(Problem(query, key, key, partition, None))  # type: ignore[arg-type]
    # A chain of n float32 operations is off by at most n half-ulps of the sum of magnitudes; 16-bit sums are not.
    means = block_means(key, partition).double()
    magnitude = _video(query, partition).double().abs() @ means.abs().mT
    bound = 2 * (64 + 50) * torch.finfo(torch.float32).eps * magnitude
    assert ((gate(query, key, partition) - expected).abs() <= bound).all()


@given(problems())
def test_oracles_agree(problem: Problem):
    p = problem.partition
    ids = oracle_numpy.block_ids(p.grid, p.block)
    query, key = _video(problem.query, p).numpy(), _video(problem.key, p).numpy()
    np.testing.assert_allclose(
        oracle_numpy.gate(query, key, ids, p.num_blocks), _reference(problem), rtol=1e-12, atol=1e-12
    )


def test_autocast_changes_nothing():
    partition = BlockPartition((2, 6, 6), (1, 3, 3))
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 16)
    expected = gate(query, key, partition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(query, key, partition), expected)


def test_no_gradient_flows():
    partition = BlockPartition((2, 2, 2), (1, 2, 2))
    query = torch.randn(1, 1, 8, 4, requires_grad=True)
    assert not gate(query, query, partition).requires_grad


def test_float64_stays_float64():
    partition = BlockPartition((2, 2, 2), (1, 2, 2))
    query = torch.randn(1, 1, 8, 4, dtype=torch.float64)
    assert gate(query, query, partition).dtype == torch.float64
