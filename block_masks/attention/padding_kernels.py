"""Triton forms of taking padding slots out of attention, loaded on first use on a CUDA device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.attention.attend_kernels import dot_width
from block_masks.attention.launches import dot_precision
from block_masks.attention.row_kernels import share_left
from block_masks.launching import architecture
from block_masks.launching.launch import QuickLaunch
from block_masks.plans.move_kernels import take_slots

__all__ = ["padding_lse", "remove_padding", "take_slots"]

_LOG2E = tl.constexpr(1.4426950408889634)


@QuickLaunch
@triton.jit
def _padding_lse_kernel(
    query, last_keys, padding, selected, padding_lse,
    scale, heads, rows, groups, repeats, together, alike, batch_step, head_step, row_step, group_step,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = head * rows + row
    dim = tl.arange(0, BLOCK_D)[None, :]
    q = tl.load(query + place[:, None] * D + dim, mask=inside[:, None] & (dim < D), other=0.0)
    choices = selected + head // heads * batch_step + head % heads * head_step + (row // together * row_step)[:, None]
    last_keys += head // repeats * groups * D
    padding += head // alike * groups
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        count = tl.load(padding + group, mask=group < groups, other=0)
        there = (count > 0)[None, :] & inside[:, None]
        chosen = tl.load(choices + group[None, :] * group_step, mask=there, other=0).to(tl.int1)
        k = tl.load(last_keys + group[:, None] * D + dim, mask=(group < groups)[:, None] & (dim < D), other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION) * scale + tl.log(tl.maximum(count, 1).to(tl.float32))[None, :]
        score = tl.where(chosen, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2((top - base) * _LOG2E) + tl.sum(tl.exp2((score - base[:, None]) * _LOG2E), 1)
        top = new_top
    log_sum = tl.where(top == -float("inf"), 0.0, top) + tl.log(tl.where(total == 0, 1.0, total))
    tl.store(padding_lse + place, tl.where(total == 0, -float("inf"), log_sum), mask=inside)


def padding_lse(
    query: Tensor, last_keys: Tensor, padding: Tensor, selected: Tensor, scale: float, together: int
) -> Tensor:
    """See ``slot_steps.padding_lse``."""
    batch, heads, rows, dim = query.shape
    result = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _padding_lse_kernel[triton.cdiv(rows, 128), batch * heads](
        query.contiguous(), last_keys.contiguous(), padding.contiguous(), selected, result,
        scale, heads, rows, selected.shape[-1], heads // last_keys.shape[1], together,
        batch * heads // len(padding), *selected.stride(),
        D=dim, BLOCK_D=dot_width(dim), ROWS=128, GROUPS=16,
        PRECISION=dot_precision(architecture.architecture_of(query.device), query.dtype), num_warps=8,
    )  # fmt: skip
    return result


@QuickLaunch
@triton.jit
def _remove_padding_kernel(
    output, lse, padding_lse, kept_lse, rows, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    dim = tl.arange(0, BLOCK_DV)[None, :]
    place, mask = row[:, None] * DV + dim, inside[:, None] & (dim < DV)
    x = tl.load(output + place, mask=mask, other=0.0).to(tl.float32)
    whole = tl.load(lse + row, mask=inside, other=0.0)
    left = share_left(whole, tl.load(padding_lse + row, mask=inside, other=0.0))
    tl.store(output + place, (x / left[:, None]).to(output.dtype.element_ty), mask=mask)
    tl.store(kept_lse + row, whole + tl.log(left), mask=inside)


def remove_padding(output: Tensor, lse: Tensor, padding_lse: Tensor) -> Tensor:
    """See ``slot_steps.remove_padding``."""
    assert output.is_contiguous()
    assert lse.is_contiguous()
    # In place only what one thread reads and writes. Several threads read the log-sum-exp of a row, and one might write
    # it before another has read it. So it would be with values, were there fewer in a program than threads.
    dim, kept_lse = output.shape[-1], torch.empty_like(lse)
    _remove_padding_kernel[triton.cdiv(lse.numel(), 32),](
        output, lse, padding_lse, kept_lse, lse.numel(),
        DV=dim, BLOCK_DV=max(8, triton.next_power_of_2(dim)), ROWS=32,
    )  # fmt: skip
    return kept_lse
