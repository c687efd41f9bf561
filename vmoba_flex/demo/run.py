"""Runs a model's layers on their own query, key and value, the plain way, and measures what each does."""

import functools
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from vmoba_flex import BlockPartition, Tail, Threshold, TopK, VMoBAConfig, reference, vmoba_mask, vmoba_selection
from vmoba_flex.demo.model import Grid, VideoTransformer
from vmoba_flex.demo.tailed import overlap, tail_of
from vmoba_flex.dispatch.compiled import compiled_flex_attention
from vmoba_flex.user_error import UserError

TILE = 128
"""Queries and keys of a FlexAttention tile."""

REPEATS = 3
CHECKED = 512
"""Queries, spread over the video, whose output is checked."""

_ROWS = 2048

NAMES = {"temporal": "1D", "spatial": "2D", "spatiotemporal": "3D"}

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LayerResult:
    """What one layer did; shares are means over heads.

    Attributes:
        layer: its index in the model.
        kind: "full", "1D", "2D" or "3D".
        partition: the blocks.
        rule: how they were chosen.
        density: share of the (query, block) pairs that are attended.
        tile_density: share of the 128 x 128 tiles that run.
        recall: share of full attention that falls on attended keys.
        tail: how skipped blocks take part in the run that has a tail; None if they do not.
        overlap: share of attention that this run and full attention give to the same keys, over 512 queries; see
            `vmoba_flex.insight.HeadReport`.
        error: largest difference from dense masked attention in float64, over 512 queries.
        seconds: median time of a call, which includes choosing the blocks.
        selection: bool (heads, tokens, blocks), raster order.
        tiles: int64 (heads, query tiles, key tiles), block order: 0 skipped, 1 partial, 2 full.
    """

    layer: int
    kind: str
    partition: BlockPartition
    rule: Threshold | TopK
    density: float
    tile_density: float
    recall: float
    tail: Tail | None
    overlap: float
    error: float
    seconds: float
    selection: Tensor = field(repr=False)
    tiles: Tensor = field(repr=False)


def check_toolchain() -> None:
    """Raises `UserError` if torch.compile would find no C++ compiler or no headers of Python."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl")):
        raise UserError("torch.compile needs a C++ compiler: install g++, or name one in the variable CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise UserError("torch.compile needs Python's headers: install them (the package python3-dev or alike)")


class PlainAttention(nn.Module):
    """A layer's attention the plain way: `flex_attention` with a mask. It equals `VMoBAAttention`.

    Only `flex_attention` is compiled, and all layers share its kernel. A compiled `vmoba_attention` would fuse the
    choice of blocks too, but takes half a minute to compile for each kind.
    """

    def __init__(self, config: VMoBAConfig, layer: int, num_layers: int) -> None:
        super().__init__()
        self.config, self.plan = config, config.layer(layer, num_layers)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        """The same as `VMoBAAttention.forward`."""
        return plain(query, key, value, self.config.partition(self.plan.kind, grid), self.plan.rule)[0]


def plain(
    query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, rule: Threshold | TopK
) -> tuple[Tensor, BlockMask]:
    """One layer's output in raster order, and its mask in block order."""
    query, key, value = (partition.to_block_order(x) for x in (query, key, value))
    mask = vmoba_mask(query, key, partition, rule, token_order="block", tile_size=TILE)
    output, _ = compiled_flex_attention(query, key, value, block_mask=mask)
    return partition.to_raster_order(output), mask


@torch.no_grad()
def layer_inputs(model: VideoTransformer, noisy: Tensor, level: Tensor) -> list[Inputs]:
    """Query, key and value of each layer, (B, heads, tokens, head_dim), as the model runs on a noisy video."""
    taken: list[Inputs] = []
    blocks: Any = model.blocks
    hooks = [block.attention.register_forward_pre_hook(lambda _, given: taken.append(given[:3])) for block in blocks]
    try:
        model(noisy, level)
    finally:
        for hook in hooks:
            hook.remove()
    return taken


@torch.no_grad()
def run_layers(inputs: list[Inputs], config: VMoBAConfig, grid: Grid, step: Callable[[str], None]) -> list[LayerResult]:
    """Runs full attention on the first layer's inputs, and VMoBA on each layer's; checks and times them.

    Args:
        inputs: float32 query, key and value (1, heads, tokens, head_dim) of each layer, raster order.
        config: what the layers attend.
        grid: latent video size (frames, height, width).
        step: called three times per result, with what is done next, in words.

    Returns:
        One result for full attention, then one per layer.
    """
    kinds = [config.layer(index, len(inputs)) for index in range(len(inputs))]
    layers = [(0, "full", BlockPartition(grid, grid), kinds[0].rule)]
    layers += [(index, NAMES[x.kind], config.partition(x.kind, grid), x.rule) for index, x in enumerate(kinds)]
    results = []
    for index, kind, partition, rule in layers:
        query, key, value = inputs[index]
        name = f"layer {index}, {kind}"
        step(f"{name}: run")
        layer = functools.partial(plain, query, key, value, partition, rule)
        output, mask = layer()
        step(f"{name}: time")
        seconds = median_seconds(layer)
        step(f"{name}: check")
        selection = vmoba_selection(query, key, partition, rule)
        tiles = tile_map(mask)
        tail, kept = tail_of(kind), recall(query, key, selection, partition)
        results.append(
            LayerResult(
                layer=index,
                kind=kind,
                partition=partition,
                rule=rule,
                density=selection.float().mean().item(),
                tile_density=(tiles > 0).float().mean().item(),
                recall=kept,
                tail=tail,
                overlap=kept if tail is None else overlap(query, key, selection, partition, tail),
                error=_error(output, query, key, value, selection, partition.block_ids()),
                seconds=seconds,
                selection=selection[0],
                tiles=tiles[0],
            )
        )
    return results


def recall(query: Tensor, key: Tensor, selection: Tensor, partition: BlockPartition) -> float:
    """The share of full attention's probability that falls on chosen blocks, mean over queries and heads.

    Args:
        query: (1, heads, tokens, head_dim), raster order.
        key: like query.
        selection: bool (1, heads, tokens, blocks).
        partition: the blocks.
    """
    ids = partition.block_ids(query.device)
    kept = []
    for head in range(query.shape[1]):
        keys = key[0, head].float()
        # Some rows at a time: all scores of a head would take 12 GB at 55,296 tokens.
        for rows in torch.arange(query.shape[2], device=query.device).split(_ROWS):
            scores = query[0, head, rows].float() @ keys.T / math.sqrt(query.shape[-1])
            kept.append((scores.softmax(-1) * selection[0, head, rows][:, ids]).sum(-1))
    return torch.cat(kept).mean().item()


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


def _error(output: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: Tensor, ids: Tensor) -> float:
    """The largest difference of `output` from dense masked attention in float64, over `CHECKED` queries."""
    rows = torch.linspace(0, query.shape[2] - 1, min(CHECKED, query.shape[2])).long()
    exact, _ = reference.attention(query[:, :, rows], key, value, selection[:, :, rows][..., ids])
    return (output[:, :, rows] - exact).abs().max().item()
