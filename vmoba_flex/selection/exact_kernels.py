"""Exact block masses in Triton, loaded on first use on a CUDA device: one pass over q . k, without values.

Keys lie in slots, each group in whole tiles, so that a tile of keys belongs to one group. A program holds a tile of
queries and passes over all tiles of keys in one flat loop; where a group begins, its maximum and sum begin anew.

B batch, H heads, S tokens, N blocks, D head dim; G groups of keys: the blocks, then prefix and suffix as one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from block_masks import Slots, to_slots
from block_masks.attention.launches import dot_precision
from block_masks.launching import architecture
from vmoba_flex.groups import block_slots
from vmoba_flex.partition import BlockPartition

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e30)  # a finite stand-in for -inf, whose difference with itself is a number
_LEAST_SCALE = 1e-30  # masked scores are -inf before scaling, and a scale of zero would make them NaN


@triton.jit
def _block_lse_kernel(
    query, keys, tile_group, tile_keys, lse, stride_batch, stride_head, stride_token, stride_dim,
    heads, repeats, before, count, groups, token_tiles, tiles, head_slots, keys_stride, scale,
    MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of one head's queries over each group of keys; ``scale`` > 0."""
    head = (tl.program_id(0) // token_tiles).to(tl.int64)
    first = (tl.program_id(0) % token_tiles).to(tl.int64) * BLOCK_M
    row, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = row < tl.minimum(count - first, BLOCK_M).to(tl.int32)
    start = query + head // heads * stride_batch + head % heads * stride_head + (before + first) * stride_token
    at = start + row[:, None].to(tl.int64) * stride_token + dim[None, :] * stride_dim
    q = tl.load(at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    factor = scale * _LOG2E
    # Counting heads over all samples gives the right key head, since each sample has the same number.
    slot = (head // repeats * head_slots).to(tl.int32)
    tile_keys += head // heads * keys_stride
    out = lse + head * groups * count + first + row
    top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    group = tl.load(tile_group)
    for tile in range(tiles):
        if TMA:
            k = keys.load([slot + tile * BLOCK_N, 0])
        else:
            place = (slot + tile * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
            k = tl.load(keys + place[:, None] * D + dim[None, :], mask=(dim < D)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASK:
            score = tl.where(tl.arange(0, BLOCK_N)[None, :] < tl.load(tile_keys + tile), score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1) * factor)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score * factor - higher[:, None]), 1)
        # The group after this tile's; -1 after the last.
        after = tl.load(tile_group + tile + 1)
        ends = after != group
        mask = inside & ends
        tl.store(out + group * count, (higher + tl.log2(total)) * _LN2, mask=mask)
        top = tl.where(ends, _LOWEST, higher)
        total = tl.where(ends, 0.0, total)
        group = after


class Launch(NamedTuple):
    """Queries and keys of a tile, warps, stages, and whether keys are read through a descriptor."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool


# Of those timed on an H200 the first is the fastest (bench/NOTES.md).
HOPPER, SMALL, WIDE, FLOAT32 = (
    Launch(128, 128, 8, 2, True),  # room for two programs at once, so that one multiplies while one takes powers
    Launch(64, 64, 4, 3, False),
    Launch(64, 64, 4, 2, False),
    Launch(64, 32, 4, 1, False),
)


def launch_of(query: Tensor) -> Launch:
    """How the kernel is launched for such queries."""
    if query.dtype == torch.float32:
        return FLOAT32
    if query.shape[-1] > 128:
        return WIDE
    hopper = architecture.architecture_of(query.device) == "sm90"
    # Descriptors need rows of whole 16 bytes.
    return HOPPER if hopper and query.shape[-1] % 8 == 0 else SMALL


def group_lse(
    query: Tensor, key: Tensor, partition: BlockPartition, before: int, count: int, scale: float, groups: int,
    text_lengths: Tensor | None = None, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """``exact_gate.group_lse``, any strides; ``launch``: None for the best."""
    m, n, warps, stages, tma = launch or launch_of(query)
    if scale < 0:  # the maximum is taken before scaling
        query, scale = -query, -scale
    slots = block_slots(partition, key.device, n)
    batch, heads, _, dim = query.shape
    lse = torch.empty(batch, heads, groups, count, dtype=torch.float32, device=query.device)
    in_slots = to_slots(key, slots).contiguous()
    tiles = sum(-(-size // n) for size in slots.group_sizes[:groups])
    tile_keys = _tile_keys(slots, text_lengths)
    masked = text_lengths is not None or any(size % n for size in slots.group_sizes[:groups])
    padded = max(16, triton.next_power_of_2(dim))
    keys: object = in_slots
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        rows = in_slots.flatten(0, 2)
        keys = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [n, padded])
    token_tiles = triton.cdiv(count, m)
    _block_lse_kernel[batch * heads * token_tiles,](
        query, keys, F.pad(slots.tile_group.int(), (0, 1), value=-1), tile_keys, lse, *query.stride(),
        heads, heads // key.shape[1], before, count, groups, token_tiles, tiles, in_slots.shape[2],
        tile_keys.stride(0) if len(tile_keys) > 1 else 0, max(scale, _LEAST_SCALE),
        MASK=masked, D=dim, BLOCK_D=padded, BLOCK_M=m, BLOCK_N=n, TMA=tma,
        PRECISION=dot_precision(architecture.architecture_of(query.device), query.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return lse


def _tile_keys(slots: Slots, text_lengths: Tensor | None) -> Tensor:
    """The valid keys of each tile, int32 ``(1 or B, tiles)``: the first ones, possibly none of a tile of text."""
    if text_lengths is None:
        return slots.tile_keys.int()[None]
    text = len(slots.group_sizes) - 1
    tile = torch.arange(len(slots.tile_group), device=text_lengths.device)
    left = text_lengths[:, None] - (tile * slots.tile_size - slots.first_slot[text])
    valid = torch.minimum(left.clamp(min=0), slots.tile_keys)
    return torch.where(slots.tile_group == text, valid, slots.tile_keys).int()
