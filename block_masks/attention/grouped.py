"""Attention of grouped keys: each query attends the groups that it chose, at the price of the pairs that it chose.

Shapes: ``B`` batch, ``H`` query heads, ``S`` queries, ``K`` keys, ``G`` groups, ``D`` head dim.
"""

import functools
import logging
import math
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from block_masks.attention.coarse_steps import MAX_KERNEL_DIM, CoarseKeys, check_coarse_size
from block_masks.attention.packed_checks import check_coarse, check_packed, check_plan
from block_masks.attention.plain import plain_rows
from block_masks.attention.row_attention import Room, attend_rows
from block_masks.checks import check_finite, check_positive
from block_masks.launching.constant import constant_when_compiled
from block_masks.launching.transforms import in_transform
from block_masks.plans.rows import RowPlan
from block_masks.plans.slots import Slots

_LOG = logging.getLogger(__name__)

RowBackend = Literal["auto", "eager", "triton", "flash"]
BACKENDS = ("auto", "eager", "triton", "flash")
MAX_ROW_BYTES = 2_200_000_000
# What forward and backward hold of a section of heads, in copies of its rows. Forward: outputs; FlashAttention-4 also
# wants the queries gathered. Backward: queries, gradients of outputs and of queries; FlashAttention-4 also gradients of
# queries in float32.
_COPIES = {"eager": (1, 3), "triton": (1, 3), "flash": (2, 5)}


