"""Hashes of a fixed set of calls: equal before and after a change that must not change results.

    python -m bench.attention.bits --output before.json
    python -m bench.attention.bits --compare before.json     # after the change: names the calls that differ

Each hash covers one call: a selection, the lists of a mask, or an output with its gradients and statistics. Hashes can
be compared only on the same machine and versions. All calls take a minute on one core; on a GPU they run in Triton.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vmoba_flex import BlockPartition, Threshold, TopK, vmoba_attention, vmoba_mask, vmoba_selection
from vmoba_flex.rules import Rule

RULES = {
    "topk": TopK(2),
    "topk head": TopK(density=0.3, pool="head"),
    "topk global": TopK(density=0.3, pool="global"),
    "threshold": Threshold(0.25, max_density=0.4),
    "threshold block": Threshold(0.3, pool="block", max_density=0.5),
    "threshold query": Threshold(0.3, pool="query", max_density=0.5),
    "softmax": Threshold(0.6, pool="query", max_density=0.5, normalize="softmax"),
    "softmax head": Threshold(0.6, max_density=0.5, normalize="softmax"),
}
PARTITIONS = {
    "slabs": BlockPartition.temporal((7, 8, 10), 2),
    "windows": BlockPartition.spatial((7, 8, 10), (3, 4), suffix=13),
    "cubes": BlockPartition.spatiotemporal((8, 8, 8), (4, 8, 8)),
    "text": BlockPartition.spatiotemporal((7, 8, 10), (3, 4, 4), prefix=5, suffix=9),
}
DISPATCHES = ("packed", "shared", "tiles", "dense")
DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float64), "cuda": (torch.float32, torch.bfloat16)}


def digest(*tensors: Tensor) -> str:
    """The first 12 hex digits of the SHA-256 of some tensors' values."""
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def bits(
    device: str, partitions: Collection[str] = tuple(PARTITIONS), rules: Collection[str] = tuple(RULES)
) -> dict[str, str]:
    """The hash of each call, by its settings.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        partitions: keys of ``PARTITIONS``.
        rules: keys of ``RULES``.
    """
    found = {}
    for where, what in itertools.product(partitions, rules):
        for dtype in DTYPES[device]:
            generator = torch.Generator().manual_seed(0)
            for key_heads in (2, 1):
                label = f"{where}, {what}, {str(dtype).removeprefix('torch.')}, {key_heads} key heads"
                tensors = _tensors(PARTITIONS[where].num_tokens, key_heads, dtype, device, generator)
                for name, value in _calls(PARTITIONS[where], RULES[what], tensors):
                    found[f"{name}, {label}"] = value
    return found


def _tensors(
    tokens: int, key_heads: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value of two samples, two heads and head dim 64, and an upstream gradient."""
    query, key, value, grad = (torch.randn((2, 2, tokens, 64), generator=generator).to(device, dtype) for _ in range(4))
    return query, key[:, :key_heads].contiguous(), value[:, :key_heads].contiguous(), grad


def _calls(partition: BlockPartition, rule: Rule, tensors: tuple[Tensor, ...]) -> Iterator[tuple[str, str]]:
    """The name and hash of each call on these tensors."""
    query, key, value, grad = tensors
    text = partition.prefix + partition.suffix
    lengths = torch.tensor([text, text // 2], device=query.device) if text else None
    yield "selection", digest(vmoba_selection(query, key, partition, rule))
    mask = vmoba_mask(query, key, partition, rule, token_order="block", text_lengths=lengths)
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    yield "mask", digest(*[x for x in lists if x is not None])
    for dispatch in DISPATCHES:
        if query.is_cuda and query.dtype == torch.float32 and dispatch != "packed":
            continue  # each shape would be compiled: in bfloat16 only
        backend = "triton" if query.is_cuda and dispatch != "dense" else "auto"
        leaves = q, k, v = [x.clone().requires_grad_() for x in (query, key, value)]
        output, stats = vmoba_attention(
            q, k, v, partition, rule, dispatch=dispatch, backend=backend, enable_gqa=True, text_lengths=lengths,
            return_stats=True,
        )  # fmt: skip
        yield dispatch, digest(output, *torch.autograd.grad(output, leaves, grad), *stats)


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The calls whose hashes differ, or that only one side has."""
    return [name for name in before | after if before.get(name) != after.get(name)]


def main() -> int:
    """Prints or writes the hashes, or compares them; returns 1 if any differ, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="write the hashes into this JSON file")
    parser.add_argument("--compare", type=Path, help="a JSON file of an earlier run to compare with")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums are then added in the same order each time
    found = bits(args.device)
    if args.output:
        args.output.write_text(json.dumps(found, indent=0) + "\n")
    if args.compare is None:
        if not args.output:
            print(json.dumps(found, indent=0))
        return 0
    different = differences(json.loads(args.compare.read_text()), found)
    print(*different, f"{len(different)} of {len(found)} calls differ", sep="\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
