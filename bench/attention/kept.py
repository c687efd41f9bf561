"""What a kept choice saves: the same forward with a rule, with a ``Selection``, and with its plan.

    python -m bench.attention.kept --output bench/results/<gpu>_<date>_kept.json     # on a GPU

13,440 and 55,296 tokens, 12 heads, head dim 128, bfloat16, random inputs, ``TopK``, with and without a tail of cells of
about 64 tokens. Each call is made from Python, so that short sequences show what launches cost. Also counts the kernels
that a call launches, and compares all outputs and gradients with those of the call that chooses. ``--device cpu
--small`` tries it out.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.attention.peers import CPU_PEERS, PEERS
from bench.common import script
from bench.common.machine import error_text
from bench.common.report import number, table
from bench.common.timing import milliseconds
from vmoba_flex import BlockPartition, Selection, Tail, TopK, vmoba_attention, vmoba_selection
from vmoba_flex.call import Backend, Dispatch
from vmoba_flex.selection.bits import Choice

DENSITIES = (0.0625, 0.125)
PARTITIONS = (
    BlockPartition.spatiotemporal((14, 24, 40), (2, 8, 8)),
    BlockPartition.spatiotemporal((24, 36, 64), (8, 12, 8)),
)
SMALL = (BlockPartition.spatiotemporal((4, 8, 8), (2, 4, 4)),)
WAYS: tuple[tuple[Dispatch, Choice, Backend], ...] = (
    ("packed", "token", "triton"),
    ("packed", "token", "flash"),
    ("shared", "tile", "triton"),
    ("shared", "tile", "flash"),
)
GIVEN = ("rule", "selection", "plan")


def measure(device: str, small: bool) -> list[dict[str, Any]]:
    """A row for dense attention of each size, then for each size, way, density, and tail or none."""
    rows: list[dict[str, Any]] = []
    heads, dim = (2, 16) if small else (12, 128)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for partition in SMALL if small else PARTITIONS:
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, heads, partition.num_tokens, dim)
        tensors = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)]
        rows.append({"tokens": partition.num_tokens, "dispatch": "dense", "forward_ms": _dense(tensors, device)})
        print(*rows[-1].values(), flush=True)
        for way, density, tail in itertools.product(WAYS, DENSITIES, (None, Tail())):
            dispatch, choice, backend = way
            row: dict[str, Any] = {"tokens": partition.num_tokens, "dispatch": dispatch, "backend": backend}
            row |= {"density": density, "tail": tail is not None}
            options: dict[str, Any] = {"dispatch": dispatch, "tail": tail}
            options["backend"] = backend if device == "cuda" else "auto"
            try:
                rows.append(row | _calls(tensors, partition, TopK(density=density), choice, backend, options, device))
            except ValueError as error:  # a backend that cannot run here
                rows.append(row | {"error": error_text(error)})
            print(*rows[-1].values(), flush=True)
    return rows


def _dense(tensors: list[Tensor], device: str) -> float:
    peer = PEERS["cuDNN"] if device == "cuda" else CPU_PEERS["FlashAttention-2"]
    attend = peer.load()
    with torch.no_grad(), peer.context():
        return milliseconds(lambda: attend(*tensors[:3]), device)


def _calls(
    tensors: list[Tensor],
    partition: BlockPartition,
    rule: TopK,
    choice: Choice,
    backend: Any,
    options: dict[str, Any],
    device: str,
) -> dict[str, Any]:
    query, key, value, grad = tensors
    kept = vmoba_selection(query, key, partition, rule, choice=choice, as_bits=True)
    planned = kept.planned(query, backend)
    row: dict[str, Any] = {"bits_mb": kept.nbytes / 1e6, "plan_mb": (planned.nbytes - kept.nbytes) / 1e6}
    results: dict[str, list[Tensor]] = {}
    for name, selection in zip(GIVEN, (None, kept, planned), strict=True):

        def call(*inputs: Tensor, selection: Selection | None = selection) -> Tensor:
            given = rule if selection is None else None
            return vmoba_attention(inputs[0], inputs[1], inputs[2], partition, given, selection=selection, **options)

        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        output = call(*leaves)
        results[name] = [output.detach(), *torch.autograd.grad(output, leaves, grad)]

        def forward(call: Callable[..., Tensor] = call) -> None:
            with torch.no_grad():
                call(query, key, value)

        def backward(call: Callable[..., Tensor] = call, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(call(*leaves), leaves, grad)

        row[f"{name}_ms"] = milliseconds(forward, device)
        row[f"{name}_launches"], row[f"{name}_device_ms"] = _launches(forward, device)
        row[f"{name}_backward_launches"], _ = _launches(backward, device)
    # FlashAttention-4 sums the gradient of query by atomics.
    compared = 4 if options["backend"] != "flash" else 1
    row["equal"] = all(
        torch.equal(x, y)
        for name in GIVEN[1:]
        for x, y in zip(results["rule"][:compared], results[name][:compared], strict=True)
    )
    return row


def _launches(call: Callable[[], Any], device: str) -> tuple[int | None, float | None]:
    """How many kernels a call that has been made before launches, and their time; None on a CPU."""
    if device != "cuda":
        return None, None
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events: Any = profiler.events()
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    return len(kernels), sum(event.time_range.elapsed_us() for event in kernels) / 1e3


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The run's facts, and a table of forward in ms and launches: with a rule, with a selection, with its plan."""
    names = ("tokens", "dispatch", "kernels", "density", "tail", *GIVEN, "on the device", "launches")
    names += ("with backward", "bits, plan MB", "equal")
    lines = []
    for row in rows:
        cells = [str(row["tokens"]), row["dispatch"]]
        if row["dispatch"] == "dense":
            lines.append([*cells, "torch's", "1", "", number(row["forward_ms"], 2), *[""] * 7])
        elif "error" not in row:
            cells += [row["backend"], str(row["density"]), "yes" if row["tail"] else "no"]
            cells += [number(row[f"{name}_ms"], 2) for name in GIVEN]
            for what, digits in (("device_ms", 2), ("launches", 0), ("backward_launches", 0)):
                cells.append(" / ".join(number(row[f"{name}_{what}"], digits) for name in GIVEN))
            cells.append(f"{row['bits_mb']:.1f}, {row['plan_mb']:.1f}")
            lines.append([*cells, "yes" if row["equal"] else "**no**"])
    return "\n".join([*script.head(facts), *table(names, lines)]) + "\n"


def main() -> None:
    """Measures and writes the JSON file, and the table next to it."""
    script.run("bench.attention.kept", __doc__, measure, markdown)


if __name__ == "__main__":
    main()
