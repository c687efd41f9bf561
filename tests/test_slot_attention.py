"""Attention of tiles of slots by whole tiles only: padding slots are taken out of the sums again."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from block_masks import attend_slots, from_slots, plan_slots, to_slots
from block_masks.attention import row_steps, slot_steps
from tests.strategies import generators
from tests.test_slots import SlotProblem, slot_problems


def inputs(problem: SlotProblem, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value and a gradient of the keys of a problem."""
    tokens = len(problem.key_group)
    return [torch.randn(2, 2, tokens, dim, generator=generator, dtype=dtype) for dim in (8, 8, 3, 3)]


def chosen(problem: SlotProblem) -> SlotProblem:
    """The problem, each tile of which chose at least one group, and without padding."""
    selected = problem.selected.clone()
    selected[..., 0] |= ~selected.any(-1)
    return SlotProblem(problem.key_group, problem.group_sizes, problem.tile_size, selected)


def through_slots(
    problem: SlotProblem, query: Tensor, key: Tensor, value: Tensor, scale: float, group_lengths: Tensor | None = None
) -> Tensor:
    slots = problem.plan()
    valid = None if group_lengths is None else slots.valid(group_lengths)
    query, key, value = to_slots(query, slots), to_slots(key, slots, valid), to_slots(value, slots, valid)
    return from_slots(attend_slots(query, key, value, problem.selected, slots, scale, group_lengths)[0], slots)


