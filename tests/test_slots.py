"""Slots: where keys lie when each group takes whole tiles, and the mask of tiles that chose groups."""

import dataclasses

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from block_masks import Slots, from_slots, plan_slots, slot_mask, slot_tile_map, to_slots, valid_slots
from tests.strategies import generators
from tests.test_block_masks import INDEX_TENSORS


@dataclasses.dataclass
class SlotProblem:
    """Keys in groups, and which groups each tile of slots chose."""

    key_group: Tensor
    group_sizes: list[int]
    tile_size: int
    selected: Tensor
    key_valid: Tensor | None = None

    def plan(self) -> Slots:
        return plan_slots(self.key_group, self.group_sizes, self.tile_size)

    def mask(self) -> BlockMask:
        slots = self.plan()
        return slot_mask(self.selected, slots, valid_slots(slots, self.key_valid))


@st.composite
def slot_problems(draw: st.DrawFn, ragged: bool = True) -> SlotProblem:
    generator = draw(generators())
    # 64 groups more are more than a word has bits.
    tile, more = draw(st.sampled_from([(1, 0), (1, 64), (2, 64), (4, 0), (16, 0)]))
    step = 1 if ragged else tile
    sizes = [step * size for size in draw(st.lists(st.integers(1, 2 * tile + 1), min_size=1, max_size=5))]
    sizes += [step] * more
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if draw(st.booleans()):
        groups = groups[torch.randperm(len(groups), generator=generator)]
    tiles = sum(-(-size // tile) for size in sizes)
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    selected = torch.rand((2, 2, tiles, len(sizes)), generator=generator) < density
    live = draw(st.sampled_from([None, 0.0, 0.5, 0.95]))
    key_valid = None if live is None else torch.rand((2, len(groups)), generator=generator) < live
    return SlotProblem(groups, sizes, tile, selected, key_valid)


def layout(problem: SlotProblem) -> list[list[int]]:
    """The keys of each tile, one tile after the other."""
    tiles = []
    for group in range(len(problem.group_sizes)):
        keys = [key for key, of_key in enumerate(problem.key_group.tolist()) if of_key == group]
        tiles += [keys[i : i + problem.tile_size] for i in range(0, len(keys), problem.tile_size)]
    return tiles


def dense(problem: SlotProblem) -> Tensor:
    """Which slot each slot attends."""
    tiles = layout(problem)
    group = [int(problem.key_group[tile[0]]) for tile in tiles]
    columns = problem.selected[..., group].repeat_interleave(problem.tile_size, -1)
    live = [[True] * len(problem.key_group)] * len(columns) if problem.key_valid is None else problem.key_valid.tolist()
    filled = torch.tensor(
        [[i < len(tile) and one[tile[i]] for tile in tiles for i in range(problem.tile_size)] for one in live]
    )
    return (columns & filled[:, None, None]).repeat_interleave(problem.tile_size, -2)


@given(slot_problems())
def test_each_group_takes_whole_tiles_in_the_order_of_its_keys(problem: SlotProblem):
    slots, tiles = problem.plan(), layout(problem)
    keys = [key for tile in tiles for key in tile + [-1] * (problem.tile_size - len(tile))]
    assert slots.slot_key.tolist() == keys
    assert torch.equal(slots.slot_key[slots.key_slot], torch.arange(len(problem.key_group)))
    assert slots.slot_group.tolist() == [int(problem.key_group[key]) if key >= 0 else -1 for key in keys]
    assert slots.tile_group.tolist() == [int(problem.key_group[tile[0]]) for tile in tiles]
    assert slots.tile_keys.tolist() == [len(tile) for tile in tiles]


@given(slot_problems())
@example(SlotProblem(torch.zeros(5, dtype=torch.int64), [5], 4, torch.ones(1, 1, 2, 1, dtype=torch.bool)))
def test_mask_equals_create_block_mask(problem: SlotProblem):
    mask, expected_pairs = problem.mask(), dense(problem)
    expected = create_block_mask(
        lambda b, h, q, k: expected_pairs[b, h, q, k],
        *expected_pairs.shape,
        device="cpu",
        BLOCK_SIZE=problem.tile_size,
    )
    for name in INDEX_TENSORS:
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
        assert getattr(mask, name).is_contiguous()
    assert mask.shape == expected.shape and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    assert len({getattr(mask, name).data_ptr() for name in INDEX_TENSORS}) == len(INDEX_TENSORS)


@given(slot_problems())
def test_mask_mod_says_everything_by_itself(problem: SlotProblem):
    expected = dense(problem)
    index = torch.meshgrid(*(torch.arange(size) for size in expected.shape), indexing="ij")
    assert torch.equal(problem.mask().mask_mod(*index), expected)


@given(slot_problems(ragged=False))
def test_all_tiles_are_full_where_groups_divide_into_tiles(problem: SlotProblem):
    slots = problem.plan()
    mask, tiles = slot_mask(problem.selected, slots), slot_tile_map(problem.selected, slots)
    assert torch.equal(tiles.some, tiles.every)
    assert mask.full_kv_num_blocks is not None and mask.q_num_blocks is not None
    assert not mask.kv_num_blocks.any() and not mask.q_num_blocks.any()
    assert torch.equal(mask.full_kv_num_blocks, tiles.some.sum(-1))


@given(slot_problems(ragged=False), generators())
def test_sorted_keys_of_whole_tiles_are_in_their_slots(problem: SlotProblem, generator: torch.Generator):
    groups = problem.key_group.sort().values
    plans = [plan_slots(groups, problem.group_sizes, problem.tile_size, sorted_keys=known) for known in (True, False)]
    x = torch.randn((2, 1, len(groups), 3), generator=generator)
    in_place, copied = (to_slots(x, slots) for slots in plans)
    assert in_place is x and torch.equal(copied, x)
    assert from_slots(in_place, plans[0]) is x and torch.equal(from_slots(copied, plans[1]), x)


def test_the_registered_op_is_well_formed():
    torch.library.opcheck(torch.ops.block_masks.plan_slots, (torch.tensor([2, 0, 1, 2, 2]), 3, 4, 2))
