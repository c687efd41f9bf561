"""The tail on a CUDA GPU: its kernels, every dispatch and backend, graphs, and the plain way compiled."""

import dataclasses
import functools

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from block_masks import CoarseKeys
from block_masks.attention import coarse_steps
from tests.paths import assert_captured_graph_replays, assert_within_budget, outputs_and_gradients, shared_selection
from tests.strategies import Problem
from tests.test_gpu import CASES, PATHS, compiled, fresh_inputs, problem, tile_size
from tests.test_tail import exactly, roughly, upstream_of
from vmoba_flex import BlockPartition, Tail, Threshold, TopK, vmoba_attention, vmoba_inputs, vmoba_selection
from vmoba_flex.cell_slots import slots_and_cells
from vmoba_flex.cells import cell_groups, cell_means
from vmoba_flex.groups import block_slots
from vmoba_flex.tail import Cells

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_at_any_size")]


@pytest.fixture(autouse=True)
def _graphs_of_one_test_only() -> None:
    """A worker may get more cases of one path than PyTorch keeps graphs of a function."""
    torch.compiler.reset()


TAILS = {
    "temporal-gqa": Tail((1, 5, 7)),
    "spatial": Tail((2, 3, 2)),
    "spatiotemporal-d64": Tail((1, 2, 4)),
    "padded-gqa": Tail((2, 5, 7)),
    "many-blocks": Tail((1, 2, 2)),
    "float32": Tail(30),
}


def tailed(case: str) -> Problem:
    return dataclasses.replace(problem(case), tail=TAILS[case])


def assert_equals_reference(case: Problem, path, size: int | None) -> None:
    upstream = upstream_of(case).cuda()
    selection = vmoba_selection(case.query, case.key, case.partition, case.rule)
    if size is not None:
        selection = shared_selection(case, size)
    actual = outputs_and_gradients(path, case, upstream)
    low = outputs_and_gradients(lambda p: roughly(p, selection), case, upstream)
    exact = outputs_and_gradients(lambda p: exactly(p, selection), case.to(torch.float64), upstream)
    valid = (upstream != 0).any(-1, keepdim=True)  # padding has outputs of its own
    actual[0], low[0], exact[0] = (torch.where(valid, x[0], 0) for x in (actual, low, exact))
    assert_within_budget(actual, low, exact, factor=3.0)


@pytest.mark.parametrize("case", TAILS)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_reference_with_gradients(case: str, path: str):
    attended = tailed(case)
    if path == "packed-compiled" and isinstance(attended.rule, Threshold):  # which a graph wants bounded
        attended = dataclasses.replace(attended, rule=dataclasses.replace(attended.rule, max_density=0.5))
    assert_equals_reference(attended, PATHS[path], tile_size(path))


def plainly(case: Problem) -> torch.Tensor:
    """The user's own line, in block order."""
    assert case.tail is not None
    q, k, v = (case.partition.to_block_order(x) for x in (case.query, case.key, case.value))
    key, value, mask, score_mod = vmoba_inputs(
        q, k, v, case.partition, case.rule, tail=case.tail, token_order="block", text_lengths=case.text_lengths
    )
    output = flex_attention(q, key, value, block_mask=mask, score_mod=score_mod, scale=case.scale, enable_gqa=case.gqa)
    assert isinstance(output, torch.Tensor)
    return case.partition.to_raster_order(output)


