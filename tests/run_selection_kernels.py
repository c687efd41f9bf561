"""Runs the Triton kernels of gate and selection at odd sizes against their eager forms: a script, not a test module.

TRITON_INTERPRET=1 python -m tests.run_selection_kernels                       # on a CPU
compute-sanitizer --tool memcheck python -m tests.run_selection_kernels        # on a GPU
"""

import itertools

import torch

from tests.test_gates import cells_of
from vmoba_flex import BlockPartition
from vmoba_flex.selection import (
    cell_gate_kernels,
    exact_gate,
    exact_kernels,
    gate_kernels,
    long_pool_kernels,
    short_pool_kernels,
)
from vmoba_flex.selection.cell_gate import cell_scores, cell_stats
from vmoba_flex.selection.cell_places import CellStats, gate_cells
from vmoba_flex.selection.gate import block_means, gate
from vmoba_flex.selection.select import SHORT
from vmoba_flex.selection.sorted_pools import take_sorted
from vmoba_flex.selection.weights import Targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = torch.inf, torch.nan
KINDS = {
    "reals": [],
    "tiny": [],
    "ties": [],
    "constant": [],
    "zeros": [],
    "one infinite": [INF],
    "all bad": [INF, -INF, NAN, -NAN],
    "outlier": [1e9],
    "masses": [],
    "flat masses": [],
    "sharp masses": [],
    "masses, one NaN": [NAN],
}

# Cap as a share of the pool, and tau.
TARGETS = [(None, 0.25), (0.25, None), (0.25, 0.3), (0.1, 0.5), (None, 1.0), (0.5, 1e-3)]


