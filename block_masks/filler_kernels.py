"""Triton form of taking filling slots out of attention, loaded on first use on a CUDA device."""

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.attend_kernels import dot_width
from block_masks.row_kernels import take_slots

__all__ = ["leave_out", "take_slots"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _leave_out_kernel(
    query, last_keys, fillers, selected, output, lse, kept, kept_lse,
    scale, heads, rows, groups, repeats, together,
    selected_batch, selected_head, selected_row, selected_group, output_batch, output_head, output_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = head * rows + row
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    q = tl.load(query + place[:, None] * D + dim, mask=inside[:, None] & (dim < D), other=0.0)
    whole = tl.load(lse + place, mask=inside, other=0.0)
    choices = selected + head // heads * selected_batch + head % heads * selected_head
    choices += (row // together * selected_row)[:, None]
    share = tl.zeros((ROWS,), tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        count = tl.load(fillers + group, mask=group < groups, other=0)
        there = (count > 0)[None, :] & inside[:, None]
        chosen = tl.load(choices + group[None, :] * selected_group, mask=there, other=0).to(tl.int1)
        k = tl.load(
            last_keys + (head // repeats * groups + group[:, None]) * D + dim,
            mask=(group < groups)[:, None] & (dim < D), other=0.0,
        )  # fmt: skip
        score = tl.dot(q, k.T, input_precision=PRECISION) * scale - whole[:, None]
        share += tl.sum(tl.where(chosen, tl.exp2(score * _LOG2E) * count[None, :].to(tl.float32), 0.0), 1)
    left = 1 - share
    source = output + head // heads * output_batch + head % heads * output_head
    mask = inside[:, None] & (value_dim < DV)
    x = tl.load(source + row[:, None] * output_row + value_dim, mask=mask, other=0.0).to(tl.float32)
    tl.store(kept + place[:, None] * DV + value_dim, (x / left[:, None]).to(kept.dtype.element_ty), mask=mask)
    tl.store(kept_lse + place, whole + tl.log(left), mask=inside)


def leave_out(
    query: Tensor, last_keys: Tensor, fillers: Tensor, selected: Tensor, output: Tensor, lse: Tensor,
    scale: float, together: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``slot_steps.leave_out``."""
    (batch, heads, rows, dim), value_dim = query.shape, output.shape[-1]
    kept, kept_lse = output.new_empty(output.shape), lse.new_empty(lse.shape)
    assert output.stride(3) == 1  # its other dims come as the kernel before left them
    _leave_out_kernel[triton.cdiv(rows, 128), batch * heads](
        query.contiguous(), last_keys.contiguous(), fillers, selected, output, lse.contiguous(), kept, kept_lse,
        scale, heads, rows, selected.shape[-1], heads // last_keys.shape[1], together,
        *selected.stride(), *output.stride()[:3],
        D=dim, BLOCK_D=dot_width(dim), DV=value_dim, BLOCK_DV=dot_width(value_dim),
        ROWS=128, GROUPS=16, PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee", num_warps=8,
    )  # fmt: skip
    return kept, kept_lse
