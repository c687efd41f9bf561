"""block_masks: tile lists, bit words, and the BlockMask of group choices."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from block_masks import TileMap, block_mask_from_tiles, group_mask, group_tiles, pack_bits, pair_lookup, tile_lists
from tests.strategies import generators

INDEX_TENSORS = [
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
]


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Selected groups, the group of each key, and a tile size; sorted, scattered and absent groups."""
    queries, keys = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    groups = draw(st.sampled_from([1, 2, 5, 31, 32, 33, 63, 64, 65, 130]))
    generator = draw(generators())
    group = torch.randint(draw(st.integers(1, groups)), (keys,), generator=generator)
    if draw(st.booleans()):
        group = group.sort().values
    density = draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    selected = torch.rand((2, 2, queries, groups), generator=generator) < density
    return selected, group, draw(st.sampled_from([1, 4, 8, 16]))


def dense(selected: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return selected[..., group]


@given(choices())
@example((torch.ones(1, 1, 8, 64, dtype=torch.bool), torch.full((8,), 63), 4))  # the sign bit of a word
def test_group_mask_equals_create_block_mask(choice):
    selected, group, tile_size = choice
    mask = group_mask(selected, group, tile_size=tile_size)
    batch, heads, queries, _ = selected.shape
    expected = create_block_mask(
        lambda b, h, q, k: selected[b, h, q, group[k]],
        batch,
        heads,
        queries,
        len(group),
        device="cpu",
        BLOCK_SIZE=tile_size,
    )
    for name in INDEX_TENSORS:
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
        assert getattr(mask, name).dtype == getattr(expected, name).dtype
    assert mask.shape == expected.shape and mask.BLOCK_SIZE == expected.BLOCK_SIZE


@given(choices())
def test_mask_mod_says_everything_by_itself(choice):
    selected, group, tile_size = choice
    mask_mod = group_mask(selected, group, tile_size=tile_size).mask_mod
    index = torch.meshgrid(*(torch.arange(size) for size in dense(selected, group).shape), indexing="ij")
    assert torch.equal(mask_mod(*index), dense(selected, group))


@given(choices())
def test_tiles_are_what_the_dense_mask_says(choice):
    selected, group, size = choice
    tiles = group_tiles(selected, group, size)
    for i, rows in enumerate(dense(selected, group).split(size, 2)):
        for j, tile in enumerate(rows.split(size, 3)):
            whole = tile.shape[2:] == (size, size)
            assert torch.equal(tiles.some[:, :, i, j], tile.any(-1).any(-1))
            assert torch.equal(tiles.every[:, :, i, j], tile.all(-1).all(-1) & whole)


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([0.0, 0.2, 0.7, 1.0]), generators())
def test_tile_lists_are_sorted_permutations(rows, columns, density, generator):
    tiles = torch.rand((2, 3, rows, columns), generator=generator) < density
    counts, listed = tile_lists(tiles)
    assert counts.dtype == listed.dtype == torch.int32
    for row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(rows)):
        b, h, r = row.tolist()
        inside = tiles[b, h, r].nonzero().flatten().tolist()
        outside = (~tiles[b, h, r]).nonzero().flatten().tolist()
        assert counts[b, h, r] == len(inside)
        assert listed[b, h, r].tolist() == inside + outside


@given(choices())
def test_index_tensors_are_contiguous_and_distinct(choice):
    selected, group, tile_size = choice
    mask = group_mask(selected, group, tile_size=tile_size)
    tensors = [getattr(mask, name) for name in INDEX_TENSORS]
    assert all(x.is_contiguous() for x in tensors)
    # Compiled kernels read the full-tile tensors with the partial-tile tensors' strides.
    for name in INDEX_TENSORS[:4]:
        assert getattr(mask, name).stride() == getattr(mask, f"full_{name}").stride()
    assert len({x.data_ptr() for x in tensors}) == len(tensors)


@given(st.integers(1, 200), st.sampled_from([0.0, 0.5, 1.0]), generators())
def test_words_hold_the_bits(groups, density, generator):
    selected = torch.rand((1, 2, 3, groups), generator=generator) < density
    words = pack_bits(selected)
    assert words.shape == (1, 2, 3, -(-groups // 64)) and words.dtype == torch.int64
    unpacked = [(words[..., g // 64] >> (g % 64)) & 1 for g in range(groups)]
    assert torch.equal(torch.stack(unpacked, -1).bool(), selected)
    index = torch.meshgrid(*(torch.arange(size) for size in selected.shape), indexing="ij")
    assert torch.equal(pair_lookup(selected)(*index), selected)


def test_block_mask_from_tiles_keeps_rectangular_tiles():
    some = torch.tensor([[[[True, True, False], [False, True, True]]]])
    every = torch.tensor([[[[True, False, False], [False, False, True]]]])
    mask = block_mask_from_tiles(TileMap(some, every), lambda b, h, q, k: q >= 0, (30, 90), (16, 32))
    assert mask.shape == (1, 1, 30, 90) and mask.BLOCK_SIZE == (16, 32)
    counts = {name: getattr(mask, name).flatten().tolist() for name in INDEX_TENSORS if name.endswith("num_blocks")}
    assert counts == {
        "kv_num_blocks": [1, 1],
        "full_kv_num_blocks": [1, 1],
        "q_num_blocks": [0, 2, 0],
        "full_q_num_blocks": [1, 0, 1],
    }


SELECTED, GROUP = torch.ones(1, 1, 4, 2, dtype=torch.bool), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("selected", "group", "tile_size", "error", "message"),
    [
        (SELECTED.int(), GROUP, 4, TypeError, "selected must be a bool tensor, got torch.int32"),
        (SELECTED[0], GROUP, 4, ValueError, r"selected must have 4 dims .* got shape \(1, 4, 2\)"),
        (SELECTED, GROUP.float(), 4, TypeError, "key_group must be an int32 or int64 tensor, got torch.float32"),
        (SELECTED, GROUP[None], 4, ValueError, r"key_group must have 1 dim \(keys,\), got shape \(1, 3\)"),
        (SELECTED, GROUP.to("meta"), 4, ValueError, "key_group must be on selected's device cpu, got meta"),
        (SELECTED, GROUP, 0, ValueError, "tile_size must be at least 1, got 0"),
        (SELECTED[..., :0], GROUP, 4, ValueError, r"must not be empty, got shapes \(1, 1, 4, 0\) and \(3,\)"),
        (SELECTED, GROUP[:0], 4, ValueError, r"must not be empty, got shapes \(1, 1, 4, 2\) and \(0,\)"),
    ],
)
def test_bad_input(selected, group, tile_size, error, message):
    for make in (group_mask, group_tiles):
        with pytest.raises(error, match=message):
            make(selected, group, tile_size=tile_size)


def test_words_too_many_to_index():
    selected = torch.empty(64, 64, 2**19, 65, dtype=torch.bool, device="meta")
    with pytest.raises(
        ValueError, match=r"fewer than 2\*\*31 words .* got shape \(64, 64, 524288, 65\) with 4294967296"
    ):
        group_mask(selected, torch.zeros(8, dtype=torch.int64, device="meta"))
