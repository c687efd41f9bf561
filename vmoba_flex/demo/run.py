"""Run full attention and the three VMoBA layer kinds on one query, key and value, and measure what each does."""

import functools
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vmoba_flex import BlockPartition, Threshold, TopK, reference, vmoba_mask, vmoba_selection
from vmoba_flex.compiled import compiled_flex_attention
from vmoba_flex.user_error import UserError

TILE = 128
"""Queries and keys of a FlexAttention tile."""

REPEATS = 5
ROWS_PER_CHECK = 512


@dataclass(frozen=True)
class LayerResult:
    """What one layer kind did; shares are means over heads.

    Attributes:
        kind: "full", "1D", "2D" or "3D".
        partition: the blocks.
        density: share of the (query, block) pairs attended.
        tile_density: share of the 128 x 128 tiles that had to run.
        recall: share of the full attention's probability mass that falls on attended keys.
        error: largest difference from dense masked attention in float64.
        seconds: median time of a call, choosing the blocks included.
        selection: bool (heads, tokens, blocks), raster order.
        tiles: int64 (heads, query tiles, key tiles), block order: 0 skipped, 1 partial, 2 full.
    """

    kind: str
    partition: BlockPartition
    density: float
    tile_density: float
    recall: float
    error: float
    seconds: float
    selection: Tensor
    tiles: Tensor


def check_toolchain() -> None:
    """Raise `UserError` where torch.compile would fail for want of a C++ compiler or of Python's headers."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl")):
        raise UserError("torch.compile needs a C++ compiler: install g++, or name one in the variable CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise UserError("torch.compile needs Python's headers: install them (the package python3-dev or alike)")


def layer_kinds(grid: tuple[int, int, int]) -> dict[str, BlockPartition]:
    """Full attention as one block, and the three kinds: up to 8 slabs, 3 x 4 windows, 2 x 3 x 4 cubes."""
    frames, height, width = grid
    window = (math.ceil(height / 3), math.ceil(width / 4))
    return {
        "full": BlockPartition(grid, grid),
        "1D": BlockPartition.temporal(grid, math.ceil(frames / 8)),
        "2D": BlockPartition.spatial(grid, window),
        "3D": BlockPartition.spatiotemporal(grid, (math.ceil(frames / 2), *window)),
    }


@torch.no_grad()
def run_layers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kinds: dict[str, BlockPartition],
    rule: Threshold | TopK,
    step: Callable[[str], None],
) -> list[LayerResult]:
    """Run each layer kind on the same inputs, check it against dense masked attention, and time it.

    Args:
        query: float32 (1, heads, tokens, head_dim), raster order.
        key: like query.
        value: like query.
        kinds: the partition of each layer kind, by name.
        rule: how blocks are chosen.
        step: called three times per kind, with a word on what is done next.

    Returns:
        One result per kind.
    """
    results = []
    _, full_lse = _dense(query, key, value)
    for kind, partition in kinds.items():
        step(f"{kind}: compile")
        layer = functools.partial(_layer, query, key, value, partition, rule)
        output, mask = layer()
        step(f"{kind}: time")
        seconds = median_seconds(layer)
        step(f"{kind}: check")
        selection = vmoba_selection(query, key, partition, rule)
        exact, lse = _dense(query, key, value, selection[..., partition.block_ids()])
        tiles = tile_map(mask)
        results.append(
            LayerResult(
                kind=kind,
                partition=partition,
                density=selection.float().mean().item(),
                tile_density=(tiles > 0).float().mean().item(),
                recall=(lse - full_lse).exp().mean().item(),
                error=(output - exact).abs().max().item(),
                seconds=seconds,
                selection=selection[0],
                tiles=tiles[0],
            )
        )
    return results


def _layer(
    query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, rule: Threshold | TopK
) -> tuple[Tensor, BlockMask]:
    """One VMoBA layer the plain way: the output in raster order, and the mask in block order.

    Only `flex_attention` is compiled, and all layer kinds share its kernel; a compiled `vmoba_attention` fuses the
    choice of blocks as well, but takes half a minute to compile for each kind.
    """
    query, key, value = (partition.to_block_order(x) for x in (query, key, value))
    mask = vmoba_mask(query, key, partition, rule, token_order="block", tile_size=TILE)
    return partition.to_raster_order(compiled_flex_attention(query, key, value, block_mask=mask)), mask


def tile_map(mask: BlockMask) -> Tensor:
    """What happens to each tile of a mask: int64 (B, heads, query tiles, key tiles), 0 skipped, 1 partial, 2 full."""
    assert mask.full_kv_num_blocks is not None  # vmoba_mask makes both lists
    assert mask.full_kv_indices is not None
    tiles = torch.zeros_like(mask.kv_indices, dtype=torch.int64)
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for state, (count, indices) in enumerate(lists, start=1):
        listed = torch.arange(indices.shape[-1]) < count[..., None]
        tiles += state * torch.zeros_like(tiles).scatter_add_(-1, indices.long(), listed.long())
    return tiles


def attention_of(query: Tensor, key: Tensor, token: int, head: int = 0) -> Tensor:
    """Full attention's probabilities of one query of one head, float32 (tokens,)."""
    scores = query[0, head, token] @ key[0, head].T / math.sqrt(query.shape[-1])
    return scores.softmax(-1)


def sdpa_seconds(query: Tensor, key: Tensor, value: Tensor) -> float:
    """Time of torch's `scaled_dot_product_attention` on the same inputs, for comparison."""
    with torch.no_grad():
        return median_seconds(functools.partial(F.scaled_dot_product_attention, query, key, value))


def median_seconds(call: Callable[[], object]) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense masked attention in float64 and the log-sum-exp of its scores."""
    # Some rows at a time: all the scores of a few heads in float64 would take gigabytes.
    parts = [
        reference.attention(query[:, :, rows], key, value, None if mask is None else mask[:, :, rows])
        for rows in torch.arange(query.shape[2]).split(ROWS_PER_CHECK)
    ]
    output, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return output, lse
