"""BlockPartition: block ids, sizes and the two token orders."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle_numpy
from tests.strategies import partitions
from vmoba_flex import BlockPartition, TopK, reference


@given(partitions())
def test_the_flat_form_gives_the_partition_back(partition: BlockPartition):
    assert BlockPartition.of_flat(partition.flat) == partition
    assert partition.flat == [*partition.grid, *partition.block, partition.prefix, partition.suffix]


@given(partitions())
def test_block_ids_equal_both_oracles(partition: BlockPartition):
    ids = partition.block_ids()
    assert torch.equal(ids, reference.block_ids(partition.grid, partition.block))
    assert np.array_equal(ids, oracle_numpy.block_ids(partition.grid, partition.block))


@given(partitions())
def test_block_sizes_count_the_ids(partition: BlockPartition):
    assert torch.equal(partition.block_sizes(), torch.bincount(partition.block_ids(), minlength=partition.num_blocks))


@given(partitions(), st.data())
def test_blocks_of_frames_and_tokens_are_found_by_their_ids(partition: BlockPartition, data: st.DataObject):
    ids = partition.block_ids()
    frames = data.draw(st.sets(st.integers(0, partition.grid[0] - 1)))
    tokens = data.draw(st.sets(st.integers(0, partition.num_video_tokens - 1)))
    in_frames = ids.view(partition.grid)[list(frames)].unique()
    assert partition.blocks_of(frames=frames) == tuple(in_frames.tolist())
    assert partition.blocks_of(tokens=iter(tokens)) == tuple(ids[list(tokens)].unique().tolist())
    assert TopK(1, always=partition.blocks_of(frames=frames)).always == tuple(in_frames.tolist())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of frames and tokens must be given, got None and None"),
        ({"frames": [0], "tokens": [0]}, ValueError, r"exactly one of frames and tokens must be given, got \[0\] and"),
        ({"frames": [2]}, ValueError, r"frames must lie in 0..number of frames - 1 = 0..1, got 2"),
        ({"tokens": [-1]}, ValueError, r"tokens must lie in 0..number of tokens - 1 = 0..23, got -1"),
        ({"tokens": [0.0]}, TypeError, "tokens must be an int, got 0.0"),
        ({"frames": 0}, TypeError, "frames must hold ints, got 0"),
    ],
)
def test_bad_frames_and_tokens(options, error, message):
    with pytest.raises(error, match=message):
        BlockPartition((2, 3, 4), (1, 3, 2), prefix=1).blocks_of(**options)


@given(partitions())
def test_block_order_is_a_stable_sort_by_block_id(partition: BlockPartition):
    order = partition.block_ids().argsort(stable=True) + partition.prefix
    first, last = (
        torch.arange(partition.prefix),
        torch.arange(partition.num_tokens)[partition.num_tokens - partition.suffix :],
    )
    tokens = torch.arange(partition.num_tokens)
    assert torch.equal(partition.to_block_order(tokens, dim=0), torch.cat([first, order, last]))


@given(
    partitions(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.sampled_from([(0, 1), (1, 3), (-1, 3), (-2, 4), (2, 4)]),
)
def test_orders_are_exact_inverses_on_any_dim_and_dtype(
    partition: BlockPartition, dtype: torch.dtype, place: tuple[int, int]
):
    dim, rank = place
    shape = [2] * rank
    shape[dim] = partition.num_tokens
    x = torch.randint(0, 100, shape).to(dtype)
    assert torch.equal(partition.to_raster_order(partition.to_block_order(x, dim), dim), x)
    assert torch.equal(partition.to_block_order(partition.to_raster_order(x, dim), dim), x)


@given(partitions())
def test_gradient_of_an_order_is_the_other_order(partition: BlockPartition):
    x = torch.randn(2, partition.num_tokens, 3, requires_grad=True)
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(partition.to_block_order(x), x, upstream)
    assert torch.equal(grad, partition.to_raster_order(upstream))
    (grad,) = torch.autograd.grad(partition.to_raster_order(x), x, upstream)
    assert torch.equal(grad, partition.to_block_order(upstream))


@pytest.mark.parametrize("dim", [0, 1, -1, -3])
def test_gradient_of_an_order_on_any_dim(dim: int):
    partition = BlockPartition((2, 3, 3), (1, 2, 2), prefix=1)
    tokens = partition.num_tokens
    x = torch.randn(tokens, tokens, tokens, requires_grad=True)
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(partition.to_block_order(x, dim), x, upstream)
    assert torch.equal(grad, partition.to_raster_order(upstream, dim))


def test_orders_have_second_derivatives():
    partition = BlockPartition((2, 3, 3), (1, 2, 2), prefix=1)
    x = torch.randn(partition.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(partition.to_block_order, x)


def test_kinds_are_names_for_one_function():
    grid = (21, 30, 52)
    assert BlockPartition.temporal(grid, 3) == BlockPartition(grid, (3, 30, 52))
    assert BlockPartition.spatial(grid, (5, 13)) == BlockPartition(grid, (21, 5, 13))
    assert BlockPartition.spatiotemporal(grid, (7, 5, 13)) == BlockPartition(grid, (7, 5, 13))
    assert BlockPartition.temporal(grid, 3, prefix=2, suffix=7) == BlockPartition(grid, (3, 30, 52), prefix=2, suffix=7)


@pytest.mark.parametrize(
    ("grid", "blocks", "tokens", "num_blocks"),
    [
        ((21, 30, 52), (3, (5, 13), (7, 5, 13)), 32_760, (7, 24, 72)),
        ((21, 45, 80), (3, (9, 10), (7, 15, 20)), 75_600, (7, 40, 36)),
        ((24, 36, 64), (3, (6, 8), (8, 12, 8)), 55_296, (8, 48, 72)),
        ((36, 30, 52), (3, (5, 13), (12, 10, 13)), 56_160, (12, 24, 36)),
    ],
)
def test_paper_settings(grid, blocks, tokens, num_blocks):
    frames, window, cube = blocks
    kinds = (
        BlockPartition.temporal(grid, frames),
        BlockPartition.spatial(grid, window),
        BlockPartition.spatiotemporal(grid, cube),
    )
    assert tuple(kind.num_blocks for kind in kinds) == num_blocks
    assert {kind.num_tokens for kind in kinds} == {tokens}


def test_is_frozen_hashable_and_takes_lists():
    partition = BlockPartition([2, 4, 4], [1, 2, 2])  # type: ignore[arg-type]
    assert partition == BlockPartition((2, 4, 4), (1, 2, 2))
    assert len({partition, BlockPartition((2, 4, 4), (1, 2, 2))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        partition.prefix = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockPartition((4, 4), (1, 1, 1)), ValueError, r"grid must have 3 sizes, got \(4, 4\)"),
        (
            lambda: BlockPartition((4, 0, 4), (1, 1, 1)),
            ValueError,
            r"grid must be at least 1 everywhere, got \(4, 0, 4\)",
        ),
        (lambda: BlockPartition((4, 4, 4), (1, 2.0, 1)), TypeError, r"block must hold ints, got \(1, 2.0, 1\)"),
        (lambda: BlockPartition((4, 4, 4), (1, True, 1)), TypeError, "block must hold ints"),
        (lambda: BlockPartition(4, (1, 1, 1)), TypeError, "grid must be a tuple of 3 ints, got 4"),
        (
            lambda: BlockPartition((4, 4, 4), (1, 5, 1)),
            ValueError,
            r"block must not be larger than grid \(4, 4, 4\), got \(1, 5, 1\)",
        ),
        (lambda: BlockPartition((4, 4, 4), (1, 1, 1), prefix=-1), ValueError, "prefix must be at least 0, got -1"),
        (lambda: BlockPartition((4, 4, 4), (1, 1, 1), suffix=1.5), TypeError, "suffix must be an int, got 1.5"),
        (lambda: BlockPartition.spatial((4, 4, 4), (2, 2, 2)), ValueError, "window must have 2 sizes"),
        (lambda: BlockPartition.spatial((4, 4, 4), 2), TypeError, "window must be a tuple of 2 ints, got 2"),
        (lambda: BlockPartition.temporal((4, 4, 4), 5), ValueError, "block must not be larger than grid"),
        (lambda: BlockPartition.temporal((4, 4, 4), 2.0), TypeError, "frames must hold ints"),
        (lambda: BlockPartition.spatiotemporal((4, 4, 4), (2, 2)), ValueError, "cube must have 3 sizes"),
        (lambda: BlockPartition.temporal((4, 4), 1), ValueError, "grid must have 3 sizes"),
    ],
)
def test_bad_sizes(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_wrong_token_count_shows_the_sum():
    partition = BlockPartition((2, 3, 4), (1, 3, 4), prefix=5, suffix=6)
    with pytest.raises(
        ValueError, match=r"x must have grid \+ prefix \+ suffix = 2x3x4 \+ 5 \+ 6 = 35 tokens .* got 24"
    ):
        partition.to_block_order(torch.zeros(24, 1))
    with pytest.raises(ValueError, match="got 36"):
        partition.to_raster_order(torch.zeros(36, 1))
    for dim, shape in [(-2, (35,)), (2, (35, 1))]:
        with pytest.raises(ValueError, match=f"dim must be a dim of x, .* got {dim}"):
            partition.to_block_order(torch.zeros(shape), dim)