def pools(kind: str, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    scores = torch.randn(count, length, generator=generator)
    if "masses" in kind:
        sharpness = {"flat masses": 0, "sharp masses": 60}.get(kind, 3)
        scores = (scores * sharpness).softmax(-1)
    if kind == "tiny":
        scores *= 1e-9
    elif kind == "ties":
        scores = scores.round()
    elif kind == "constant":
        scores.fill_(2.5)
    elif kind == "zeros":
        scores = torch.where(scores < 0, 0.0, -0.0)
    for i, bad in enumerate(KINDS[kind]):
        scores[:, 3 * i % length] = bad
    return scores


def check_selection() -> None:
    # Small blocks, so that small pools take several programs and several blocks of each.
    long_pool_kernels._BLOCK, long_pool_kernels._PROGRAMS = 64, 4
    generator = torch.Generator(DEVICE).manual_seed(0)
    shares = itertools.cycle(TARGETS)
    # Six targets over kinds and shapes in turn: the shapes' number shares no factor with six.
    for i, (kind, (count, length, own_rows)) in enumerate(
        itertools.product(KINDS, [(2, 200, 1), (2, 50, 2), (1, 1, 1), (1, 2, 1), (2, 70, 2)])
    ):
        if i % 2:
            continue
        scores = pools(kind, count, length, generator)
        own = torch.rand(own_rows, length, generator=generator) < 0.15
        share, tau = next(shares)
        cap = None if share is None else int(share * length)
        targets = Targets(cap, tau, stretch="masses" not in kind)
        expected = take_sorted(scores, own, targets)
        case = (kind, count, length, cap, tau)
        assert torch.equal(long_pool_kernels.take_long(scores, own, targets), expected), case
        by_entry = scores.T.contiguous().T[None]
        each_own = own.repeat(count // own_rows, 1)
        taken = short_pool_kernels.take_short(by_entry, each_own, targets)
        assert torch.equal(taken[0].T, expected), case


def check_longest_pools_of_one_query() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    for kind, (length, (share, tau)) in zip(
        itertools.cycle(KINDS), itertools.product([1025, 2048, 2049, SHORT], TARGETS), strict=False
    ):
        scores = pools(kind, 6, length, generator)
        own = torch.rand(3, length, generator=generator) < 0.15
        targets = Targets(None if share is None else int(share * length), tau, stretch="masses" not in kind)
        # Two heads of three queries: a program has two pools or more, and the last one fewer.
        by_entry = scores.view(2, 3, length).mT.contiguous().mT
        taken = short_pool_kernels.take_short(by_entry, own, targets)
        assert torch.equal(taken.mT.flatten(0, 1), take_sorted(scores, own, targets)), (kind, length, targets)
    for bits, has_tau in itertools.product(range(1, SHORT.bit_length()), (False, True)):
        count, warps = short_pool_kernels.shape_of_program(2**bits, has_tau)
        assert count.bit_count() == warps.bit_count() == 1  # powers of two
        assert warps <= 16
        assert count * 2**bits <= warps * 32 * (16 if has_tau else 32)  # keys of a thread


def check_gate() -> None:
    gate_kernels._FLOAT32_PRODUCTS = True
    generator = torch.Generator(DEVICE).manual_seed(0)
    for batch, partition, dim, dtype in [
        (2, BlockPartition((3, 7, 8), (2, 5, 5), prefix=3, suffix=2), 24, torch.bfloat16),
        (1, BlockPartition((2, 9, 17), (2, 9, 17)), 16, torch.float16),
        (1, BlockPartition((1, 6, 12), (1, 1, 1)), 16, torch.bfloat16),
        (1, BlockPartition((1, 6, 12), (1, 3, 3)), 130, torch.float16),
        (2, BlockPartition((1, 1, 1), (1, 1, 1), prefix=1), 8, torch.bfloat16),
        (1, BlockPartition((3, 14, 18), (3, 14, 18)), 8, torch.bfloat16),  # more tokens than a chunk of small dims
    ]:
        query = torch.randn(batch, partition.num_tokens, 2, dim, generator=generator).transpose(1, 2).to(dtype)
        key = torch.randn(batch, 1, partition.num_tokens, dim, generator=generator).to(dtype) + 0.5
        means = block_means(key.double(), partition)
        largest = max(partition.block_sizes().tolist())
        epsilon = torch.finfo(torch.float32).eps
        magnitude = block_means(key.double().abs(), partition)
        assert ((gate_kernels.block_means(key, partition) - means).abs() <= largest * epsilon * magnitude).all()
        video = query[:, :, partition.prefix :][:, :, : partition.num_video_tokens].double().abs()
        bound = (dim + largest) * epsilon * (video @ magnitude.repeat_interleave(2, 1).mT)
        scores, expected = (
            gate_kernels.gate(query, key, partition, partition.prefix, partition.num_video_tokens),
            gate(query.double(), key.double(), partition),
        )
        assert scores.stride() == expected.stride()
        assert ((scores - expected).abs() <= bound).all()


def check_cell_gate() -> None:
    # In float16 throughout: the interpreter cuts what it should round to bfloat16.
    generator = torch.Generator(DEVICE).manual_seed(0)
    for batch, partition, cell, dim, dtype in [
        (2, BlockPartition((3, 7, 8), (2, 5, 5), prefix=3, suffix=2), (2, 2, 3), 24, torch.float16),  # 6 cells of 8
        (1, BlockPartition((3, 7, 8), (2, 5, 5)), (1, 1, 1), 16, torch.float16),  # 50 of 64
        (1, BlockPartition((2, 9, 17), (2, 9, 10)), (1, 1, 2), 16, torch.float16),  # 90 of 128: two tiles a block
        (1, BlockPartition((1, 6, 12), (1, 1, 1)), 64, 130, torch.float16),  # one token a block
        (1, BlockPartition((9, 5, 5), (9, 5, 5)), (9, 5, 5), 8, torch.float16),  # more tokens than are read at once
    ]:
        query = torch.randn(batch, partition.num_tokens, 2, dim, generator=generator).transpose(1, 2).to(dtype)
        key = torch.randn(batch, 1, partition.num_tokens, dim, generator=generator).to(dtype) + 0.5
        with cells_of(cell):
            stats = cell_gate_kernels.cell_stats(key, gate_cells(partition))
            expected, exact = (cell_stats(x.cpu(), gate_cells(partition)) for x in (key, key.double()))
        epsilon = torch.finfo(dtype).eps
        for found, wide in zip(stats[:2], exact[:2], strict=True):
            # Rounded once, from a float32 sum.
            assert ((found.double().cpu() - wide).abs() <= epsilon * wide.abs() + 4e-6).all()
        assert torch.equal(stats.bias.isinf().cpu(), expected.bias.isinf())
        assert (stats.bias.exp().cpu() - expected.bias.exp()).abs().max() < 1e-4
        count, before, blocks = partition.num_video_tokens, partition.prefix, partition.num_blocks
        for spread in (False, True):
            scores = cell_gate_kernels.cell_scores(query, stats, blocks, before, count, spread)
            on_cpu = CellStats(*(x.cpu() for x in stats))
            twin = cell_scores(query.cpu(), on_cpu, blocks, before, count, spread)
            assert scores.stride() == twin.stride()
            # "spread" has the square root of a sum of products, each rounded.
            torch.testing.assert_close(scores.cpu(), twin, rtol=1e-5, atol=2e-5)


def check_exact_gate() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    for batch, partition, dim, dtype, lengths, launch in [
        (2, BlockPartition((3, 7, 8), (2, 5, 5), prefix=3, suffix=2), 24, torch.float16, [0, 4], None),
        (1, BlockPartition((2, 8, 16), (2, 8, 8)), 16, torch.float16, None, exact_kernels.Launch(32, 16, 4, 1, False)),
        (1, BlockPartition((1, 6, 12), (1, 1, 1), suffix=70), 130, torch.float32, [65], None),
    ]:
        query = torch.randn(batch, partition.num_tokens, 2, dim, generator=generator).transpose(1, 2).to(dtype)
        key = torch.randn(batch, 1, partition.num_tokens, dim, generator=generator).to(dtype)
        lengths = None if lengths is None else torch.tensor(lengths)
        groups = partition.num_blocks + (partition.prefix + partition.suffix > 0)
        for scale, count in ((dim**-0.5, groups), (-0.3, partition.num_blocks), (0.0, groups)):
            inputs = partition, partition.prefix, partition.num_video_tokens, scale, count
            found = exact_kernels.group_lse(query, key, *inputs, lengths, launch)
            on_cpu = None if lengths is None else lengths.cpu()
            expected = exact_gate.group_lse(query.double().cpu(), key.double().cpu(), *inputs, on_cpu)
            torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=2e-5)


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    check_selection()
    check_longest_pools_of_one_query()
    check_gate()
    check_cell_gate()
    check_exact_gate()
