"""Shapes, dtypes and devices -> the dispatch and the backend of a call, without reading the device."""

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from block_masks.launching import architecture
from block_masks.launching.constant import constant_when_compiled
from block_masks.plans.rows import TILE
from vmoba_flex.call import Backend, Call, Chosen, ChosenBackend, Dispatch
from vmoba_flex.dispatch.compiled import has_flex_kernel
from vmoba_flex.dispatch.machine import HOPPER, Machine, machine_of
from vmoba_flex.groups import group_sizes
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold
from vmoba_flex.selection.bounds import largest_density
from vmoba_flex.selection.kept import Selection
from vmoba_flex.tail import Cells, Tail

_LOG = logging.getLogger(__name__)


# What the gate "exact" takes, as a share of full attention's forward on an H200 (bench/NOTES.md).
_EXACT_GATE = 0.75


def choose(
    query: Tensor, key: Tensor, value: Tensor, call: Call, dispatch: Dispatch, backend: Backend, ranks: int = 1
) -> Chosen:
    """What a call runs, and why where it is not what was asked for; see ``choose_dispatch`` and ``choose_backend``."""
    why = ""
    if dispatch == "auto":
        dispatch, why = choose_dispatch(query, key, value, call.partition, call.rule, call.tail, ranks)
    padded = call.text_lengths is not None
    chosen, refusal = choose_backend(backend, dispatch, query, key, value, call.partition, padded, ranks)
    return Chosen(dispatch, chosen, why or refusal)


def choose_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule | Selection,
    tail: Tail | None = None,
    ranks: int = 1,
    machine: Machine | None = None,
) -> tuple[Literal["tiles", "packed", "shared", "dense"], str]:
    """What ``dispatch="auto"`` runs, and why if it is slower than ``"packed"`` elsewhere; see ``vmoba_attention``.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks.
        rule: ``TopK`` or ``Threshold``, or what was chosen before.
        tail: how skipped blocks take part; None if they do not.
        ranks: how many share the call. All make the same choice.
        machine: whose times count; None for those of query's device.

    Returns:
        ``"tiles"``, ``"packed"`` or ``"dense"``; ``"shared"`` for what query tiles chose. Then ``Chosen.why``.
    """
    if isinstance(rule, Selection):
        if rule.choice == "tile":
            return "shared", ""
        unbounded = rule.bounds.rows is None
    else:
        unbounded = isinstance(rule, Threshold) and rule.max_density is None
    compiled = torch.compiler.is_compiling()
    if not query.is_cuda:
        # FlexAttention's kernel for CPUs is the fastest, where it runs.
        return "tiles" if compiled and (unbounded or has_flex_kernel(query, key, value)) else "packed", ""
    if query.dtype == torch.float64 or max(query.shape[-1], value.shape[-1]) > 256:
        return "tiles", "packed has no kernels for float64 and head dims above 256"
    if reason := _no_kernels(query.device.index or 0):
        return "dense", reason
    machine = machine or machine_of(query.device, ranks)
    dense, backward = _dense_seconds(query, key, value, partition, machine, ranks)
    dense /= ranks
    if not packed_wins(dense, backward, rule, partition, tail, machine):
        if compiled:
            return "dense", "full attention is estimated to be faster"
        return "dense", _slower(dense, backward, rule, partition, tail, machine)
    if unbounded and compiled:
        return "tiles", "the rule bounds no pairs for a graph: give it max_density"
    return "packed", ""


@functools.cache
def _log_dense(reason: str) -> None:
    _LOG.warning("dispatch='auto' is full attention: %s", reason)


@constant_when_compiled
def _no_kernels(index: int) -> str | None:
    """Why a GPU is too old for the kernels, so that ``"auto"`` is full attention whatever the rule; logged once."""
    if reason := architecture.refusal(index):
        _log_dense(reason)
    return reason


def _slower(
    dense: float, backward: bool, rule: Rule | Selection, partition: BlockPartition, tail: Tail | None, machine: Machine
) -> str:
    """Why ``"packed"`` does not win, in words."""
    share, launches = packed_share(rule, partition, tail, backward, machine), machine.launches[int(backward)]
    packed = max(launches, share * dense)
    words = f"full attention takes {1e3 * dense:.2g} ms here, packed {1e3 * packed:.2g} ms, as estimated"
    return f"{words}: {'too few tokens' if share < 1 else 'the rule allows too many pairs'}"


def _dense_seconds(
    query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, machine: Machine, ranks: int = 1
) -> tuple[float, bool]:
    """Seconds of the fastest dense peer for these heads, and whether they include backward.

    They are of all queries if ranks share the call, and of these queries if none do.
    """
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    heads = query.shape[0] * query.shape[1]
    seconds = dense_seconds(heads, partition.num_tokens, query.shape[-1], backward, machine)
    share = query.shape[2] / partition.num_tokens if ranks == 1 else 1  # less than 1 for queries of some frames
    return seconds * share, backward


