"""dispatch="shared": one choice per query tile, and the branch that a GPU runs."""

import dataclasses
import functools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks import slot_mask
from tests.paths import (
    assert_equals_dense_masked_attention,
    attend,
    expected_mask,
    shared_choice,
    shared_selection,
    through_attention,
    through_shared,
)
from tests.strategies import Problem, problems, rules
from vmoba_flex import BlockPartition, Threshold, TopK, reference, vmoba_attention, vmoba_selection
from vmoba_flex.dispatch import shared
from vmoba_flex.groups import block_slots

TILE_SIZES = st.sampled_from([1, 3, 4, 128])


def exact_means(problem: Problem, tile_size: int) -> Problem:
    """A problem whose tiles have integer mean queries, if its queries are integers."""
    sizes = problem.partition.block_sizes().tolist()
    tiles = {min(tile_size, size - first) for size in sizes for first in range(0, size, tile_size)}
    return dataclasses.replace(problem, query=problem.query * math.lcm(*tiles))


@given(problems(exact=True), TILE_SIZES)
def test_choices_equal_the_reference_where_arithmetic_is_exact(problem: Problem, tile_size: int):
    problem = exact_means(problem, tile_size)
    _, expected = reference.vmoba(
        problem.query, problem.key, problem.value, problem.partition, problem.rule, tile_size=tile_size
    )
    assert torch.equal(shared_selection(problem, tile_size), expected)


@given(st.data())
def test_tiles_of_one_token_choose_as_tokens_do(data: st.DataObject):
    problem = data.draw(problems(exact=True))
    # Pools of many queries break ties by the order of the queries, and tiles stand in block order.
    rule = data.draw(rules(problem.partition.num_blocks, "query", exact=True))
    problem = dataclasses.replace(problem, rule=rule)
    expected = vmoba_selection(problem.query, problem.key, problem.partition, rule)
    assert torch.equal(shared_selection(problem, 1), expected)


@given(problems(), TILE_SIZES)
def test_own_block_is_always_chosen_and_text_attends_all(problem: Problem, tile_size: int):
    selected, slots = shared_choice(problem, tile_size)
    assert selected.gather(-1, slots.tile_group[:, None].expand(*selected.shape[:3], 1)).all()
    text = slots.tile_group == problem.partition.num_blocks
    assert selected[:, :, text].all()
    assert selected[..., problem.partition.num_blocks :].all()


@given(problems(dtype=torch.bfloat16), TILE_SIZES)
def test_means_of_16_bit_queries_are_taken_in_float32(problem: Problem, tile_size: int):
    problem = dataclasses.replace(problem, rule=dataclasses.replace(problem.rule, gate="mean"))
    wide = dataclasses.replace(problem, query=problem.query.float(), key=problem.key.float())
    assert torch.equal(shared_selection(problem, tile_size), shared_selection(wide, tile_size))


@given(problems())
def test_autocast_changes_no_choice(problem: Problem):
    expected = shared_selection(problem, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shared_selection(problem, 4), expected)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_mask: BlockMask,
    scale: float | None,
    enable_gqa: bool,
    lse: bool,
) -> tuple[Tensor, None]:
    """``flex_attention`` with a backward on a CPU, from what ``mask_mod`` says; it gives no log-sum-exp."""
    assert not lse
    index = torch.meshgrid(*(torch.arange(size) for size in block_mask.shape), indexing="ij")
    mask = block_mask.mask_mod(*index)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return output, None


def gpu_branch(problem: Problem, tile_size: int) -> Tensor:
    """What a GPU runs, but for the kernel."""
    with (
        mock.patch.object(shared, "has_flex_kernel", return_value=True),
        mock.patch.object(shared, "compiled_flex_attention", masked_attention),
    ):
        return through_shared(tile_size)(problem)


@given(st.sampled_from([torch.float32, torch.bfloat16]).flatmap(problems), TILE_SIZES)
def test_gpu_branch_equals_dense_masked_attention(problem: Problem, tile_size: int):
    mask = expected_mask(problem, tile_size)
    upstream = torch.randn(problem.query.shape, generator=torch.Generator().manual_seed(1))
    path = functools.partial(gpu_branch, tile_size=tile_size)
    assert_equals_dense_masked_attention(path, problem, upstream, mask)


def flash_branch(problem: Problem, tile_size: int) -> Tensor:
    """What a GPU runs on FlashAttention-4, but for the kernels."""
    with (
        mock.patch.object(shared, "has_flex_kernel", return_value=True),
        mock.patch.object(shared, "realize", lambda x: x),  # has no gradient, and is only for a CPU
    ):
        return through_shared(tile_size, "flash")(problem)


