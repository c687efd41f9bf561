"""Triton kernels that move keys and values to slots as they take the means of cells, loaded on first use on a GPU.

Shapes: ``B`` batch, ``H`` key heads, ``S`` tokens, ``C`` cells, ``D`` head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.cell_kernels import axis_place, cell_of_token, geometry
from vmoba_flex.tail import Cells

_TOKENS, _WARPS = 64, 2  # that a program of a cell reads at once, and its warps (bench/NOTES.md)
_ROWS = 32  # tokens or slots of a program of the others


@triton.jit
def _move_tile(
    x, in_slots, token, slot, inside, batch, head, heads, slots, stride_batch, stride_head, stride_token, stride_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Moves some tokens of one head to their slots, and returns them; zeros where no token is ``inside``."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    at = x + batch * stride_batch + head * stride_head + token[:, None].to(tl.int64) * stride_token + dim * stride_dim
    rows = tl.load(at, mask=inside[:, None] & (dim < D), other=0.0)
    to = in_slots + ((batch * heads + head) * slots + slot)[:, None] * D + dim
    tl.store(to, rows, mask=(slot >= 0)[:, None] & (dim < D))
    return rows


@QuickLaunch
@triton.jit
def _slots_and_means_kernel(
    key, value, key_slots, value_slots, key_means, value_means, bias, group, slot_key, key_slot,
    key_batch, key_head, key_token, key_dim, value_batch, value_head, value_token, value_dim,
    heads, tokens, slots, alike, prefix,
    frames, height, width, bt, bh, bw, many_t, many_y, many_x, grid_y, grid_x, cells,
    blocks_y, blocks_x, CT: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The first programs have a cell of one head each; the others have slots, which get text, or zero.

    Those of the first head also write the cells' biases and blocks, see ``cells.cell_groups``.

    A cell's shape is constant, so that no program divides by a variable.
    """
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    slot_key += row // alike * slots
    key_slot += row // alike * tokens
    if tl.program_id(0) < cells:
        cell = tl.program_id(0)
        first_t, nt, block_t = axis_place(cell // (grid_y * grid_x), frames, bt, many_t, CT)
        first_y, ny, block_y = axis_place(cell // grid_x % grid_y, height, bh, many_y, CH)
        first_x, nx, block_x = axis_place(cell % grid_x, width, bw, many_x, CW)
        if row == 0:
            tl.store(bias + cell, tl.log((nt * ny * nx).to(tl.float32)))
            tl.store(group + cell, ((block_t * blocks_y + block_y) * blocks_x + block_x).to(tl.int64))
        key_total, value_total = tl.zeros((TOKENS, BLOCK_D), tl.float32), tl.zeros((TOKENS, BLOCK_DV), tl.float32)
        for first in range(0, CT * CH * CW, TOKENS):
            member = first + tl.arange(0, TOKENS)
            t, y, x = member // (CH * CW), member // CW % CH, member % CW
            inside = (t < nt) & (y < ny) & (x < nx)
            token = prefix + ((first_t + t) * height + first_y + y) * width + first_x + x
            slot = tl.load(key_slot + token, mask=inside, other=-1)
            key_total += _move_tile(
                key, key_slots, token, slot, inside, batch, head, heads, slots,
                key_batch, key_head, key_token, key_dim, D, BLOCK_D,
            ).to(tl.float32)  # fmt: skip
            value_total += _move_tile(
                value, value_slots, token, slot, inside, batch, head, heads, slots,
                value_batch, value_head, value_token, value_dim, DV, BLOCK_DV,
            ).to(tl.float32)  # fmt: skip
        size = (nt * ny * nx).to(tl.float32)
        at, dim, of_value = row * cells + cell, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        mean = (tl.sum(key_total, 0) / size).to(key_means.dtype.element_ty)
        tl.store(key_means + at * D + dim, mean, mask=dim < D)
        mean = (tl.sum(value_total, 0) / size).to(value_means.dtype.element_ty)
        tl.store(value_means + at * DV + of_value, mean, mask=of_value < DV)
    else:
        slot = (tl.program_id(0) - cells) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        token = tl.load(slot_key + slot, mask=slot < slots, other=prefix)
        text = (token >= 0) & ((token < prefix) | (token >= prefix + frames * height * width))
        to = tl.where((slot < slots) & (text | (token < 0)), slot, -1)
        _move_tile(
            key, key_slots, token, to, text, batch, head, heads, slots,
            key_batch, key_head, key_token, key_dim, D, BLOCK_D,
        )  # fmt: skip
        _move_tile(
            value, value_slots, token, to, text, batch, head, heads, slots,
            value_batch, value_head, value_token, value_dim, DV, BLOCK_DV,
        )  # fmt: skip


@triton.jit
def _gather_tile(
    in_slots, means, out, row, token, slot, cell, share, slots, cells, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The gradient of some tokens of one head: that of their slots, and their share of their cells' means'."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (slot >= 0)[:, None] & (dim < D)
    x = tl.load(in_slots + (row * slots + slot)[:, None] * D + dim, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(means + (row * cells + cell)[:, None] * D + dim, mask=(cell >= 0)[:, None] & (dim < D), other=0.0)
    x += (mean.to(tl.float32) * share[:, None]).to(mean.dtype).to(tl.float32)
    to = out + (row * tokens + token)[:, None] * D + dim
    tl.store(to, x.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (dim < D))


@QuickLaunch
@triton.jit
def _backward_kernel(
    key_slots, value_slots, key_means, value_means, grad_key, grad_value, key_slot, slots, tokens, alike, prefix,
    frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw, grid_y, grid_x, cells,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    slot = tl.load(key_slot + row // alike * tokens + token, mask=inside, other=-1)
    cell, part = cell_of_token(
        token - prefix, frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw, grid_y, grid_x
    )
    _gather_tile(key_slots, key_means, grad_key, row, token, slot, cell, part, slots, cells, tokens, D, BLOCK_D)
    _gather_tile(value_slots, value_means, grad_value, row, token, slot, cell, part, slots, cells, tokens, DV, BLOCK_DV)


def slots_and_means(key: Tensor, value: Tensor, slot_key: Tensor, key_slot: Tensor, cells: Cells) -> list[Tensor]:
    """See ``cell_slots.slots_and_cells``; any strides of key and value.

    Args:
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, value dim)``.
        slot_key: int64 ``(slots,)`` or ``(B, slots)``, the token of each slot, -1 where there is none.
        key_slot: int64 ``(S,)`` or ``(B, S)``, the slot of each token, -1 where there is none.
        cells: of the tokens.
    """
    batch, heads, tokens, dim = key.shape
    value_dim, slots, partition = value.shape[3], slot_key.shape[-1], cells.partition
    outputs = [
        torch.empty(batch, heads, count, x.shape[3], dtype=x.dtype, device=x.device)
        for count in (slots, cells.total)
        for x in (key, value)
    ]
    outputs.append(torch.empty(cells.total, dtype=torch.float32, device=key.device))
    outputs.append(torch.empty(cells.total, dtype=torch.int64, device=key.device))
    rest = slots != partition.num_video_tokens or slot_key.dim() > 1
    before, after = geometry(cells)
    ct, ch, cw = cells.cell
    _slots_and_means_kernel[cells.total + rest * triton.cdiv(slots, _ROWS), batch * heads](
        key, value, *outputs, slot_key.contiguous(), key_slot.contiguous(), *key.stride(), *value.stride(),
        heads, tokens, slots, batch * heads * tokens // key_slot.numel(), partition.prefix, *before, *after,
        *partition.cells[1:], CT=ct, CH=ch, CW=cw, TOKENS=min(_TOKENS, triton.next_power_of_2(ct * ch * cw)),
        ROWS=_ROWS, D=dim, BLOCK_D=triton.next_power_of_2(dim),
        DV=value_dim, BLOCK_DV=triton.next_power_of_2(value_dim), num_warps=_WARPS,
    )  # fmt: skip
    return outputs


def slots_and_means_backward(
    in_slots: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor], key_slot: Tensor, cells: Cells
) -> list[Tensor]:
    """The adjoint of ``slots_and_means``; gradients of its outputs, contiguous."""
    batch, heads, slots, dim = in_slots[0].shape
    tokens, value_dim = key_slot.shape[-1], in_slots[1].shape[3]
    before, after = geometry(cells)
    grads = [torch.empty(batch, heads, tokens, x.shape[3], dtype=x.dtype, device=x.device) for x in in_slots]
    _backward_kernel[triton.cdiv(tokens, _ROWS), batch * heads](
        *in_slots, *means, *grads, key_slot.contiguous(), slots, tokens,
        batch * heads * tokens // key_slot.numel(), cells.partition.prefix, *before, *cells.cell, *after,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), DV=value_dim, BLOCK_DV=triton.next_power_of_2(value_dim),
        ROWS=_ROWS,
    )  # fmt: skip
    return grads
