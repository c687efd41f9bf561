"""How far rounding moves the gradients of single training samples, with each attention.

    python -m bench.quality.conditioning --output bench/results/cpu_<date>_conditioning.json

The model that ships with the demo runs in float32, on the samples that would have come next in its training. Query,
key and value of each layer are rounded to bfloat16, once as they are and once after relative noise of ``NOISE``. The
gradients of both are compared with the attention of its training, with the blocks that it chose without the noise, and
with full attention. It takes 25 seconds a sample on two cores.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common.report import table, write_whole
from bench.quality import clips, tables
from bench.quality.runs import SHIPPED, SIZES
from bench.quality.train import loss_of
from bench.quality.windows import Sample, Windows
from vmoba_flex import VMoBAAttention, VMoBAConfig, vmoba_selection
from vmoba_flex.demo import checkpoint
from vmoba_flex.demo.model import Grid, VideoTransformer

NOISE = 2.0**-9
"""About the root mean square of what rounding to bfloat16 does to a number, relative to it."""

LARGEST = 10
"""How many of the tokens with the largest gradients are looked at."""

_SEED = 0


class Gradients(NamedTuple):
    """Of the weights, by name, and of the first layer's tokens ``(tokens, dim)``."""

    weights: dict[str, Tensor]
    tokens: Tensor


class Held(nn.Module):
    """A layer's attention by blocks that are chosen once, at the first call."""

    def __init__(self, layer: VMoBAAttention) -> None:
        super().__init__()
        self.layer = layer
        self.mask: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        """Like ``VMoBAAttention.forward``."""
        if self.mask is None:
            partition = self.layer.config.partition(self.layer.plan.kind, grid)
            selection = vmoba_selection(query, key, partition, self.layer.plan.rule)
            self.mask = selection[..., partition.block_ids(query.device)]
        return F.scaled_dot_product_attention(query, key, value, self.mask)


def rounded(project: Callable[..., tuple[Tensor, ...]], noise: float, *arguments: Tensor) -> list[Tensor]:
    """Query, key and value after relative noise, rounded to bfloat16."""
    return [(x * (1 + noise * torch.randn_like(x))).bfloat16().float() for x in project(*arguments)]


def gradients(model: VideoTransformer, sample: Sample, noise: float = 0.0) -> Gradients:
    """The gradients of a step; the noise is the same at each call. The model keeps the noise."""
    blocks: Any = model.blocks
    for block in blocks:
        block.project = functools.partial(rounded, type(block).project.__get__(block), noise)
    torch.manual_seed(_SEED)
    tokens: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        tokens.append(output)

    with model.embed.register_forward_hook(keep):
        loss = loss_of(model(sample.noisy, sample.level), sample)
    names, weights = zip(*model.named_parameters(), strict=True)
    *found, of_tokens = torch.autograd.grad(loss, [*weights, *tokens])
    return Gradients(dict(zip(names, found, strict=True)), of_tokens[0])


def compare(noisy: Gradients, plain: Gradients) -> dict[str, float]:
    """How far apart the gradients are.

    Returns:
        ``off``: ||noisy - plain|| / ||plain||, over all weights; ``factor``: plain times this is nearest
        to noisy; ``largest``: the share of ||plain||^2, by the first layer's tokens, that ``LARGEST`` of them
        hold; ``largest_off``: what the same tokens hold of ||noisy - plain||^2, 0 if that is 0; ``median_token``: the
        median of ``off`` over all tokens, each by itself.
    """
    a, b = (torch.cat([x.flatten() for x in each.weights.values()]).double() for each in (noisy, plain))
    sizes, moves = (x.double().square().sum(-1) for x in (plain.tokens, noisy.tokens - plain.tokens))
    largest = sizes.topk(LARGEST).indices
    return {
        "off": ((a - b).norm() / b.norm()).item(),
        "factor": (a @ b / (b @ b)).item(),
        "largest": (sizes[largest].sum() / sizes.sum()).item(),
        "largest_off": (moves[largest].sum() / moves.sum().clamp_min(1e-300)).item(),
        "median_token": (moves / sizes).sqrt().median().item(),
    }


def look(model: VideoTransformer, attention: VMoBAConfig, sample: Sample) -> dict[str, Any]:
    """One sample with each attention; the model keeps the last one, and the noise."""

    def off() -> dict[str, float]:
        plain = gradients(model, sample)  # first, so that blocks are chosen without noise
        return compare(gradients(model, sample, NOISE), plain)

    row: dict[str, Any] = {"level": sample.level.item()}
    model.set_attention(attention)
    row["exact"] = off()
    blocks: Any = model.blocks
    for block in blocks:
        block.attention = Held(block.attention)
    row["held"] = off()
    model.set_attention(dataclasses.replace(attention, dispatch="dense"))
    row["full"] = off()
    return row


def markdown(data: dict[str, Any]) -> str:
    """The report."""
    names = ["level", *(f"{name}: {what}" for name in tables.ROUNDED.values() for what in ("off", "factor"))]
    samples = [
        [f"{row['level']:.3f}", *(f"{row[key][what]:.4f}" for key in tables.ROUNDED for what in ("off", "factor"))]
        for row in data["samples"]
    ]
    return "\n\n".join([
        f"{data['device']}, {data['date']}, torch {data['torch']}. `{data['command']}`",
        "\n".join(table(*tables.conditioning(data))),
        "Over samples. Off: ||gradients with noise - without|| / ||without||, over all weights. A token: the same of "
        "the gradient of each of the first layer's tokens by itself. Ten tokens hold: the largest ten, of the squares "
        "of these gradients, and of the squares of what noise adds to them. Factor: gradients without noise, times "
        "this, are nearest to those with it.",
        "\n".join(table(names, samples)),
    ]) + "\n"  # fmt: skip


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file; the report is written next to it")
    parser.add_argument("--clips", type=Path, default=clips.CLIPS, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=24, help="default: %(default)s")
    args = parser.parse_args()
    model, attention, training = checkpoint.load()
    model.requires_grad_(True)
    try:
        windows = Windows(clips.load(args.clips), *SIZES[SHIPPED].pixels)
    except clips.ClipError as error:
        print(f"conditioning: error: {error}", file=sys.stderr)
        return 2
    data: dict[str, Any] = {
        "device": "CPU",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "command": f"python -m bench.quality.conditioning --samples {args.samples} "
        f"--output bench/results/{args.output.name}",
        "samples": [],
    }
    for step in range(training["steps"], training["steps"] + args.samples):
        row = look(model, attention, windows.training(_SEED, step))
        data["samples"].append(row)
        print(
            f"level {row['level']:.3f}:", *(f"{key} off by {row[key]['off']:.4f}" for key in tables.ROUNDED), flush=True
        )
        write_whole(args.output, json.dumps(data, indent=1) + "\n")
        write_whole(args.output.with_suffix(".md"), markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