@pytest.mark.parametrize("case", ["temporal-gqa", "spatiotemporal-d64"])
def test_the_plain_way_compiled_equals_the_reference(case: str):
    assert_equals_reference(tailed(case), compiled(plainly), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dims", "repeats", "together"), [((128, 128), 1, 1), ((64, 40), 2, 1), ((80, 256), 1, 128)])
def test_kernels_equal_their_eager_forms(dtype: torch.dtype, dims: tuple[int, int], repeats: int, together: int):
    from block_masks.attention import coarse_kernels

    generator = torch.Generator("cuda").manual_seed(0)
    heads, queries, cells, groups = 4, 900, 200, 70

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    group = torch.randint(groups, (cells,), device="cuda", generator=generator)
    keys, bias = [random(heads // repeats, cells, dim) for dim in dims], torch.rand(cells, device="cuda") * 5
    coarse = CoarseKeys(keys[0], keys[1], bias, group)
    selected = (torch.rand(heads, groups, -(-queries // together), device="cuda", generator=generator) < 0.4).mT
    selected[:, 0], selected[:, -1] = True, False
    query, output, grad = (random(heads, queries, dim) for dim in (dims[0], dims[1], dims[1]))
    lse = torch.randn(heads, queries, device="cuda", generator=generator) * 3
    results = []
    for steps in (coarse_steps, coarse_kernels):
        merged, merged_lse, grad_query = torch.empty_like(output), torch.empty_like(lse), torch.zeros_like(query)
        steps.merge_coarse(query, coarse, selected, output, lse, (merged, merged_lse), 0.3, together)
        delta = (grad.float() * merged.float()).sum(-1)
        grads = steps.coarse_backward(query, coarse, selected, grad, merged_lse, delta, grad_query, 0.3, together)
        split = steps.split_grad(grad, output, lse, merged_lse, delta)
        results.append([merged, merged_lse, grad_query, *grads, *split])
    assert torch.equal(results[1][0][:, :together], output[:, :together])  # chose everything
    limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for eager, kernel in zip(*results, strict=True):
        assert (kernel.float() - eager.float()).norm() <= limit * eager.float().norm()


@pytest.mark.parametrize("cell", [(1, 1, 1), (2, 3, 5), (3, 4, 4)])
def test_means_of_cells_equal_the_cpu_ones(cell: tuple[int, int, int]):
    partition = BlockPartition((5, 7, 9), (3, 4, 5), prefix=3, suffix=2)
    cells = Cells(partition, cell)
    x = torch.randn(2, 3, partition.num_tokens, 24, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2, 3, cells.total, 24, generator=torch.Generator().manual_seed(1))
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        means = cell_means(leaf, cells)
        results.append([means, *torch.autograd.grad(means, leaf, grad.to(device)), *cell_groups(cells, leaf)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("cell", [(1, 1, 1), (2, 3, 5)])
def test_slots_and_cells_equal_the_cpu_ones(cell: tuple[int, int, int]):
    partition = BlockPartition((5, 7, 9), (3, 4, 5), prefix=3, suffix=2)
    inputs = torch.randn(2, 2, 3, partition.num_tokens, 24, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        key, value = leaves = [x.to(device).requires_grad_() for x in inputs]
        slots = block_slots(partition, torch.device(device))
        *moved, coarse = slots_and_cells(key, value, partition, Tail(cell), slots)
        grads = [torch.arange(x.numel(), device=device).view_as(x) % 7.0 for x in (*moved, *coarse[:2])]
        results.append([*moved, *coarse, *torch.autograd.grad([*moved, *coarse[:2]], leaves, grads)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("path", PATHS)
def test_no_host_reads(path: str):
    case = dataclasses.replace(tailed("spatial"), rule=TopK(2)).with_leaves()
    leaves = case.query, case.key, case.value
    upstream = torch.randn_like(case.query)
    for _ in range(2):  # compiled, checked and warm first
        torch.autograd.grad(PATHS[path](case), leaves, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(PATHS[path](case), leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", ["tiles", "packed-triton", "shared-triton"])
def test_same_bits_twice(path: str):
    case = tailed("spatial")
    upstream = torch.randn_like(case.query)
    runs = [outputs_and_gradients(PATHS[path], case, upstream) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("path", ["tiles", "shared", "packed", "packed-triton"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_sample(bad: float, path: str):
    case = tailed("spatial")
    before = PATHS[path](case)
    for x in (case.query, case.key, case.value):
        x[0, 0, 700, 3] = bad
    after = PATHS[path](case)
    assert after[0, 0, 700].isnan().all()
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("dispatch", ["packed", "tiles", "shared"])
def test_a_captured_graph_replays_with_fresh_inputs(dispatch: str):
    partition = CASES["spatial"][0]
    options = {"dispatch": dispatch, "backend": "triton", "tail": Tail((2, 3, 2))}
    attend = functools.partial(vmoba_attention, partition=partition, rule=TopK(2), **options)
    assert_captured_graph_replays(attend, functools.partial(fresh_inputs, partition))
