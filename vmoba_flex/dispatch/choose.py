"""Shapes, dtypes and devices -> the dispatch and the backend of a call, without reading the device."""

from typing import Literal

import torch
from torch import Tensor

from block_masks.launching.constant import constant_when_compiled
from block_masks.plans.rows import TILE
from vmoba_flex.call import Backend, ChosenBackend, Dispatch
from vmoba_flex.dispatch.compiled import has_flex_kernel
from vmoba_flex.groups import group_sizes
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold
from vmoba_flex.selection.bounds import largest_density
from vmoba_flex.selection.kept import Selection
from vmoba_flex.tail import Cells, Tail

# What "auto" decides by, measured on an H200 or H100 (bench/NOTES.md). Pairs: forward, and forward + backward.
_DENSE_RATE = 6.5e14  # operations per second of the fastest dense peer
_BACKWARD = 3.5  # its forward + backward takes so many times its forward
_SHARE = (0.12, 1.3)  # "packed" takes this constant plus this factor times the density, as a share of the dense time
_TAIL_SHARE = (2.75, 2.97)  # a tail adds this factor times its cells per token: both grow with heads, tokens and dim
_LAUNCHES = (3.5e-3, 8e-3)  # but at least these seconds, in which the host launches it
_FLASH_FROM = (10e-3, 18e-3)  # dense seconds from which FlashAttention-4 gains more than its launches cost


def choose_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule | Selection,
    tail: Tail | None = None,
    ranks: int = 1,
) -> Literal["tiles", "packed", "shared", "dense"]:
    """What ``dispatch="auto"`` runs; see ``vmoba_attention``.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks.
        rule: ``TopK`` or ``Threshold``, or what was chosen before.
        tail: how skipped blocks take part; None if they do not.
        ranks: how many share the call. All make the same choice.

    Returns:
        ``"tiles"``, ``"packed"`` or ``"dense"``; ``"shared"`` for what query tiles chose.
    """
    if isinstance(rule, Selection):
        if rule.choice == "tile":
            return "shared"
        unbounded = rule.bounds.rows is None
    else:
        unbounded = isinstance(rule, Threshold) and rule.max_density is None
    compiled = torch.compiler.is_compiling()
    if not query.is_cuda:
        # FlexAttention's kernel for CPUs is the fastest, where it runs.
        return "tiles" if compiled and (unbounded or has_flex_kernel(query, key, value)) else "packed"
    if query.dtype == torch.float64 or max(query.shape[-1], value.shape[-1]) > 256:
        return "tiles"
    dense, backward = _dense_seconds(query, key, value, partition)
    if not packed_wins(dense / ranks, backward, rule, partition, tail):
        return "dense"
    return "tiles" if unbounded and compiled else "packed"


def _dense_seconds(query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition) -> tuple[float, bool]:
    """Seconds of the fastest dense peer for all tokens and these heads, and whether they include backward."""
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return dense_seconds(query.shape[0] * query.shape[1], partition.num_tokens, query.shape[-1], backward), backward


def dense_seconds(heads: int, tokens: int, head_dim: int, backward: bool) -> float:
    """Estimated seconds of the fastest dense peer on a GPU; ``heads`` are those of all samples."""
    return 4 * heads * tokens**2 * head_dim / _DENSE_RATE * (_BACKWARD if backward else 1)


def packed_share(rule: Rule | Selection, partition: BlockPartition, tail: Tail | None, backward: bool = False) -> float:
    """Estimated time of ``"packed"`` as a share of the dense peer's, at the largest density that the rule allows."""
    constant, factor = _SHARE
    density = rule.bounds.density if isinstance(rule, Selection) else largest_density(rule, partition.num_blocks)
    share = constant + factor * density
    if tail is None:
        return share
    return share + _TAIL_SHARE[int(backward)] * Cells(partition, tail.cell_of(partition)).total / partition.num_tokens


def packed_wins(
    dense: float, backward: bool, rule: Rule | Selection, partition: BlockPartition, tail: Tail | None
) -> bool:
    """Whether ``"auto"`` expects ``"packed"`` to beat a dense peer that takes ``dense`` seconds."""
    return max(_LAUNCHES[int(backward)], packed_share(rule, partition, tail, backward) * dense) < dense


def choose_backend(
    backend: Backend,
    dispatch: Dispatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    padded: bool = False,
) -> ChosenBackend:
    """The backend that a dispatch runs on; ``padded``: whether the call has text lengths.

    Raises:
        ValueError: if ``backend`` cannot run here.
    """
    if not query.is_cuda:
        if backend != "auto":
            raise ValueError(f"backend must be 'auto' on device {query.device}, got {backend!r}")
        return "eager"
    if dispatch == "packed" and query.dtype == torch.float64:
        if backend != "auto":
            raise ValueError(f"backend must be 'auto' for dispatch='packed' and dtype torch.float64, got {backend!r}")
        return "eager"
    dense, backward = _dense_seconds(query, key, value, partition)
    if backend == "triton" or (backend == "auto" and dense < _FLASH_FROM[int(backward)]):
        return "triton"
    refusal = _flash_refusal(dispatch, query, key, value, partition, padded, backward)
    if backend == "flash" and refusal:
        raise ValueError(f"backend must be 'auto' or 'triton' here, got 'flash': {refusal}")
    return "triton" if refusal else "flash"


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
