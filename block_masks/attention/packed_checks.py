"""Checks of the arguments of attention, before any kernel runs.

Shapes: ``B`` batch, ``H`` heads, ``S`` queries, ``G`` groups, ``C`` coarse keys, ``D`` head dim.
"""

from typing import Any

from torch import Tensor

from block_masks.attention.coarse_steps import CoarseKeys
from block_masks.checks import check_device, check_is, check_shape, check_tensor
from block_masks.launching.transforms import can_read
from block_masks.plans.rows import RowPlan
from block_masks.plans.slots import Slots


def check_like_query(query: Any, others: dict[str, Any]) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless all are ``(B, H, ., .)``, of one dtype and on one device.

    Args:
        query: of the call.
        others: its other tensors, by name.
    """
    check_tensor("query", query, "float", ("B", "H", "S", "D"))
    for name, x in others.items():
        check_tensor(name, x, "float", ("B", "H", "S", "D"))
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        check_device(name, x, query)


def check_choices(selected: Any, query: Tensor, rows: int, slots: Slots) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``selected`` is bool ``(B, H, rows, G)`` of a call."""
    check_tensor("selected", selected, "bool", ("B", "H", "S", "G"))
    check_device("selected", selected, query)
    check_shape("selected", selected, (*query.shape[:2], rows, len(slots.group_sizes)), "query and slots")


def check_packed(
    query: Any, key: Any, value: Any, selected: Any, slots: Any, group_lengths: Any, query_group: Any
) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless tensors and slots are those of one call."""
    check_like_query(query, {"key": key, "value": value})
    check_is("slots", slots, Slots, "plan_slots")
    batch, heads, queries, dim = query.shape
    keys = len(slots.key_slot)
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"key heads must divide query's {heads} heads, got {key.shape[1]}")
    check_shape("key", key, (batch, key.shape[1], keys, dim), "query and slots")
    check_shape("value", value, (batch, key.shape[1], keys, value.shape[3]), "query, key and slots")
    check_choices(selected, query, queries, slots)
    check_lengths(group_lengths, query, slots)
    if query_group is not None:
        check_tensor("query_group", query_group, "int64", ("S",))
        check_device("query_group", query_group, query)
        check_shape("query_group", query_group, (queries,), "query")


def check_lengths(group_lengths: Any, query: Tensor, slots: Slots) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``group_lengths`` is None or int32 ``(B, G)`` of a call."""
    if group_lengths is None:
        return
    check_tensor("group_lengths", group_lengths, "int32", ("B", "G"))
    check_device("group_lengths", group_lengths, query)
    check_shape("group_lengths", group_lengths, (query.shape[0], len(slots.group_sizes)), "query and slots")
    if can_read(group_lengths) and not ((group_lengths >= 0) & (group_lengths <= slots.group_lengths)).all():
        raise ValueError(f"group_lengths must lie in 0..{slots.group_sizes}, got {group_lengths.tolist()}")


def check_coarse(coarse: Any, query: Tensor, key_heads: int, value_dim: int, groups: int) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``coarse`` is None or the coarse keys of a call.

    Args:
        coarse: what was given.
        query: ``(B, H, S, D)``.
        key_heads: of a sample.
        value_dim: the last dim of value.
        groups: G.
    """
    if coarse is None:
        return
    check_is("coarse", coarse, CoarseKeys)
    check_tensor("coarse.group", coarse.group, "int64", ("C",))
    check_tensor("coarse.bias", coarse.bias, "float", ("C",))
    count, heads = len(coarse.group), query.shape[0] * key_heads
    check_shape("coarse.bias", coarse.bias, (count,), "coarse.group")
    for name, dim in (("key", query.shape[3]), ("value", value_dim)):
        x = getattr(coarse, name)
        check_tensor(f"coarse.{name}", x, "float", ("B * key heads", "C", "D"))
        if x.dtype != query.dtype:
            raise TypeError(f"coarse.{name} must have query's dtype {query.dtype}, got {x.dtype}")
        check_shape(f"coarse.{name}", x, (heads, count, dim), "query, key and coarse.group")
    for name, x in coarse._asdict().items():
        check_device(f"coarse.{name}", x, query)
    if can_read(coarse.group) and count and not 0 <= int(coarse.group.min()) <= int(coarse.group.max()) < groups:
        raise ValueError(f"coarse.group must lie in 0..G - 1 = 0..{groups - 1}, got {coarse.group.tolist()}")


def check_plan(plan: Any, query: Tensor, slots: Slots, group_lengths: Any, query_group: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``plan`` can be one of the rows of a call."""
    check_is("plan", plan, RowPlan, "plan_rows, or None")
    for name, x in (("group_lengths", group_lengths), ("query_group", query_group)):
        if x is not None:
            raise ValueError(f"plan must be None with {name}, which changes what is attended, got a RowPlan")
    expected = (query.shape[0] * query.shape[1], query.shape[2]), slots.tile_size, query.device
    given = tuple(plan.query_count.shape), plan.tile_size, plan.query_count.device
    if given != expected:
        raise ValueError(f"plan must have (heads, queries), tile size and device {expected}, got {given}")