def dense_seconds(heads: int, tokens: int, head_dim: int, backward: bool, machine: Machine = HOPPER) -> float:
    """Estimated seconds of the fastest dense peer on a GPU; ``heads`` are those of all samples."""
    return 4 * heads * tokens**2 * head_dim / machine.dense_rate * (machine.backward if backward else 1)


def packed_share(
    rule: Rule | Selection,
    partition: BlockPartition,
    tail: Tail | None,
    backward: bool = False,
    machine: Machine = HOPPER,
) -> float:
    """Estimated time of ``"packed"`` as a share of the dense peer's, at the largest density that the rule allows."""
    constant, factor = machine.packed_share
    density = rule.bounds.density if isinstance(rule, Selection) else largest_density(rule, partition.num_blocks)
    share = constant + factor * density
    if not isinstance(rule, Selection) and rule.gate == "exact":
        share += _EXACT_GATE / (machine.backward if backward else 1)
    if tail is None:
        return share
    cells = Cells(partition, tail.cell_of(partition)).total
    return share + machine.tail_share[int(backward)] * cells / partition.num_tokens


def packed_wins(
    dense: float,
    backward: bool,
    rule: Rule | Selection,
    partition: BlockPartition,
    tail: Tail | None,
    machine: Machine = HOPPER,
) -> bool:
    """Whether ``"auto"`` expects ``"packed"`` to beat a dense peer that takes ``dense`` seconds."""
    share = packed_share(rule, partition, tail, backward, machine)
    return max(machine.launches[int(backward)], share * dense) < dense


def choose_backend(
    backend: Backend,
    dispatch: Dispatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    padded: bool = False,
    ranks: int = 1,
) -> tuple[ChosenBackend, str]:
    """The backend that a dispatch runs on, and why it is not FlashAttention-4 where that would be faster.

    Args:
        backend: as in ``vmoba_attention``.
        dispatch: as in ``vmoba_attention``, but for ``"auto"``.
        query: as in ``choose_dispatch``.
        key: as in ``choose_dispatch``.
        value: as in ``choose_dispatch``.
        partition: the blocks.
        padded: whether the call has text lengths.
        ranks: how many share the call.

    Raises:
        ValueError: if ``backend`` cannot run here.
    """
    if not query.is_cuda:
        if backend != "auto":
            raise ValueError(f"backend must be 'auto' on device {query.device}, got {backend!r}")
        return "eager", ""
    if dispatch == "packed" and query.dtype == torch.float64:
        if backend != "auto":
            raise ValueError(f"backend must be 'auto' for dispatch='packed' and dtype torch.float64, got {backend!r}")
        return "eager", ""
    if dispatch != "dense" and (reason := architecture.refusal(query.device.index or 0)):
        raise ValueError(reason)
    if backend == "triton" or (backend == "auto" and dispatch not in ("packed", "shared")):
        return "triton", ""
    machine = machine_of(query.device, ranks)
    dense, backward = _dense_seconds(query, key, value, partition, machine, ranks)
    if backend == "auto" and dense < machine.flash_from[int(backward)]:
        return "triton", ""
    refusal = _flash_refusal(dispatch, query, key, value, partition, padded, backward)
    if backend == "flash" and refusal:
        raise ValueError(f"backend must be 'auto' or 'triton' here, got 'flash': {refusal}")
    return ("triton", f"no FlashAttention-4: {refusal}") if refusal else ("flash", "")


def _flash_refusal(
    dispatch: Dispatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    padded: bool,
    backward: bool,
) -> str | None:
    if dispatch not in ("packed", "shared"):
        return f"dispatch={dispatch!r} does not run on FlashAttention-4"
    if dispatch == "shared":
        if key.shape[1] != query.shape[1]:
            return "dispatch='shared' does not run on FlashAttention-4 with fewer key heads"
        if query.dtype != torch.bfloat16 and (padded or any(size % TILE for size in group_sizes(partition))):
            return (
                f"dispatch='shared' runs on FlashAttention-4 in {query.dtype} only if each block, and prefix and "
                f"suffix together, is a multiple of {TILE} tokens, and text_lengths is None"
            )
    of_slots = dispatch == "shared"
    return _flash_cannot_run(
        query.device.index, query.dtype, query.shape[-1], value.shape[-1], of_slots, bool(backward)
    )


@constant_when_compiled
def _flash_cannot_run(
    device: int, dtype: torch.dtype, head_dim: int, value_dim: int, of_slots: bool, backward: bool
) -> str | None:
    """``block_masks.attention.flash_check.refusal``, a constant to ``torch.compile``."""
    from block_masks.attention import flash_check

    return flash_check.refusal(device, dtype, head_dim, value_dim, of_slots, backward)
