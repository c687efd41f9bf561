"""The gates and block masses on a CUDA GPU: their kernels equal plain PyTorch on a CPU, compiled and captured too."""

import pytest
import torch
from torch import Tensor

from tests.test_gates import NEW, choose_and_weigh, choose_tiles, tensors
from vmoba_flex import BlockPartition, TopK, block_masses, reference_gates, vmoba_selection
from vmoba_flex.rules import Gate
from vmoba_flex.selection.cell_gate import cell_scores, cell_stats
from vmoba_flex.selection.cell_places import CellStats, gate_cells
from vmoba_flex.selection.exact_gate import exact_gate
from vmoba_flex.selection.scores import gate_scores

pytestmark = pytest.mark.gpu

GRID = (5, 14, 18)
PARTITIONS = pytest.mark.parametrize(
    "partition",
    [
        BlockPartition(GRID, (2, 5, 7), prefix=3, suffix=200),
        BlockPartition.temporal(GRID, 5),  # 20 cells of one block
        BlockPartition((8, 30, 30), (8, 30, 25)),  # 96 cells of a block: more than are multiplied at once
        BlockPartition((4, 8, 16), (4, 8, 8)),  # whole tiles of keys
        BlockPartition(GRID, (1, 1, 3), suffix=1),  # 420 blocks of one cell
    ],
    ids=["edges", "one-block", "many-cells", "whole", "420-blocks"],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def inputs(partition: BlockPartition, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor]:
    """On the GPU, with heads inside tokens, as projections leave them."""
    on_gpu = [x.transpose(1, 2).contiguous().cuda().transpose(1, 2) for x in tensors(partition, dtype, dim)]
    return on_gpu[0], on_gpu[1]


@PARTITIONS
@DTYPES
@pytest.mark.parametrize("dim", [8, 72, 128, 256])
def test_scores_are_those_of_plain_pytorch(partition: BlockPartition, dtype: torch.dtype, dim: int):
    query, key = inputs(partition, dtype, dim)
    stats, expected = cell_stats(key, gate_cells(partition)), cell_stats(key.cpu().double(), gate_cells(partition))
    # Squares are summed around a cell's first token, so variances round by that token's square, too.
    sums = 8 * torch.finfo(torch.float32).eps * key.double().square().max().cpu()
    for found, truth in zip(stats[:2], expected[:2], strict=True):
        error = (found.double().cpu() - truth).abs()
        assert (error <= torch.finfo(dtype).eps * truth.abs() + sums).all()
    count, before, blocks = partition.num_video_tokens, partition.prefix, partition.num_blocks
    for spread in (False, True):
        # From the same statistics, so that nothing but the order of sums differs.
        on_cpu = CellStats(*(x.cpu() for x in stats))
        twin = cell_scores(query.cpu(), on_cpu, blocks, before, count, spread)
        scores = cell_scores(query, stats, blocks, before, count, spread)
        assert scores.stride() == twin.stride()
        torch.testing.assert_close(scores.cpu(), twin, rtol=1e-4, atol=1e-4)
        assert torch.equal(scores, cell_scores(query, stats, blocks, before, count, spread))
    exact = exact_gate(query, key, partition)
    truth = exact_gate(query.cpu().double(), key.cpu().double(), partition)
    torch.testing.assert_close(exact.cpu().double(), truth, rtol=1e-5, atol=1e-4)
    assert torch.equal(exact, exact_gate(query, key, partition))


@PARTITIONS
@DTYPES
@pytest.mark.parametrize("scale", [None, -0.3])
def test_masses_are_those_of_the_reference(partition: BlockPartition, dtype: torch.dtype, scale: float | None):
    query, key = inputs(partition, dtype, 64)
    text = partition.prefix + partition.suffix
    lengths = torch.tensor([0, text // 2]) if text else None
    expected = reference_gates.block_masses(query.cpu(), key.cpu(), partition, scale, lengths)
    lengths = None if lengths is None else lengths.cuda()
    masses = block_masses(query, key, partition, scale=scale, text_lengths=lengths)
    rounding = 1e-4 if dtype == torch.float32 else torch.finfo(torch.float16).eps
    torch.testing.assert_close(masses.cpu().double(), expected, rtol=rounding, atol=3e-8)


@DTYPES
def test_compiled_choices_are_eager_ones(dtype: torch.dtype):
    query, key = (x.cuda() for x in tensors(BlockPartition((5, 7, 9), (4, 6, 8), prefix=3, suffix=2), dtype))
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: (*choose_and_weigh(*x), *choose_tiles(*x)), fullgraph=True)(query, key)
    for ours, eager in zip(compiled, (*choose_and_weigh(query, key), *choose_tiles(query, key)), strict=True):
        assert ours.stride() == eager.stride() and torch.equal(ours, eager)


@pytest.mark.parametrize("of", NEW)
def test_choosing_reads_nothing_back_and_can_be_captured(of: Gate):
    partition, rule = BlockPartition(GRID, (2, 5, 7), prefix=3), TopK(3, gate=of)
    query, key = inputs(partition, torch.bfloat16, 64)
    vmoba_selection(query, key, partition, rule)
    torch.cuda.set_sync_debug_mode("error")
    try:
        vmoba_selection(query, key, partition, rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vmoba_selection(query, key, partition, rule)
    for x in (query, key):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, vmoba_selection(query, key, partition, rule))


def test_no_scores_of_keys_or_cells_are_written():
    partition = BlockPartition((24, 32, 32), (8, 8, 8))
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    for of in NEW:
        gate_scores(query, key, partition, of)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gate_scores(query, key, partition, of)
        # Twice the scores of blocks, and copies of key; the scores of cells would be eight times those of blocks.
        blocks = 2 * partition.num_tokens * partition.num_blocks * 4
        assert torch.cuda.max_memory_allocated() - before < 2 * blocks + 4 * key.numel() * 2
