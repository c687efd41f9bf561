"""A model's own query and key: what its layers attend, how exactly, and how fast."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bench.common.timing import milliseconds
from bench.quality.windows import Windows
from vmoba_flex import BlockPartition, Threshold, TopK, VMoBAConfig, reference, vmoba_attention, vmoba_selection
from vmoba_flex.call import Backend, Dispatch
from vmoba_flex.demo.model import VideoTransformer
from vmoba_flex.demo.run import TILE, Inputs, layer_inputs, recall
from vmoba_flex.mask import selection_tiles

PROBED_LEVELS = (1, 4, 6)
"""The held-out levels at which query and key are taken."""

_ROWS = 512

Rule = Threshold | TopK


def window_inputs(model: VideoTransformer, windows: Windows, level: int) -> list[Inputs]:
    """Query, key and value of each layer, on the first held-out window at one of its levels."""
    sample = windows.held_out_samples(level)[0][2]
    with torch.autocast(windows.device.type, torch.bfloat16, windows.device.type == "cuda"):
        return layer_inputs(model, sample.noisy, sample.level)


@torch.no_grad()
def attended(model: VideoTransformer, attention: VMoBAConfig, windows: Windows, grid: Any) -> list[dict[str, Any]]:
    """Per layer, means over heads and ``PROBED_LEVELS``: density, tile density, and recall of full attention's mass."""
    rows: list[dict[str, Any]] = []
    for level in PROBED_LEVELS:
        for index, (query, key, value) in enumerate(window_inputs(model, windows, level)):
            plan = attention.layer(index, len(model.blocks))
            partition = attention.partition(plan.kind, grid)
            dispatch, backend = cast(Dispatch, attention.dispatch), cast(Backend, attention.backend)
            _, stats = vmoba_attention(
                query, key, value, partition, plan.rule, dispatch=dispatch, backend=backend, return_stats=True
            )
            if len(rows) <= index:
                rows.append({"kind": plan.kind, "blocks": partition.num_blocks, "density": [], "tile_density": []})
            rows[index]["density"].append(stats.density.mean().item())
            rows[index]["tile_density"].append(stats.tile_density.mean().item())
            if dispatch == "packed":
                selection = vmoba_selection(query, key, partition, plan.rule)
                rows[index].setdefault("recall", []).append(recall(query, key, selection, partition))
    return [
        {name: sum(each) / len(each) if isinstance(each, list) else each for name, each in row.items()} for row in rows
    ]


def tile_densities(selection: Tensor, partition: BlockPartition) -> dict[str, float]:
    """The share of tiles with a pair in them, by the order of the tokens.

    ``sorted``: keys in block order, and each head's queries sorted by the blocks that they chose, read as a binary
    number.
    """
    result = {
        order: selection_tiles(selection, partition, order, TILE).some.float().mean().item()
        for order in ("raster", "block")
    }
    order = torch.arange(selection.shape[2], device=selection.device).expand(selection.shape[:3])
    for block in reversed(range(selection.shape[3])):
        ranks = selection[..., block].gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True, descending=True)
        order = order.gather(-1, ranks.indices)
    ordered = selection.gather(2, order[..., None].expand_as(selection))
    padded = torch.nn.functional.pad(ordered, (0, 0, 0, -ordered.shape[2] % TILE))
    wanted = padded.unflatten(2, (-1, TILE)).any(3).float()
    ids = partition.to_block_order(partition.block_ids(selection.device), dim=0)
    tile_of_key = torch.arange(len(ids), device=selection.device) // TILE
    member = torch.zeros(partition.num_blocks, int(tile_of_key[-1]) + 1, device=selection.device)
    member[ids, tile_of_key] = 1
    return result | {"sorted": (wanted @ member > 0).float().mean().item()}


def errors(inputs: Inputs, partition: BlockPartition, rule: Rule, backend: Backend) -> dict[str, float]:
    """Relative errors of outputs on some rows, against float64; ``dense`` (full attention) shows rounding's cost."""
    query, key, value = inputs
    rows = torch.linspace(0, query.shape[2] - 1, min(_ROWS, query.shape[2]), device=query.device).long()
    selection = vmoba_selection(query, key, partition, rule)
    mask = selection[:, :, rows][..., partition.block_ids(query.device)]
    result = {}
    for dispatch in ("dense", "tiles", "packed"):
        exact, _ = reference.attention(query[:, :, rows], key, value, None if dispatch == "dense" else mask)
        kernels = backend if dispatch == "packed" else "auto"
        output = vmoba_attention(query, key, value, partition, rule, dispatch=dispatch, backend=kernels)
        result[dispatch] = ((output[:, :, rows] - exact).norm() / exact.norm()).item()
    return result


def times(inputs: Inputs, partition: BlockPartition, rule: Rule, backend: Backend) -> dict[str, dict[str, float]]:
    """Milliseconds of each dispatch, forward and forward + backward."""
    device = inputs[0].device.type
    result: dict[str, dict[str, float]] = {}
    for dispatch in ("dense", "packed", "shared", "auto", "tiles"):
        kernels = backend if dispatch in ("packed", "shared") else "auto"
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        gradient = torch.randn_like(inputs[2])
        attend = functools.partial(vmoba_attention, partition=partition, rule=rule, dispatch=dispatch, backend=kernels)

        def forward(attend: Any = attend) -> Tensor:
            return attend(*inputs)

        def both(attend: Any = attend, leaves: Any = leaves, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(attend(*leaves), leaves, gradient)

        with torch.no_grad():
            result[dispatch] = {"forward_ms": milliseconds(forward, device)}
        result[dispatch]["forward_backward_ms"] = milliseconds(both, device)
    return result


def probe(
    model: VideoTransformer, attention: VMoBAConfig, windows: Windows, grid: Any, note: Callable[[list[Any]], None]
) -> None:
    """Measures one layer of each kind; ``note`` gets all rows so far after each measurement.

    Args:
        model: trained with ``attention``.
        attention: a dispatch that chooses blocks.
        windows: of the model's size.
        grid: size in tokens.
        note: keeps the rows.
    """
    rows: list[dict[str, Any]] = []
    inputs, backend = window_inputs(model, windows, PROBED_LEVELS[1]), cast(Backend, attention.backend)
    kinds = {attention.layer(i, len(model.blocks)).kind: i for i in reversed(range(len(model.blocks)))}
    for kind, index in sorted(kinds.items(), key=lambda item: item[1]):
        rule, partition = attention.layer(index, len(model.blocks)).rule, attention.partition(kind, grid)
        with torch.no_grad():
            selection = vmoba_selection(*inputs[index][:2], partition, rule)
            rows.append({"layer": index, "kind": kind, "blocks": partition.num_blocks, "tokens": partition.num_tokens})
            rows[-1]["density"] = selection.float().mean().item()
            rows[-1]["tile_density"] = tile_densities(selection, partition)
            note(rows)
            rows[-1]["relative_error"] = errors(inputs[index], partition, rule, backend)
        note(rows)
    for row in rows:
        rule, partition = attention.layer(row["layer"], len(model.blocks)).rule, attention.partition(row["kind"], grid)
        row["times"] = times(inputs[row["layer"]], partition, rule, backend)
        note(rows)