def masked(
    problem: SlotProblem, query: Tensor, key: Tensor, value: Tensor, scale: float, group_lengths: Tensor | None = None
) -> Tensor:
    slots = problem.plan()
    mask = problem.selected.index_select(2, slots.key_slot // slots.tile_size)[..., problem.key_group]
    if group_lengths is not None:
        mask = mask & there(problem, group_lengths)[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def there(problem: SlotProblem, group_lengths: Tensor) -> Tensor:
    """Which keys are among the first ones of their group, bool ``(B, keys)``."""
    place = (problem.key_group[:, None] == problem.key_group).tril(-1).sum(1)
    return place < group_lengths[:, problem.key_group]


def assert_equal(
    problem: SlotProblem, tensors: list[Tensor], scale: float, tolerance: float, group_lengths: Tensor | None = None
) -> None:
    *leaves, grad = tensors
    results = []
    for way in (through_slots, masked):
        ready = [x.clone().requires_grad_() for x in leaves]
        output = way(problem, *ready, scale, group_lengths)
        results.append([output.detach(), *torch.autograd.grad(output, ready, grad)])
    largest = max(expected.norm() for expected in results[1])  # where one key is all, the gradient of query is zero
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= tolerance * largest


@given(slot_problems(), generators(), st.sampled_from([0.5, 4.0, -0.3, 0.0]))
def test_equals_masked_attention(problem: SlotProblem, generator: torch.Generator, scale: float):
    problem = chosen(problem)
    assert_equal(problem, inputs(problem, generator), scale, 1e-9)


@given(slot_problems(), generators(), st.sampled_from([0.5, -0.3]))
def test_keys_that_are_not_there_are_not_attended(problem: SlotProblem, generator: torch.Generator, scale: float):
    problem = chosen(problem)
    sizes = torch.tensor(problem.group_sizes)
    group_lengths = (torch.rand((2, len(sizes)), generator=generator) * (sizes + 1)).int()  # some groups have none
    group_lengths[:, 0] = group_lengths[:, 0].clamp(min=1)
    problem.selected[..., 0] = True
    tensors = inputs(problem, generator)
    for x in tensors[1:3]:
        x.masked_fill_(~there(problem, group_lengths)[:, None, :, None], 1e3)
    assert_equal(problem, tensors, scale, 1e-9, group_lengths)
    full = sizes.expand(2, -1).int()
    ways = [through_slots(problem, *tensors[:3], scale, how_many) for how_many in (None, full)]
    torch.testing.assert_close(*ways)


def lone(sizes: list[int]) -> SlotProblem:
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    tiles = sum(-(-size // 128) for size in sizes)
    return SlotProblem(groups, sizes, 128, torch.ones(2, 2, tiles, len(sizes), dtype=torch.bool))


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [129, 1], [200, 300]], ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0, -10.0])
def test_accurate_where_the_last_key_holds_all_the_mass(sizes: list[int], offset: float):
    problem = lone(sizes)
    query, key, value, grad = inputs(problem, torch.Generator().manual_seed(0), torch.float32)
    ends = torch.tensor(sizes).cumsum(0) - 1
    query[..., 0], key[..., 0] = 1.0, offset
    key[:, :, ends, 0] += 20
    # Up to 127 copies of these keys are taken out again, and with them all but 1 / 128 of the sum, so that 128 times as
    # much of the log-sum-exp's rounding shows. It must stay below that of the dtype that kernels for whole tiles take.
    assert_equal(problem, [query, key, value, grad], 1.0, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("offset", [-20.0, -60.0, -80.0])
def test_scores_far_below_zero_leave_gradients_right(offset: float):
    problem = lone([100, 60])
    query, key, value, grad = inputs(problem, torch.Generator().manual_seed(0), torch.float32)
    query, key = query / 4, key / 4
    query[..., 0], key[..., 0] = 1.0, offset
    assert_equal(problem, [query, key, value, grad], 1.0, 1e-3)


def test_filling_slots_change_no_bit_of_what_they_hold():
    problem, generator = lone([100, 60]), torch.Generator().manual_seed(0)
    slots = problem.plan()
    query, key, value, _ = (to_slots(x, slots) for x in inputs(problem, generator, torch.float32))
    output, _ = attend_slots(query, key, value, problem.selected, slots, 0.5)
    key[:, :, slots.slot_key < 0] = 7.0
    assert torch.equal(attend_slots(query, key, value, problem.selected, slots, 0.5)[0], output)


def test_float16_needs_whole_tiles():
    problem = lone([100])
    slots = problem.plan()
    query, key, value, _ = (to_slots(x, slots).half() for x in inputs(problem, torch.Generator()))
    with pytest.raises(ValueError, match=r"query must not be float16 where groups are no whole tiles, got sizes"):
        attend_slots(query, key, value, problem.selected, slots, 0.5)
    whole = plan_slots(torch.zeros(128, dtype=torch.int64), [128])
    query, key, value = (x[:, :, :128] for x in (query, key, value))
    assert attend_slots(query, key, value, problem.selected, whole, 0.5)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"query must not be float16 with group_lengths, got torch.float16"):
        attend_slots(query, key, value, problem.selected, whole, 0.5, torch.full((2, 1), 100, dtype=torch.int32))


def test_what_is_left_out_is_what_fillers_added():
    generator = torch.Generator().manual_seed(0)
    query, keys, value = (torch.randn(1, 1, 4, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = query @ keys.mT
    scores = torch.cat([scores, scores[..., 3:], scores[..., 3:]], -1)
    values = torch.cat([value, torch.zeros_like(value[:, :, :2])], 2)
    selected, padding = torch.tensor([[[[True, False]]]]), torch.tensor([[2, 5]], dtype=torch.int32)
    last = torch.stack([keys[:, :, 3], keys[:, :, 0]], 2)
    output, lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
    padding_lse = slot_steps.padding_lse(query, last, padding, selected, 1, 4)
    expected = (query @ keys.mT).softmax(-1) @ value, (query @ keys.mT).logsumexp(-1)
    kept = output.clone()
    kept_lse = slot_steps.remove_padding(kept, lse, padding_lse)
    torch.testing.assert_close((kept, kept_lse), expected)
    # The same as rows are merged: here each query has one.
    rows, count = torch.arange(4, dtype=torch.int32).view(1, 1, 4), torch.ones(1, 4, dtype=torch.int32)
    merged, merged_lse = torch.empty_like(output[0]), torch.empty_like(lse[0])
    row_steps.merge_rows(output[0, 0], lse[0, 0], rows, count, merged, merged_lse, padding_lse[0])
    torch.testing.assert_close((merged[None], merged_lse[None]), expected)


def test_the_registered_op_is_well_formed():
    problem = lone([100, 60])
    slots = problem.plan()
    query, key, value, _ = (to_slots(x, slots).requires_grad_() for x in inputs(problem, torch.Generator()))
    for group_lengths in (None, torch.tensor([[100, 0], [3, 60]], dtype=torch.int32)):
        arguments = query, key, value, problem.selected, group_lengths, *[None] * 4, *slots.flat, 0.5
        torch.library.opcheck(torch.ops.block_masks.attend_slots, arguments)
