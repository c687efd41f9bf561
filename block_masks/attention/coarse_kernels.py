"""Triton forms of the steps with coarse keys, loaded on first use on a CUDA device.

Shapes: ``H`` heads of all samples, ``S`` queries, ``C`` coarse keys, ``G`` groups, ``W = ceil(C / 64)`` words.
"""

import functools
from typing import Literal

import torch
import triton
from torch import Tensor

from block_masks.attention.attend_kernels import dot_width
from block_masks.attention.coarse_backward_kernels import (
    key_backward_kernel,
    query_backward_kernel,
    split_kernel,
    sum_parts_kernel,
)
from block_masks.attention.coarse_forward_kernels import merge_kernel, words_kernel
from block_masks.attention.coarse_steps import CoarseKeys
from block_masks.attention.launches import Tile, coarse_launch, dot_precision
from block_masks.launching import architecture

_WORD_BITS = 64  # the kernels spell it out
_ROWS = 1024  # that one program packs (bench/NOTES.md)
# The gradient of coarse keys has this many programs a multiprocessor: each sums over a part of the queries.
_WAVES = 2
# Weights that a dtype holds next to a weight of 1, with room for the values that they are multiplied by.
_LIMITS = {torch.float16: 2.0**15, torch.bfloat16: 2.0**60, torch.float32: 2.0**60}


def pack_words(coarse: CoarseKeys, selected: Tensor) -> tuple[Tensor, Tensor]:
    """What kernels take of the choices and the bias.

    Args:
        coarse: its group and bias are read.
        selected: bool ``(H, rows, G)``, any strides.

    Returns:
        The bias in base 2, float32 ``(64 * W,)``, and which coarse keys each row attends, int64 ``(H, W, rows)``; see
        ``coarse_forward_kernels.py`` for the order of the bits.
    """
    heads, rows, _ = selected.shape
    cells, device = len(coarse.bias), selected.device
    words = torch.empty(heads, triton.cdiv(cells, _WORD_BITS), rows, dtype=torch.int64, device=device)
    log2_bias = torch.empty(words.shape[1] * _WORD_BITS, dtype=torch.float32, device=device)
    words_kernel[triton.cdiv(rows, _ROWS), words.shape[1], heads](
        coarse.group, coarse.bias, selected.view(torch.uint8), words, log2_bias, rows, cells, *selected.stride(),
        ROWS=_ROWS, num_warps=1,
    )  # fmt: skip
    return log2_bias, words


def merge_coarse(
    query: Tensor, coarse: CoarseKeys, selected: Tensor, output: Tensor, lse: Tensor, merged: tuple[Tensor, Tensor],
    scale: float, together: int = 1,
) -> None:  # fmt: skip
    """See ``coarse_steps.merge_coarse``; query, output and lse contiguous."""
    options = _options("merge", query, coarse)
    merge_kernel[triton.cdiv(query.shape[1], options["BLOCK_M"]), len(query)](
        *_inputs(query, coarse, selected), output, lse, *merged, *_sizes(query, coarse, selected, scale, together),
        LIMIT=_LIMITS[query.dtype], **options,
    )  # fmt: skip


def coarse_backward(
    query: Tensor, coarse: CoarseKeys, selected: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, grad_query: Tensor,
    scale: float, together: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``coarse_steps.coarse_backward``; all but ``selected`` contiguous."""
    inputs = *_inputs(query, coarse, selected), grad, lse, delta
    sizes = _sizes(query, coarse, selected, scale, together)
    heads, queries, dim = query.shape
    options = _options("query", query, coarse)
    query_backward_kernel[triton.cdiv(queries, options["BLOCK_M"]), heads](*inputs, grad_query, *sizes, **options)
    options = _options("key", query, coarse)
    cells, value_dim = len(coarse.bias), coarse.value.shape[-1]
    tiles = triton.cdiv(cells, options["BLOCK_N"])
    row_tiles = triton.cdiv(queries, options["BLOCK_M"])
    wanted = max(1, _WAVES * _multiprocessors(query.device) // (tiles * heads))
    part_rows = triton.cdiv(row_tiles, wanted) * options["BLOCK_M"]
    parts = triton.cdiv(queries, part_rows)
    sums = [query.new_empty(parts, heads, cells, d, dtype=torch.float32) for d in (dim, value_dim)]
    key_backward_kernel[tiles * parts, heads](*inputs, *sums, *sizes, heads, part_rows, parts, **options)
    grads = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    sum_parts_kernel[triton.cdiv(cells, 16), len(coarse.key)](
        *sums, *grads, heads, cells, heads // len(coarse.key), parts,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), DV=value_dim, BLOCK_DV=triton.next_power_of_2(value_dim), BLOCK=16,
    )  # fmt: skip
    return grads


def split_grad(grad: Tensor, output: Tensor, lse: Tensor, merged_lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """See ``coarse_steps.split_grad``; all contiguous."""
    grad_output, grad_lse, dim = torch.empty_like(grad), torch.empty_like(lse), grad.shape[-1]
    split_kernel[triton.cdiv(lse.numel(), 32),](
        grad, output, lse, merged_lse, delta, grad_output, grad_lse, lse.numel(),
        DV=dim, BLOCK_DV=max(8, triton.next_power_of_2(dim)), ROWS=32,
    )  # fmt: skip
    return grad_output, grad_lse


def _options(kernel: Literal["merge", "query", "key"], query: Tensor, coarse: CoarseKeys) -> dict[str, object]:
    dim, value_dim = query.shape[-1], coarse.value.shape[-1]
    where, widths = architecture.architecture_of(query.device), (dot_width(dim), dot_width(value_dim))
    tile: Tile = getattr(coarse_launch(where, max(widths), query.dtype), kernel)
    return {
        "D": dim, "BLOCK_D": widths[0], "DV": value_dim, "BLOCK_DV": widths[1],
        "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "PRECISION": dot_precision(where, query.dtype),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _inputs(query: Tensor, coarse: CoarseKeys, selected: Tensor) -> tuple[Tensor, ...]:
    key, value, bias = (x.contiguous() for x in coarse[:3])
    return query, key, value, *pack_words(coarse._replace(bias=bias), selected)


def _sizes(query: Tensor, coarse: CoarseKeys, selected: Tensor, scale: float, together: int) -> tuple[float | int, ...]:
    return scale, query.shape[1], len(coarse.bias), len(query) // len(coarse.key), together, selected.shape[1]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
