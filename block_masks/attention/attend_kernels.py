"""Launches of the Triton kernels of attention over packed rows, loaded on first use on a CUDA device.

A tile of rows holds queries that chose one group of keys, so a program runs a plain dense loop over that group's slots.
Backward works with the merged output and log-sum-exp of each query: ``p = exp(score - lse)`` already holds the weight
of a row in its query, so neither the rows' outputs nor their log-sum-exps are needed again. No atomics: each program
owns what it writes, and two runs give the same bits.
"""

import functools
from typing import Literal

import torch
import triton
from torch import Tensor

from block_masks.attention.attend_backward_kernels import row_key_backward_kernel, row_query_backward_kernel
from block_masks.attention.attend_forward_kernels import row_forward_kernel
from block_masks.attention.launches import Tile, attend_launch, dot_precision
from block_masks.attention.row_steps import Merged
from block_masks.launching import architecture
from block_masks.plans import move_kernels
from block_masks.plans.section import Section


class _Launch:
    """What the three kernels share: dims, tile shapes and how they read tiles."""

    def __init__(
        self, kernel: Literal["forward", "query", "key"], rows: Tensor, values: Tensor, tile_size: int
    ) -> None:
        dim, value_dim = rows.shape[-1], values.shape[-1]
        padded, value_padded = dot_width(dim), dot_width(value_dim)
        where = architecture.architecture_of(rows.device)
        launch = attend_launch(where, max(padded, value_padded), rows.dtype)
        tile: Tile = getattr(launch, kernel)
        self.block_m, self.block_n = min(tile.rows, tile_size), min(tile.keys, tile_size)
        # Descriptors need rows of whole 16 bytes.
        self.tma = launch.descriptors and all(d * rows.element_size() % 16 == 0 for d in (dim, value_dim))
        self.options = {
            "D": dim, "BLOCK_D": padded, "DV": value_dim, "BLOCK_DV": value_padded,
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "TILE": tile_size, "TMA": self.tma,
            "PRECISION": dot_precision(where, rows.dtype), "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    def tiles(self, x: Tensor, count: int) -> object:
        """``x (..., D)`` as the kernels take it, read ``count`` rows at a time."""
        if not self.tma:
            return x
        from triton.tools.tensor_descriptor import TensorDescriptor

        x = x.flatten(0, -2)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [count, dot_width(x.shape[1])])


def dot_width(dim: int) -> int:
    """The least width of a tile that holds ``dim`` and that ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(dim))


_LEAST_SCALE = 1e-30


def forward(query: Tensor, keys: Tensor, values: Tensor, section: Section, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a section's rows; see ``row_steps.forward``."""
    # Masked scores are -inf before scaling, and a scale of zero would make them NaN.
    scale = scale if abs(scale) > _LEAST_SCALE else _LEAST_SCALE
    rows = len(section.row_query)
    output = query.new_empty(rows, values.shape[-1])
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    launch = _Launch("forward", query, values, section.plan.tile_size)
    row_forward_kernel[rows // launch.block_m,](
        query, launch.tiles(keys, launch.block_n), launch.tiles(values, launch.block_n),
        section.row_query, section.row_pool, section.slots.first_slot, section.pool_lengths, output, lse,
        scale, section.groups, len(query) // len(keys), keys.shape[1], **launch.options,
    )  # fmt: skip
    return output, lse


def backward(
    query: Tensor, keys: Tensor, values: Tensor, merged: Merged, grads: tuple[Tensor, Tensor], section: Section,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gradients through a section's rows; see ``row_steps.backward``."""
    # Gathered once: reading rows where the queries lie costs the loop over rows more than a third of its speed.
    take = functools.partial(move_kernels.take_rows, row_query=section.row_query, row_pool=section.row_pool)
    rows, row_grads = take(query.flatten(0, 1)), take(merged.grad.flatten(0, 1))
    row_lse, row_delta = take(merged.lse.flatten(), fill=torch.inf), take(merged.delta.flatten())
    plan, slots, pools = section.plan, section.slots, (section.slots.first_slot, section.pool_lengths)
    groups, repeats, head_slots = section.groups, len(query) // len(keys), keys.shape[1]
    grad_rows = torch.empty_like(rows)

    def tiles(launch: _Launch) -> list[object]:
        counts = launch.block_m, launch.block_n, launch.block_n, launch.block_m
        return [launch.tiles(x, n) for x, n in zip((rows, keys, values, row_grads), counts, strict=True)]

    launch = _Launch("query", rows, values, plan.tile_size)
    row_query_backward_kernel[len(rows) // launch.block_m,](
        *tiles(launch), row_lse, row_delta, section.row_pool, *pools, grad_rows, scale, groups, repeats, head_slots,
        **launch.options,
    )  # fmt: skip
    launch = _Launch("key", rows, values, plan.tile_size)
    row_key_backward_kernel[section.heads * head_slots // launch.block_n,](
        *tiles(launch), row_lse, row_delta, plan.first_tile, plan.tiles, slots.tile_group, *pools, *grads,
        scale, section.first_head, groups, repeats, head_slots, **launch.options,
    )  # fmt: skip
    return grad_rows
