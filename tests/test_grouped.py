"""The public door of packed attention: batches, bounds, causal groups, and what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from block_masks import RowBound, Slots, attend_packed, plan_slots

SIZES = [5, 130, 40]


@dataclasses.dataclass
class Call:
    """Two samples of four heads, two key heads, in three groups that lie scattered."""

    query: Tensor
    key: Tensor
    value: Tensor
    selected: Tensor
    slots: Slots

    def __call__(self, **options: Any) -> tuple[Tensor, Tensor]:
        return attend_packed(self.query, self.key, self.value, self.selected, self.slots, **options)


@pytest.fixture
def call() -> Call:
    generator = torch.Generator().manual_seed(0)
    keys = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))[torch.randperm(175, generator=generator)]
    query = torch.randn(2, 4, 60, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 175, 8, generator=generator)
    selected = torch.rand(2, 4, 60, 3, generator=generator) < 0.6
    return Call(query, key, value, selected, plan_slots(keys, SIZES))


def expected(call: Call, mask: Tensor, scale: float = 8**-0.5) -> tuple[Tensor, Tensor]:
    key, value = (x.double().repeat_interleave(2, 1) for x in (call.key, call.value))
    scores = (call.query.double() @ key.mT * scale).masked_fill(~mask, -torch.inf)
    return torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0) @ value, scores.logsumexp(-1)


def assert_close(actual: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(actual, target, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def key_group(call: Call) -> Tensor:
    return call.slots.slot_group[call.slots.key_slot].long()


@pytest.mark.parametrize("bound", [None, RowBound(3), RowBound(12, 4), RowBound(9)])
@pytest.mark.parametrize("max_row_bytes", [1, 10**9])
def test_any_bound_and_any_room_give_the_same(call: Call, bound: RowBound | None, max_row_bytes: int):
    mask = call.selected[..., key_group(call)]
    assert_close(call(bound=bound, max_row_bytes=max_row_bytes), expected(call, mask))


def test_a_bound_too_small_is_an_error_on_a_cpu(call: Call):
    with pytest.raises(ValueError, match=r"bound must be at least the 3 tiles of rows that 1 of the heads need"):
        call(bound=RowBound(2))
    with pytest.raises(ValueError, match=r"bound must be at least the 12 tiles of rows that 4 of the heads need"):
        call(bound=RowBound(11, 4))


def test_causal_queries_attend_no_group_after_their_own(call: Call):
    query_group = torch.arange(60) // 25
    mask = call.selected & (torch.arange(3) <= query_group[:, None])
    assert_close(call(query_group=query_group, scale=0.3), expected(call, mask[..., key_group(call)], 0.3))


def test_only_the_first_keys_of_a_group_are_valid(call: Call):
    lengths = torch.tensor([[5, 100, 0], [2, 130, 40]], dtype=torch.int32)
    group = key_group(call)
    place = (group[:, None] == group).tril(-1).sum(1)
    mask = call.selected[..., group] & (place < lengths[:, group])[:, None, None]
    assert_close(call(group_lengths=lengths), expected(call, mask))


@pytest.mark.parametrize(
    ("changed", "options", "error", "message"),
    [
        ({"query": 3}, {}, TypeError, "query must be a float16, .* tensor, got int"),
        ({"query": torch.zeros(4, 60, 8)}, {}, ValueError, r"query must have 4 dims .* got shape \(4, 60, 8\)"),
        ({"query": torch.zeros(2, 4, 60, 8, dtype=torch.int32)}, {}, TypeError, "query must be a float16, .*int32"),
        ({"key": torch.zeros(2, 2, 175, 8).double()}, {}, TypeError, "key must have query's dtype torch.float32"),
        ({"key": torch.zeros(2, 3, 175, 8)}, {}, ValueError, "key heads must divide query's 4 heads, got 3"),
        ({"key": torch.zeros(2, 2, 170, 8)}, {}, ValueError, r"key must have shape \(2, 2, 175, 8\) .*170"),
        ({"value": torch.zeros(2, 1, 175, 8)}, {}, ValueError, r"value must have shape \(2, 2, 175, 8\)"),
        ({"selected": torch.zeros(2, 4, 60, 3)}, {}, TypeError, "selected must be a bool tensor, got torch.float32"),
        ({"selected": torch.zeros(2, 4, 60, 2) > 0}, {}, ValueError, r"selected must have shape \(2, 4, 60, 3\)"),
        ({"slots": None}, {}, TypeError, "slots must be Slots, from plan_slots, got NoneType"),
        ({}, {"backend": "tritn"}, ValueError, "backend must be one of .* got 'tritn'"),
        ({}, {"backend": "triton"}, ValueError, "backend must be 'auto' or 'eager' .* got 'triton'"),
        ({}, {"backend": "flash"}, ValueError, "backend must be 'auto' or 'eager' .* got 'flash'"),
        ({}, {"group_lengths": torch.ones(2, 3)}, TypeError, "group_lengths must be an int32 tensor"),
        ({}, {"group_lengths": torch.ones(4, 3).int()}, ValueError, r"group_lengths must have shape \(2, 3\)"),
        ({}, {"query_group": torch.zeros(59).long()}, ValueError, r"query_group must have shape \(60,\)"),
        ({}, {"query_group": [0] * 60}, TypeError, "query_group must be an int64 tensor"),
    ],
)
def test_bad_calls(call: Call, changed: Any, options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        dataclasses.replace(call, **changed)(**options)


@pytest.mark.parametrize(
    ("group", "sizes", "tile_size", "error", "message"),
    [
        ([0, 1], [1, 1], 4, TypeError, "key_group must be an int64 tensor, got list"),
        (torch.tensor([0, 1]).int(), [1, 1], 4, TypeError, "key_group must be an int64 tensor, got torch.int32"),
        (torch.tensor([[0, 1]]), [1, 1], 4, ValueError, r"key_group must have 1 dim \(keys,\)"),
        (torch.tensor([0, 1]), [2, 0], 4, ValueError, "group_sizes must be at least 1, got 0"),
        (torch.tensor([0, 1]), [1.0, 1], 4, TypeError, "group_sizes must be an int, got 1.0"),
        (torch.tensor([0, 1]), [1, 2], 4, ValueError, "group_sizes must sum to the 2 keys"),
        (torch.tensor([0, 1, 1]), [2, 1], 4, ValueError, r"group_sizes must be the \[1, 2\] of key_group"),
        (torch.tensor([0, 1]), [1, 1], 0, ValueError, "tile_size must be at least 1, got 0"),
    ],
)
def test_bad_groups(group: Any, sizes: Any, tile_size: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        plan_slots(group, sizes, tile_size)
