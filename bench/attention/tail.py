"""What a tail costs: the same calls with and without it, at low densities, in one run.

    python -m bench.attention.tail --output bench/results/<gpu>_<date>_tail.json     # on a GPU

55,296 tokens (grid 24x36x64, 72 cubes), 12 heads, head dim 128, bfloat16, random inputs, ``TopK``, cells of about 64
tokens; the choice of blocks is included. ``--device cpu --small`` tries it out.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import script
from bench.common.report import number, table
from bench.common.timing import milliseconds, peak_bytes
from vmoba_flex import BlockPartition, Tail, TopK, vmoba_attention
from vmoba_flex.call import Backend, Dispatch

DENSITIES = (0.0625, 0.125, 0.25)
WAYS: tuple[tuple[Dispatch, Backend], ...] = (
    ("packed", "triton"),
    ("packed", "flash"),
    ("shared", "triton"),
    ("shared", "flash"),
)
FIELDS = ("forward_ms", "forward_backward_ms", "peak_gb")


def measure(device: str, small: bool) -> list[dict[str, Any]]:
    """A row for each dispatch, backend, density, and tail or none."""
    grid, cube, heads, dim = ((4, 8, 8), (2, 4, 4), 2, 16) if small else ((24, 36, 64), (8, 12, 8), 12, 128)
    partition = BlockPartition.spatiotemporal(grid, cube)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, heads, partition.num_tokens, dim)
    query, key, value, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    rows = []
    for (dispatch, backend), density, tail in itertools.product(WAYS, DENSITIES, (None, Tail())):
        row: dict[str, Any] = {"dispatch": dispatch, "backend": backend, "density": density, "tail": repr(tail)}

        def call(*tensors: Tensor, settings: tuple[Any, ...] = (dispatch, backend, density, tail)) -> Tensor:
            dispatch, backend, density, tail = settings
            backend = backend if device == "cuda" else "auto"
            return vmoba_attention(
                tensors[0], tensors[1], tensors[2], partition, TopK(density=density), dispatch=dispatch,
                backend=backend, tail=tail,
            )  # fmt: skip

        rows.append(row | _times(call, (query, key, value), grad, device))
        print(*row.values(), *(rows[-1][name] for name in FIELDS), flush=True)
    return rows


def _times(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, device: str) -> dict[str, Any]:
    leaves = [x.clone().requires_grad_() for x in inputs]

    def forward() -> None:
        with torch.no_grad():
            call(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(call(*leaves), leaves, grad)

    try:
        forward_backward()
        peak = peak_bytes(forward_backward, device)
        times = [milliseconds(run, device) for run in (forward, forward_backward)]
    except ValueError as error:  # a backend that cannot run here
        return dict.fromkeys(FIELDS) | {"error": str(error)}
    return dict(zip(FIELDS, (*times, None if peak is None else peak / 1e9), strict=True))


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The run's facts, and a table of forward / forward + backward in ms, without and with a tail."""
    names = ("dispatch", "kernels", "density", "without a tail", "with a tail", "the tail adds", "adds GB")
    lines = []
    for plain, tailed in zip(rows[::2], rows[1::2], strict=True):
        if plain["forward_ms"] is None:
            continue
        pairs = [[row[name] for name in FIELDS[:2]] for row in (plain, tailed)]
        adds = [after - before for before, after in zip(*pairs, strict=True)]
        memory = None if plain["peak_gb"] is None else tailed["peak_gb"] - plain["peak_gb"]
        times = [" / ".join(f"{x:.2f}" for x in pair) for pair in (*pairs, adds)]
        lines.append([plain["dispatch"], plain["backend"], str(plain["density"]), *times, number(memory, 2)])
    return "\n".join([*script.head(facts), *table(names, lines)]) + "\n"


def main() -> None:
    """Measures and writes the JSON file, and the table next to it."""
    script.run("bench.attention.tail", __doc__, measure, markdown)


if __name__ == "__main__":
    main()
