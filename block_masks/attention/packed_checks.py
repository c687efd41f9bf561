"""Checks of the arguments of ``attend_packed``, before any kernel runs."""

from typing import Any

import torch
from torch import Tensor

from block_masks.plans.rows import RowPlan
from block_masks.plans.slots import Slots

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_packed(
    query: Any, key: Any, value: Any, selected: Any, slots: Any, group_lengths: Any, query_group: Any
) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless tensors and slots are those of one call."""
    for name, x in (("query", query), ("key", key), ("value", value), ("selected", selected)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dims, got shape {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
    if not isinstance(slots, Slots):
        raise TypeError(f"slots must be Slots, from plan_slots, got {type(slots).__name__}")
    if query.dtype not in _DTYPES:
        raise TypeError(f"query must be a float16, bfloat16, float32 or float64 tensor, got {query.dtype}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
    if selected.dtype != torch.bool:
        raise TypeError(f"selected must be a bool tensor, got {selected.dtype}")
    batch, heads, queries, dim = query.shape
    keys, groups = len(slots.key_slot), len(slots.group_sizes)
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"key heads must divide query's {heads} heads, got {key.shape[1]}")
    expected = {
        "key": (key, (batch, key.shape[1], keys, dim)),
        "value": (value, (batch, key.shape[1], keys, value.shape[3])),
        "selected": (selected, (batch, heads, queries, groups)),
    }
    vectors = {"group_lengths": (group_lengths, torch.int32), "query_group": (query_group, torch.int64)}
    for name, (x, dtype) in vectors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype != dtype:
            raise TypeError(f"{name} must be an {str(dtype)[6:]} tensor or None, got {getattr(x, 'dtype', x)!r}")
        expected[name] = x, (batch, groups) if name == "group_lengths" else (queries,)
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to go with query and slots, got {tuple(x.shape)}")


def check_plan(plan: Any, query: Tensor, slots: Slots, group_lengths: Any, query_group: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``plan`` can be one of the rows of a call."""
    if not isinstance(plan, RowPlan):
        raise TypeError(f"plan must be a RowPlan or None, got {type(plan).__name__}")
    for name, x in (("group_lengths", group_lengths), ("query_group", query_group)):
        if x is not None:
            raise ValueError(f"plan must be None with {name}, which changes what is attended, got a RowPlan")
    expected = (query.shape[0] * query.shape[1], query.shape[2]), slots.tile_size, query.device
    given = tuple(plan.query_count.shape), plan.tile_size, plan.query_count.device
    if given != expected:
        raise ValueError(f"plan must have (heads, queries), tile size and device {expected}, got {given}")