@given(problems(torch.float64, heads=2), st.sampled_from([1, 3, 4, 16]))
def test_flash_branch_equals_dense_masked_attention(problem: Problem, tile_size: int):
    mask = expected_mask(problem, tile_size)
    upstream = torch.randn(problem.query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path = functools.partial(flash_branch, tile_size=tile_size)
    assert_equals_dense_masked_attention(path, problem, upstream, mask)


@given(problems(), TILE_SIZES)
def test_slots_of_slabs_are_known_to_be_in_order(problem: Problem, tile_size: int):
    slots = block_slots(problem.partition, torch.device("cpu"), tile_size)
    kept = slots.slot_key[slots.slot_key >= 0]
    assert not slots.sorted_keys or torch.equal(kept, torch.arange(len(kept)))
    slabs = BlockPartition.temporal((4, 2, 2), 2, suffix=1)
    assert block_slots(slabs, torch.device("cpu"), tile_size).sorted_keys


@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("tile_size", [4, 128])
def test_the_flex_branch_equals_the_reference(monkeypatch, scale: float | None, tile_size: int):
    """What a GPU runs, with eager ``flex_attention`` on the CPU."""
    partition = BlockPartition((3, 5, 5), (2, 2, 3), prefix=2, suffix=3)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, partition.num_tokens, 8, generator=generator)
    key = torch.randn(1, 2, partition.num_tokens, 8, generator=generator)
    value = torch.randn(1, 2, partition.num_tokens, 16, generator=generator)
    problem = Problem(query, key, value, partition, TopK(2), scale)
    expected, _ = reference.vmoba(query, key, value, partition, TopK(2), scale, tile_size)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(through_shared(tile_size)(problem).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [TopK(2), Threshold(0.3)])
def test_all_tiles_are_full_where_blocks_divide_into_tiles(rule):
    partition = BlockPartition((2, 16, 24), (2, 8, 8), prefix=100, suffix=28)
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 8, generator=torch.Generator().manual_seed(0))
    selected, slots = shared_choice(Problem(query, key, key, partition, rule))
    mask = slot_mask(selected, slots)
    assert mask.shape == (1, 2, partition.num_tokens, partition.num_tokens)
    assert mask.full_kv_num_blocks is not None
    assert mask.kv_num_blocks.sum() == 0 and mask.full_kv_num_blocks.sum() > 0


@given(problems())
def test_stats_count_tokens_times_chosen_blocks(problem: Problem):
    output, stats = attend(problem, dispatch="shared", return_stats=True)
    assert torch.equal(output, through_attention("shared")(problem))
    selection = shared_selection(problem, 128)
    assert torch.equal(stats.pairs, selection.sum((2, 3)))
    torch.testing.assert_close(stats.density, selection.float().mean((2, 3)))


@pytest.mark.parametrize("rule", [TopK(1), TopK(2), Threshold(0.2)])
def test_tile_density_is_the_share_of_tiles_that_run(rule):
    partition = BlockPartition((4, 16, 16), (4, 8, 11), prefix=40)
    query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 8, generator=torch.Generator().manual_seed(0))
    _, stats = vmoba_attention(query, key, value, partition, rule, dispatch="shared", return_stats=True)
    mask = slot_mask(*shared_choice(Problem(query, key, value, partition, rule)))
    assert mask.full_kv_num_blocks is not None
    listed = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum(-1)
    torch.testing.assert_close(stats.tile_density, listed / listed.new_tensor(mask.kv_indices.shape[-1] ** 2))


def test_queries_of_a_tile_share_and_others_do_not():
    """Two tiles of one block that like different blocks, and one query that disagrees with its tile."""
    partition = BlockPartition.temporal((3, 2, 4), 1)
    key = torch.zeros(1, 1, 24, 2)
    key[:, :, 8:16, 0] = key[:, :, 16:, 1] = 1.0
    query = torch.zeros(1, 1, 24, 2)
    query[:, :, :4, 0] = query[:, :, 4:, 1] = 1.0
    query[:, :, 1] = torch.tensor([0.0, 1.0])
    selection = shared_selection(Problem(query, key, key, partition, TopK(2)), 4)[0, 0]
    assert selection[:4].tolist() == [[True, True, False]] * 4
    assert selection[4:8].tolist() == [[True, False, True]] * 4
    assert vmoba_selection(query, key, partition, TopK(2))[0, 0, 1].tolist() == [True, False, True]