class RowBound(NamedTuple):
    """A bound on the rows of a call, known on the host.

    Attributes:
        row_tiles: the most tiles of rows that any ``heads`` neighbouring heads of a sample need: the sum over heads and
            groups of ``ceil(queries that chose the group / tile_size)``.
        heads: 1, or all heads of a sample where only these are bounded together.
    """

    row_tiles: int
    heads: int = 1

    @classmethod
    def rounded(cls, row_tiles: int) -> Self:
        """A bound of any one head, rounded up so that few sizes occur: between powers of two, four."""
        step = 2 ** max(row_tiles.bit_length() - 3, 0)
        return cls(max(1, -(-row_tiles // step) * step))


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    slots: Slots,
    *,
    scale: float | None = None,
    backend: RowBackend = "auto",
    bound: RowBound | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    group_lengths: Tensor | None = None,
    query_group: Tensor | None = None,
    coarse: CoarseKeys | None = None,
    plan: RowPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over exactly the keys of the groups that it chose.

    Args:
        query: ``(B, H, S, D)``, floating point, on CPU or CUDA.
        key: ``(B, key heads, K, D)``; query head h uses key head ``h // (H // key heads)``.
        value: ``(B, key heads, K, value dim)``.
        selected: bool ``(B, H, S, G)``: which groups each query chose; fastest where S is contiguous.
        slots: of these keys and groups, from ``plan_slots``.
        scale: factor on the scores; ``1 / sqrt(D)`` by default.
        backend: ``"triton"``: the same inputs give the same bits. ``"flash"``: FlashAttention-4. ``"eager"``: plain
            PyTorch, on any device. ``"auto"`` takes ``"flash"`` where it is installed and comes out right on small
            problems, ``"triton"`` elsewhere on a GPU, and ``"eager"`` on a CPU, for float64 and for dims above 256.
        bound: of the rows. Without it one number is read from the device, which ``torch.compile`` does not allow. A
            bound too small is an error on a CPU; on a GPU a query whose rows do not fit comes out as NaN.
        max_row_bytes: what the rows of the heads that are worked on together may take; at least one head is.
        group_lengths: int32 ``(B, G)``: how many of each group's keys, the first ones, are valid; all if None.
        query_group: int64 ``(S,)``: makes the call causal. A query then attends no group after its own, whatever it
            chose; the keys of its own group are not masked among themselves.
        coarse: keys that stand for the groups that a query did not choose, with the heads of ``key`` and of all samples
            in one dim; see ``CoarseKeys``. Not with ``query_group``.
        plan: of the rows of ``selected``, from ``plan_rows`` of it with all heads in one dim, which is then not planned
            again if ``max_row_bytes`` allows its sections. Not with ``group_lengths`` or ``query_group``, which change
            what is attended.

    Returns:
        The output ``(B, H, S, value dim)``, 0 where a query chose nothing, and the natural log-sum-exp of each query's
        scores ``(B, H, S)``, float32, or float64 for float64 inputs, without a gradient. Keys that are not valid get
        zero gradient.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the backend cannot run here.

    Example:
        >>> import torch
        >>> from block_masks import attend_packed, plan_slots
        >>> query, key, value = torch.randn(3, 1, 2, 300, 16)
        >>> key_group = torch.arange(300) // 100  # three groups of 100 keys
        >>> selected = torch.rand(1, 2, 300, 3) < 0.5
        >>> output, lse = attend_packed(query, key, value, selected, plan_slots(key_group, [100] * 3))
        >>> output.shape, lse.shape
        (torch.Size([1, 2, 300, 16]), torch.Size([1, 2, 300]))
    """
    check_packed(query, key, value, selected, slots, group_lengths, query_group)
    if scale is not None:
        check_finite("scale", scale, "a number or None")
    check_positive("max_row_bytes", max_row_bytes)
    if bound is not None:
        _check_row_bound(bound, query.shape[1])
    check_coarse(coarse, query, key.shape[1], value.shape[3], selected.shape[3])
    if coarse is not None and query_group is not None:
        raise ValueError("coarse must be None with query_group: a coarse key of a later group would not be masked")
    if plan is not None:
        check_plan(plan, query, slots, group_lengths, query_group)
        bound = RowBound(plan.row_tiles, plan.heads) if bound is None else bound
    kernels = _backend(backend, query, key, value)
    batch, heads, queries, head_dim = query.shape
    if coarse is not None and kernels != "eager":
        check_coarse_size("coarse", batch * heads, queries, len(coarse.bias))
    if query_group is not None:
        groups = torch.arange(selected.shape[-1], device=selected.device)
        selected = selected & (groups <= query_group[:, None])
    if group_lengths is not None:
        selected = selected & (group_lengths > 0).view(batch, 1, 1, -1)  # no row without a key
        group_lengths = group_lengths.repeat_interleave(heads, 0)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    query, key, value, selected = (x.flatten(0, 1) for x in (query, key, value, selected))
    if in_transform(query, key, value, *(coarse or ())):
        output, lse = plain_rows(query, key, value, selected, group_lengths, slots, scale, coarse)
    else:
        if bound is None:
            bound = _read_bound(selected, slots.tile_size)
        elif selected.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_bound(selected, slots.tile_size, bound)
        row_bytes = max(head_dim, value.shape[-1]) * query.element_size()
        rooms = rooms_of(bound, heads, max_row_bytes // row_bytes, slots.tile_size, kernels)
        if plan is not None and plan.row_tiles > rooms[0].row_tiles and not torch.compiler.is_compiling():
            _log_no_room(plan.heads, max_row_bytes)
        output, lse = attend_rows(
            query, key, value, selected, slots, rooms=rooms, scale=scale, backend=kernels, group_lengths=group_lengths,
            coarse=coarse, plan=plan,
        )  # fmt: skip
    return output.unflatten(0, (batch, heads)), lse.unflatten(0, (batch, heads))


def rooms_of(bound: RowBound, heads: int, max_rows: int, tile_size: int, backend: str) -> tuple[Room, Room]:
    """The heads that go together, as many as ``max_rows`` allow, and their tiles of rows; forward, then backward."""
    rooms = []
    for copies in _COPIES[backend]:
        rows = copies * bound.row_tiles * tile_size
        # A list inside: on torch 2.11 a generator here breaks the graph.
        sizes = [n for n in range(bound.heads, heads + 1, bound.heads) if heads % n == 0]
        fitting = max([n for n in sizes if n == bound.heads or n // bound.heads * rows <= max_rows])
        rooms.append(Room(fitting, fitting // bound.heads * bound.row_tiles))
    return rooms[0], rooms[1]


def _check_row_bound(bound: Any, heads: int) -> None:
    if not isinstance(bound, RowBound):
        raise TypeError(f"bound must be a RowBound or None, got {bound!r}")
    check_positive("row_tiles of bound", bound.row_tiles)
    check_positive("heads of bound", bound.heads)
    if heads % bound.heads:
        raise ValueError(f"heads of bound must divide query's {heads} heads, got {bound}")


def _check_bound(selected: Tensor, tile_size: int, bound: RowBound) -> None:
    tiles = (selected.sum(1) + tile_size - 1) // tile_size
    needed = int(tiles.view(-1, bound.heads * selected.shape[-1]).sum(1).max())
    if needed > bound.row_tiles:
        raise ValueError(
            f"bound must be at least the {needed} tiles of rows that {bound.heads} of the heads need, got {bound}"
        )


def _read_bound(selected: Tensor, tile_size: int) -> RowBound:
    """The most tiles of rows that any head needs, read from the device."""
    if torch.compiler.is_compiling():
        raise ValueError("bound must be given inside torch.compile, got None")
    if selected.is_meta:  # nothing to read, and nothing runs
        return RowBound(1)
    return RowBound.rounded(int(((selected.sum(1) + tile_size - 1) // tile_size).sum(1).max()))


def _backend(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> str:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    no_kernels = not query.is_cuda or query.dtype == torch.float64
    no_kernels = no_kernels or max(query.shape[-1], value.shape[-1]) > MAX_KERNEL_DIM
    if backend == "eager" or (backend == "auto" and no_kernels):
        return "eager"
    if no_kernels:
        raise ValueError(
            f"backend must be 'auto' or 'eager' for {query.dtype} on device {query.device} with dims "
            f"{query.shape[-1]} and {value.shape[-1]}, got {backend!r}"
        )
    if backend == "triton":
        return backend
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    refusal = _flash_refusal(query.device.index, query.dtype, query.shape[-1], value.shape[-1], backward)
    if backend == "flash" and refusal:
        raise ValueError(f"backend must be 'auto' or 'triton' here, got 'flash': {refusal}")
    return "triton" if refusal else "flash"


@constant_when_compiled
def _flash_refusal(device: int, dtype: torch.dtype, head_dim: int, value_dim: int, backward: bool) -> str | None:
    from block_masks.attention import flash_check

    return flash_check.refusal(device, dtype, head_dim, value_dim, False, backward)


@functools.cache
def _log_no_room(heads: int, max_row_bytes: int) -> None:
    _LOG.warning("rows are planned again: max_row_bytes=%s does not allow sections of %s heads", max_row_bytes, heads)
