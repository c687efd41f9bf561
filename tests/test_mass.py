"""Estimated attention masses, and the threshold that is a share of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle_numpy
from tests.strategies import gates, partitions
from tests.test_selection import own_blocks
from vmoba_flex import BlockPartition, Threshold, reference, reference_gates, vmoba_selection
from vmoba_flex.rules import POOLS
from vmoba_flex.selection.gate import gate
from vmoba_flex.selection.mass import block_mass
from vmoba_flex.selection.select import select


@given(st.data(), st.sampled_from([1, 8, 64]))
def test_masses_are_those_of_both_oracles(data: st.DataObject, head_dim: int):
    partition = data.draw(partitions(text=False))
    scores, ids = data.draw(gates(partition)), reference.block_ids(partition.grid, partition.block)
    mass = block_mass(scores, partition, head_dim)
    expected = reference_gates.mass(scores.double(), ids, head_dim)
    np.testing.assert_allclose(expected, oracle_numpy.mass(scores.numpy(), ids.numpy(), head_dim), rtol=1e-12)
    # The error of a float32 logit is its own half-ulp, and that of its exponential as large in relative terms.
    tolerance = 8 * torch.finfo(torch.float32).eps * (1 + scores.abs().max().item() / head_dim**0.5)
    assert ((mass - expected).abs() <= tolerance * expected + torch.finfo(torch.float32).tiny).all()
    assert block_mass(scores.double(), partition, head_dim).dtype == torch.float64


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_query_with_a_bad_score_has_no_mass_and_its_pool_keeps_everything(pool: str, bad: float):
    partition = BlockPartition((2, 2, 3), (1, 2, 1))
    scores = torch.randn(2, 2, 12, partition.num_blocks, generator=torch.Generator().manual_seed(0))
    scores[0, 1, 3, 2] = bad
    mass = block_mass(scores, partition, 8)
    broken = mass.isnan()
    assert broken[0, 1, 3].all() and broken.sum() == partition.num_blocks
    assert torch.equal(reference_gates.mass(scores.double(), partition.block_ids(), 8).isnan(), broken)
    for dim in {"query": (3,), "block": (1, 2), "head": (2, 3), "global": (1, 2, 3)}[pool]:
        broken = broken.any(dim, keepdim=True)
    selection = select(mass, own_blocks(partition), Threshold(0.01, pool=pool, normalize="softmax"))
    assert selection[broken.expand_as(selection)].all()
    assert selection[1].sum() < selection[1].numel()


def test_tau_is_a_share_of_attention_where_blocks_are_as_their_means():
    """Keys equal within blocks: the estimate is the attention itself, blocks of all sizes included."""
    partition = BlockPartition((3, 7, 9), (2, 3, 4), prefix=2)
    generator = torch.Generator().manual_seed(0)
    of_block = torch.randn(1, 2, partition.num_blocks, 16, generator=generator)
    key = torch.zeros(1, 2, partition.num_tokens, 16)
    key[:, :, 2:] = of_block[:, :, partition.block_ids()]
    query = 2 * torch.randn(1, 2, partition.num_tokens, 16, generator=generator)
    attention = (query[:, :, 2:].double() @ key[:, :, 2:].double().mT / 4).softmax(-1)
    kept = []
    for tau in (0.5, 0.9):
        selection = vmoba_selection(query, key, partition, Threshold(tau, pool="query", normalize="softmax"))
        recall = (attention * selection[..., partition.block_ids()]).sum(-1)
        assert (recall >= tau - 1e-6).all()
        # One block fewer, the least of those chosen for their score, and it falls short.
        mass = torch.zeros(*attention.shape[:3], partition.num_blocks, dtype=torch.float64)
        mass.index_add_(-1, partition.block_ids(), attention)
        least = mass.masked_fill(~selection | own_blocks(partition), torch.inf).amin(-1)
        assert ((recall - least < tau) | least.isinf()).all()
        kept.append(selection.float().mean())
    assert 0 < kept[0] < kept[1] < 1


@pytest.mark.parametrize("pool", POOLS)
def test_uniform_attention_keeps_tau_of_the_pairs(pool: str):
    partition = BlockPartition.temporal((20, 2, 2), 1)
    query, key = torch.zeros(2, 1, 2, partition.num_tokens, 8)
    selection = vmoba_selection(query, key, partition, Threshold(0.5, pool=pool, normalize="softmax"))
    assert selection.float().mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("pool", ["head", "global"])
@pytest.mark.parametrize("sharpness", [1.0, 20.0])
def test_long_pools_of_masses_equal_the_oracle(pool: str, sharpness: float):
    partition = BlockPartition.spatial((4, 18, 32), (6, 8))
    ids = partition.block_ids()
    scores = torch.randn(1, 2, len(ids), partition.num_blocks, generator=torch.Generator().manual_seed(0))
    mass = block_mass(scores * sharpness, partition, head_dim=1)
    for tau in (0.25, 0.9, 0.999999):
        expected = oracle_numpy.select(mass.numpy(), ids.numpy(), pool=pool, tau=tau, normalize="softmax")
        rule = Threshold(tau, pool=pool, normalize="softmax")
        assert np.array_equal(select(mass, own_blocks(partition), rule), expected)


def test_compiled_masses_are_eager_ones_to_the_bit():
    partition = BlockPartition((3, 7, 9), (2, 3, 4), suffix=3)
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 16, generator=torch.Generator().manual_seed(0))

    def masses(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return block_mass(gate(query, key, partition), partition, 16)

    torch.compiler.reset()
    compiled = torch.compile(masses, fullgraph=True)
    assert torch.equal(compiled(query, key), masses(query, key))
    assert compiled(query, key).stride() == masses(query, key).stride()
