"""The same properties on a CUDA GPU, where compiled kernels differ from the CPU's, and what only a GPU can show."""

import dataclasses
import functools
import gc
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from block_masks import plan_slots, slot_mask, tile_lists
from block_masks.attention import row_steps
from block_masks.plans.slots import SLOT_TENSORS
from tests.paths import (
    assert_captured_graph_replays,
    assert_equals_dense_masked_attention,
    assert_within_budget,
    exact,
    expected_mask,
    low_precision,
    outputs_and_gradients,
    shared_choice,
    shared_selection,
    through_attention,
    through_mask,
)
from tests.strategies import Problem, gates, partitions, problems, rules
from tests.test_block_masks import INDEX_TENSORS
from tests.test_reference import is_softmax
from tests.test_rows import RowProblem, row_problems
from tests.test_selection import own_blocks
from tests.test_shared import exact_means
from tests.test_slots import slot_problems
from vmoba_flex import BlockPartition, Threshold, TopK, reference, vmoba_attention, vmoba_mask, vmoba_selection
from vmoba_flex.dispatch.choose import choose_backend
from vmoba_flex.insight import Record, inspect
from vmoba_flex.rules import POOLS, Pool, Rule
from vmoba_flex.selection.gate import block_means, gate
from vmoba_flex.selection.mass import block_mass
from vmoba_flex.selection.select import SHORT, select
from vmoba_flex.warmup import warmed

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_at_any_size")]

GRID = (5, 14, 18)
CASES = {
    "temporal-gqa": (BlockPartition.temporal(GRID, 2, prefix=100, suffix=30), TopK(2), 2, 128, torch.bfloat16),
    "spatial": (BlockPartition.spatial(GRID, (6, 6)), Threshold(0.25), 4, 128, torch.bfloat16),
    "spatiotemporal-d64": (
        BlockPartition(GRID, (2, 5, 7), suffix=77),
        Threshold(0.3, pool="global"),
        4,
        64,
        torch.float16,
    ),
    "padded": (BlockPartition(GRID, (2, 5, 7), prefix=20, suffix=290), Threshold(0.3), 4, 64, torch.bfloat16),
    "padded-gqa": (BlockPartition(GRID, (2, 5, 7), prefix=20, suffix=290), TopK(3), 2, 128, torch.bfloat16),
    "padded-slabs": (BlockPartition.temporal((8, 8, 16), 1, suffix=256), TopK(3), 4, 128, torch.bfloat16),
    "many-blocks": (BlockPartition(GRID, (2, 3, 4)), TopK(density=0.2, pool="head"), 4, 64, torch.bfloat16),
    "420-blocks": (BlockPartition(GRID, (1, 1, 3)), Threshold(0.25, pool="query"), 4, 128, torch.bfloat16),
    "float32": (
        BlockPartition(GRID, (3, 7, 9), prefix=1),
        Threshold(0.3, pool="block", max_density=0.5),
        4,
        64,
        torch.float32,
    ),
}


def problem(case: str, seed: int = 0) -> Problem:
    partition, rule, key_heads, head_dim, dtype = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads: int) -> torch.Tensor:
        x = torch.randn(2, heads, partition.num_tokens, head_dim, generator=generator)
        return x.to("cuda", dtype)

    scale = {"temporal-gqa": 0.05, "many-blocks": 0.2}.get(case)
    lengths = {"spatiotemporal-d64": [50, 0]}.get(case, [0, 150] if case.startswith("padded") else None)
    lengths = None if lengths is None else torch.tensor(lengths, device="cuda")
    return Problem(tensor(4), tensor(key_heads), tensor(key_heads), partition, rule, scale, lengths)


@functools.cache
def compiled(path):
    return torch.compile(path, fullgraph=True, dynamic=False)


tiles = through_attention("tiles")


PATHS = {
    "tiles": tiles,
    "tiles-compiled": compiled(tiles),
    "packed": through_attention("packed"),
    "packed-compiled": compiled(through_attention("packed")),
    "packed-triton": through_attention("packed", "triton"),
    "shared": through_attention("shared"),
    "shared-triton": through_attention("shared", "triton"),
    "shared-compiled": compiled(through_attention("shared")),
}


def tile_size(path: str) -> int | None:
    """How many queries of a path choose together."""
    return 128 if path.startswith("shared") else None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_outputs_and_gradients_equal_dense_masked_attention(case: str, path: str):
    given_problem = problem(case)
    if path == "packed-compiled" and isinstance(given_problem.rule, Threshold):
        given_problem = dataclasses.replace(
            given_problem, rule=dataclasses.replace(given_problem.rule, max_density=0.4)
        )
    mask = expected_mask(given_problem, tile_size(path))
    upstream = torch.randn_like(given_problem.query)
    assert_equals_dense_masked_attention(PATHS[path], given_problem, upstream, mask)


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("case", ["temporal-gqa", "spatiotemporal-d64"])
def test_the_plain_way_compiled_equals_dense_masked_attention(case: str, order: str):
    given_problem = problem(case)
    mask = expected_mask(given_problem)
    with torch.no_grad():
        output = compiled(through_mask(order, tile_size=128))(given_problem)
    assert_within_budget([output], [low_precision(given_problem, mask)], [exact(given_problem, mask)])


@pytest.mark.parametrize("case", CASES)
def test_compiled_selections_and_masks_equal_eager_ones(case: str):
    given_problem = problem(case)
    arguments = (given_problem.query, given_problem.key, given_problem.partition, given_problem.rule)
    selection = vmoba_selection(*arguments)
    # The compiled gate may round otherwise, and flip pairs at the cut.
    flips = (compiled(vmoba_selection)(*arguments) ^ selection).float().mean()
    assert flips < 1e-4

    def index_tensors(query, key, partition, rule):
        mask = vmoba_mask(query, key, partition, rule, token_order="block")
        return [getattr(mask, name) for name in INDEX_TENSORS]

    flipped = zip(compiled(index_tensors)(*arguments), index_tensors(*arguments), strict=True)
    assert flips > 0 or all(torch.equal(x, y) for x, y in flipped)


@pytest.mark.parametrize("case", CASES)
def test_compiled_choices_and_masks_of_shared_tiles_equal_eager_ones(case: str):
    def choice_and_lists(problem: Problem) -> list[torch.Tensor]:
        selected, slots = shared_choice(problem)
        mask = slot_mask(selected, slots)
        return [selected, *(getattr(slots, name) for name in SLOT_TENSORS), *(getattr(mask, n) for n in INDEX_TENSORS)]

    given_problem = problem(case)
    actual, expected = compiled(choice_and_lists)(given_problem), choice_and_lists(given_problem)
    # The compiled mean may round otherwise, and flip choices at the cut.
    flips = (actual[0] ^ expected[0]).float().mean()
    assert flips < 1e-3
    assert flips > 0 or all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@given(slot_problems())
def test_slots_equal_the_cpu_ones(slots):
    on_gpu = plan_slots(slots.key_group.cuda(), slots.group_sizes, slots.tile_size)
    for name in SLOT_TENSORS:
        assert torch.equal(getattr(on_gpu, name).cpu(), getattr(slots.plan(), name)), name
    masks = slot_mask(slots.selected.cuda(), on_gpu), slot_mask(slots.selected, slots.plan())
    for name in INDEX_TENSORS:
        assert torch.equal(getattr(masks[0], name).cpu(), getattr(masks[1], name)), name


@pytest.mark.parametrize("columns", [1, 130, 432, 2000, 4096, 4097, 9000])
def test_lists_of_tiles_equal_the_cpu_ones(columns: int):
    tiles = torch.rand(2, 3, 9, columns, generator=torch.Generator()) < torch.linspace(0, 1, 9)[:, None]
    for one in (tiles, tiles.mT, tiles.mT.contiguous().mT):
        for actual, expected in zip(tile_lists(one.cuda()), tile_lists(one), strict=True):
            assert torch.equal(actual.cpu(), expected)


@given(problems(exact=True), st.sampled_from([1, 3, 4, 128]))
@settings(max_examples=200)
def test_shared_choices_equal_the_cpu_ones_where_arithmetic_is_exact(case: Problem, tile_size: int):
    case = exact_means(case, tile_size)
    on_gpu = case.to(torch.device("cuda"))
    assert torch.equal(shared_selection(on_gpu, tile_size).cpu(), shared_selection(case, tile_size))


@given(problems(exact=True))
@settings(max_examples=200)
def test_selections_equal_the_cpu_ones_where_arithmetic_is_exact(case: Problem):
    expected = vmoba_selection(case.query, case.key, case.partition, case.rule)
    on_gpu = case.to(torch.device("cuda"))
    assert torch.equal(vmoba_selection(on_gpu.query, on_gpu.key, case.partition, case.rule).cpu(), expected)


@given(st.data())
@settings(max_examples=200)
def test_selection_kernels_equal_their_eager_forms(data: st.DataObject):
    partition = data.draw(partitions(text=False))
    rule = data.draw(rules(partition.num_blocks))
    scores, own = data.draw(gates(partition, masses=is_softmax(rule))), own_blocks(partition)
    if data.draw(st.booleans()):
        scores[0, 0, 0, 0] = data.draw(st.sampled_from([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0]))
    assert torch.equal(select(scores.cuda(), own.cuda(), rule).cpu(), select(scores, own, rule))


@pytest.mark.parametrize(
    "rule", [*(Threshold(0.25, pool=pool) for pool in POOLS), TopK(9), TopK(9, pool="head")], ids=repr
)
@pytest.mark.parametrize("levels", [None, 5, 1], ids=["reals", "ties", "constant"])
def test_selection_kernels_equal_their_eager_forms_in_long_pools(rule: Rule, levels: int | None):
    partition = BlockPartition.spatial((6, 36, 64), (6, 8))
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, partition.num_tokens, partition.num_blocks)
    scores = (
        torch.randint(levels, shape, generator=generator).float() if levels else torch.randn(shape, generator=generator)
    )
    own = own_blocks(partition)
    assert torch.equal(select(scores.cuda(), own.cuda(), rule).cpu(), select(scores, own, rule))


@pytest.mark.parametrize("tau", [0.25, 0.9])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sharpness", [0, 1, 30])
def test_selection_kernels_equal_their_eager_forms_in_long_pools_of_masses(sharpness: float, pool: str, tau: float):
    partition = BlockPartition.spatial((6, 35, 62), (6, 8))
    shape = (2, 2, partition.num_tokens, partition.num_blocks)
    gates_here = sharpness * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores, own = block_mass(gates_here, partition, head_dim=1), own_blocks(partition)
    on_gpu = block_mass(gates_here.cuda(), partition, head_dim=1).cpu()
    torch.testing.assert_close(on_gpu, scores, rtol=1e-5 * (1 + sharpness), atol=1e-30)
    for cap in (None, 0.2):
        rule = Threshold(tau, pool=pool, max_density=cap, normalize="softmax")
        assert torch.equal(select(scores.cuda(), own.cuda(), rule).cpu(), select(scores, own, rule))


@pytest.mark.parametrize("bad", [[torch.nan, -torch.nan], [torch.inf], [-torch.inf], [1e9], []], ids=repr)
@pytest.mark.parametrize("pool", POOLS)
def test_selection_kernels_equal_their_eager_forms_at_odd_sizes(pool: Pool, bad: list[float]):
    partition = BlockPartition((7, 11, 13), (2, 3, 4))  # 64 blocks cut short, 1,001 queries
    scores = torch.randn(2, 3, partition.num_video_tokens, partition.num_blocks, generator=torch.Generator())
    scores[0, 1, 5, : len(bad)] = torch.tensor(bad)
    own = own_blocks(partition)
    rules_here: list[Rule] = [
        Threshold(tau, pool=pool, max_density=cap) for tau in (1e-3, 0.3, 1.0) for cap in (1e-3, 0.2, None)
    ]
    if pool != "block":
        rules_here += [TopK(1, pool=pool), TopK(9, pool=pool), TopK(partition.num_blocks, pool=pool)]
    for rule in rules_here:
        actual = select(scores.cuda(), own.cuda(), rule)
        expected = select(scores, own, rule)
        assert torch.equal(actual.cpu(), expected), rule
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("blocks", [1, 2, 72, 100, 513, 1024, 1025, 2049, SHORT, SHORT + 1])
@pytest.mark.parametrize(
    "rule", [TopK(1), Threshold(0.25, pool="query"), Threshold(0.5, pool="query", max_density=0.1)]
)
def test_selection_kernels_equal_their_eager_forms_for_any_number_of_blocks(rule: Rule, blocks: int):
    partition = BlockPartition((blocks, 1, 1), (1, 1, 1))
    own = own_blocks(partition)[:256]
    scores = torch.randn(1, 2, *own.shape, generator=torch.Generator()).mul(8).round()
    assert torch.equal(select(scores.cuda(), own.cuda(), rule).cpu(), select(scores, own, rule))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="torch prefers cuDNN on Hopper"
)
@pytest.mark.skipif((torch.backends.cudnn.version() or 0) <= 91500, reason="torch leaves out cuDNN up to 9.15.0")
def test_full_attention_is_cudnns_on_hopper_by_torchs_own_choice():
    partition = BlockPartition.temporal((8, 16, 16), 1)
    leaves = [
        torch.randn(1, 4, partition.num_tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        vmoba_attention(*leaves, partition, TopK(2), dispatch="dense").sum().backward()
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages()]
    assert len([name for name in kernels if "cudnn" in name]) >= 2, kernels  # forward and backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 72, 128, 256])
@pytest.mark.parametrize(
    "partition",
    [
        BlockPartition((5, 14, 18), (2, 5, 7), prefix=3, suffix=2),
        BlockPartition.temporal((5, 14, 18), 5),
        BlockPartition((5, 14, 18), (1, 1, 3), suffix=1),
    ],
    ids=["edges", "one-block", "420-blocks"],
)
def test_gate_kernels_are_as_accurate_as_float32(partition: BlockPartition, head_dim: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    # Heads inside tokens, as projections leave them; a common offset, as real keys have.
    query = torch.randn(2, partition.num_tokens, 4, head_dim, generator=generator).to("cuda", dtype).transpose(1, 2)
    key = torch.randn(2, 2, partition.num_tokens, head_dim, generator=generator).add(3).to("cuda", dtype)
    truth = gate(query.double(), key.double(), partition)
    single = gate(query.float(), key.float(), partition)
    scores = gate(query, key, partition)
    means = block_means(key.double().abs(), partition).repeat_interleave(2, 1)
    video = query[:, :, partition.prefix :][:, :, : partition.num_video_tokens].double().abs()
    # A chain of n float32 operations is off by at most n half-ulps of the sum of magnitudes.
    assert ((scores - truth).abs() <= (head_dim + 64) * torch.finfo(torch.float32).eps * (video @ means.mT)).all()
    # On average no worse than float32 products, but for what tensor cores cut off where they would round.
    assert (scores - truth).abs().mean() <= 4 * (single - truth).abs().mean() + 1e-7
    assert scores.stride() == truth.stride()
    assert torch.equal(scores, gate(query, key, partition))


@pytest.mark.parametrize("rule", [Threshold(0.25, max_density=0.25), TopK(2), TopK(2, pool="head")], ids=repr)
def test_a_selection_can_be_captured_in_a_cuda_graph(rule: Rule):
    partition = CASES["spatial"][0]
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    vmoba_selection(query, key, partition, rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vmoba_selection(query, key, partition, rule)
    for x in (query, key):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, vmoba_selection(query, key, partition, rule))


@pytest.mark.parametrize("rule", [TopK(2), TopK(2, pool="global"), Threshold(0.25), Threshold(0.25, max_density=0.3)])
@pytest.mark.parametrize("path", PATHS)
def test_no_host_reads(rule: Rule, path: str):
    if path.startswith("packed") and rule == Threshold(0.25):
        pytest.skip("reads one number by design: the rule does not bound the rows")
    partition = CASES["spatial"][0]
    query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    case = Problem(query, key, value, partition, rule)

    def run() -> None:
        outputs_and_gradients(PATHS[path], case, query)
        dispatch, backend = path.partition("-")[0], "triton" if path.endswith("triton") else "auto"
        vmoba_attention(query, key, value, partition, rule, dispatch=dispatch, backend=backend, return_stats=True)

    run()  # compiles, which may read the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", ["tiles", "packed-triton", "shared-triton"])
def test_same_bits_twice(path: str):
    case, upstream = problem("spatial"), torch.randn_like(problem("spatial").query)
    for x, y in zip(*(outputs_and_gradients(PATHS[path], case, upstream) for _ in range(2)), strict=True):
        assert torch.equal(x, y)


@given(row_problems())
@settings(max_examples=100)
def test_row_plans_equal_the_cpu_ones(rows: RowProblem):
    expected, actual = rows.plan(), rows.to("cuda").plan()
    for name in ("row_query", "row_pool", "query_count", "first_tile", "tiles"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
    # Anything may follow a query's last row.
    listed = [row_steps._listed(plan.query_rows.cpu(), expected.query_count) for plan in (actual, expected)]
    assert torch.equal(*listed)


@given(row_problems(tile_size=128), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.5, -0.3, 0.0]))
@settings(max_examples=60)
def test_row_kernels_equal_their_eager_forms(rows: RowProblem, dtype: torch.dtype, scale: float):
    rows = rows.to("cuda")
    leaves = [x.to(dtype).requires_grad_() for x in (rows.query, rows.key, rows.value)]
    results = []
    for backend, kind in (("triton", dtype), ("eager", torch.float64)):
        inputs = [x.detach().to(kind).requires_grad_() for x in leaves]
        output, lse = rows.attend(*inputs, scale=scale, backend=backend)
        upstream = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output).to(kind)
        results.append([output, lse, *torch.autograd.grad(output, inputs, upstream)])
    # Sums of a few hundred products, each rounded to the inputs' dtype once or twice. Where they cancel, as in the
    # gradient of a query with one key, what is left is of rounding numbers of order one.
    step = 1e-5 if dtype == torch.float32 else 2e-2
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual == -torch.inf, expected == -torch.inf)
        actual, expected = (x.detach().double().nan_to_num(neginf=0) for x in (actual, expected))
        torch.testing.assert_close(actual, expected, rtol=step, atol=step * max(expected.abs().max().item(), 0.1))


@pytest.mark.parametrize("path", ["tiles", "shared", "packed", "packed-triton"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_sample(bad: float, path: str):
    case = problem("spatial")
    before = PATHS[path](case)
    for x in (case.query, case.key):
        x[0, 0, 700, 3] = bad
    after = PATHS[path](case)
    assert after[0, 0, 700].isnan().all()
    assert torch.equal(after[1], before[1])


@pytest.mark.skipif(not importlib.util.find_spec("flash_attn"), reason="needs flash-attn-4")
@pytest.mark.parametrize("dispatch", ["packed", "shared"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [False, True])
def test_flash_is_taken_where_it_is_installed(dispatch: str, head_dim: int, dtype: torch.dtype, gradients: bool):
    partition = BlockPartition((4, 16, 16), (2, 8, 8))
    size = 1, 2, partition.num_tokens, head_dim
    query = torch.randn(size, device="cuda", dtype=dtype, requires_grad=gradients)
    assert choose_backend("auto", dispatch, query, query, query, partition) == ("flash", "")


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared"])
@pytest.mark.parametrize(
    "partition",
    [
        BlockPartition.temporal((24, 36, 64), 3),
        BlockPartition.spatial((24, 36, 64), (6, 8)),
        BlockPartition.spatiotemporal((24, 36, 64), (8, 12, 8)),
    ],
    ids=["temporal", "spatial", "spatiotemporal"],
)
def test_memory_at_55296_tokens_holds_no_square(partition: BlockPartition, dispatch: str):
    heads, tokens = 12, partition.num_tokens
    leaves = [
        torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vmoba_attention(*leaves, partition, Threshold(0.25), dispatch=dispatch).sum().backward()
    # Above the output and four gradients, as large as the inputs each.
    peak = torch.cuda.max_memory_allocated() - before - 5 * leaves[0].nbytes
    # One byte per query and key, without heads, would be 3.06 GB.
    assert peak < tokens**2, f"peak {peak / 1e9:.2f} GB"
    rows = torch.randperm(tokens, device="cuda")[:64]
    query, key, value = (x.detach() for x in leaves)
    if dispatch == "shared":
        selection = shared_selection(Problem(query, key, value, partition, Threshold(0.25)), 128)
    else:
        selection = vmoba_selection(query, key, partition, Threshold(0.25))
    mask = selection[:, :, rows][..., partition.block_ids("cuda")]
    output = vmoba_attention(query, key, value, partition, Threshold(0.25), dispatch=dispatch)[:, :, rows]
    truth = reference.attention(query[:, :, rows], key, value, mask)[0]
    low = torch.nn.functional.scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=mask)
    assert_within_budget([output], [low], [truth])


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dispatch", ["packed", "shared"])
@pytest.mark.parametrize(
    "partition",
    [
        BlockPartition((4, 30, 52), (4, 5, 13)),
        BlockPartition((4, 32, 64), (4, 8, 16)),
    ],
    ids=["cut-tiles", "whole-tiles"],
)
def test_rounding_is_near_that_of_full_attention(partition: BlockPartition, dispatch: str, backend: str):
    rule = Threshold(0.25, max_density=0.25)
    query, key, value = torch.randn(3, 1, 3, partition.num_tokens, 128, device="cuda", dtype=torch.bfloat16)
    if dispatch == "shared":
        selection = shared_selection(Problem(query, key, value, partition, rule), 128)
    else:
        selection = vmoba_selection(query, key, partition, rule)
    output = vmoba_attention(query, key, value, partition, rule, dispatch=dispatch, backend=backend)
    truth = reference.attention(query, key, value, selection[..., partition.block_ids("cuda")])[0]
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    true_full = reference.attention(query, key, value)[0]
    own = (full - true_full).norm() / true_full.norm()
    assert (output - truth).norm() / truth.norm() <= 1.3 * own


EDGES = {
    "one-block": (BlockPartition((2, 9, 11), (2, 9, 11)), TopK(1)),
    "one-token-blocks": (BlockPartition((1, 17, 17), (1, 16, 16)), TopK(2)),
    "one-token": (BlockPartition((1, 1, 1), (1, 1, 1)), Threshold(0.25, max_density=0.5)),
    "prime-tokens": (BlockPartition((1, 1, 1009), (1, 1, 100), prefix=3), Threshold(0.25, max_density=0.25)),
}


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("edge", EDGES)
def test_packed_at_the_edges(edge: str, backend: str):
    partition, rule = EDGES[edge]
    query, key, value, upstream = torch.randn(4, 2, 2, partition.num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    case = Problem(query, key, value, partition, rule)
    mask = expected_mask(case)
    assert_equals_dense_masked_attention(through_attention("packed", backend), case, upstream, mask)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_packed_where_all_queries_choose_one_block(backend: str):
    partition = BlockPartition.spatial((4, 24, 24), (6, 8))
    query, key, value, upstream = torch.randn(4, 1, 2, partition.num_tokens, 128, device="cuda", dtype=torch.bfloat16)
    query[:, 1] = query[:, 1].abs()
    key[:, 1][:, partition.block_ids("cuda") == 5] += 4  # every query of the second head likes block 5 best
    case = Problem(query, key, value, partition, TopK(2, pool="query"))
    selection = vmoba_selection(query, key, partition, case.rule)
    assert selection[0, 1, :, 5].all()
    mask = expected_mask(case)
    assert_equals_dense_masked_attention(through_attention("packed", backend), case, upstream, mask)


def test_packed_at_a_million_tokens():
    partition = BlockPartition.spatiotemporal((64, 128, 128), (8, 32, 32))
    query, key, value = torch.randn(3, 1, 1, partition.num_tokens, 128, device="cuda", dtype=torch.bfloat16)
    rule = TopK(5)
    output = vmoba_attention(query, key, value, partition, rule, dispatch="packed")
    rows = torch.randint(partition.num_tokens, (32,), device="cuda")
    mask = vmoba_selection(query, key, partition, rule)[:, :, rows][..., partition.block_ids("cuda")]
    truth = reference.attention(query[:, :, rows], key, value, mask)[0]
    low = torch.nn.functional.scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=mask)
    assert_within_budget([output[:, :, rows]], [low], [truth])


CAPTURED = {"packed": Threshold(0.25, max_density=0.4), "tiles": Threshold(0.25), "shared": Threshold(0.25)}


def fresh_inputs(partition: BlockPartition, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (1, 2, partition.num_tokens, 128)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("dispatch", CAPTURED)
def test_a_captured_graph_replays_with_fresh_inputs(dispatch: str):
    partition, rule = CASES["spatial"][0], CAPTURED[dispatch]
    attend = functools.partial(vmoba_attention, partition=partition, rule=rule, dispatch=dispatch, backend="triton")
    assert_captured_graph_replays(attend, functools.partial(fresh_inputs, partition))


@pytest.mark.parametrize("dispatch", CAPTURED)
def test_reduce_overhead_gives_what_eager_gives(dispatch: str):
    partition, rule = CASES["spatial"][0], CAPTURED[dispatch]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return vmoba_attention(query, key, value, partition, rule, dispatch=dispatch, backend="triton")

    fast = torch.compile(attend, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for seed in range(4):
        *inputs, upstream = fresh_inputs(partition, seed)
        leaves = [x.requires_grad_() for x in inputs]
        torch.compiler.cudagraph_mark_step_begin()
        output = fast(*leaves)
        gradients = torch.autograd.grad(output, leaves, upstream)
        expected = attend(*leaves)
        truth = [expected, *torch.autograd.grad(expected, leaves, upstream)]
        for x, y in zip([output, *gradients], truth, strict=True):
            # The compiled mean query of a tile may round otherwise, and flip choices at the cut.
            assert (x - y).norm() <= (0.05 if dispatch == "shared" else 1e-2) * y.norm()


@pytest.mark.parametrize("dispatch", CAPTURED)
def test_a_warm_up_makes_no_graph_anew(dispatch: str):
    partition, rule = CASES["spatial"][0], CAPTURED[dispatch]
    *inputs, upstream = fresh_inputs(partition, 0)
    leaves = [x.requires_grad_() for x in inputs]
    torch.compiler.reset()
    attend = functools.partial(vmoba_attention, *leaves, partition, dispatch=dispatch, backend="triton")
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    for i, share in enumerate((0.3, 0.6, 1.0)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual = compiled(rule=warmed(rule, share))
        expected = attend(rule=dataclasses.replace(rule, tau=1 - share * (1 - rule.tau)))
        for x, y in zip(
            (actual, *torch.autograd.grad(actual, leaves, upstream)),
            (expected, *torch.autograd.grad(expected, leaves, upstream)),
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_a_rule_that_is_warmed_up_is_refused_in_a_cuda_graph():
    partition, rule = CASES["spatial"][0], warmed(Threshold(0.25, max_density=0.4), 1.0)
    query, key, *_ = fresh_inputs(partition, 0)
    vmoba_selection(query, key, partition, rule)
    capturing = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(ValueError, match="must not be warmed up inside a CUDA graph"), capturing:
        vmoba_selection(query, key, partition, rule)


def test_reports_are_those_of_the_cpu():
    partition = CASES["spatial"][0]
    query, key = (x[0].float() for x in fresh_inputs(partition, 0)[:2])
    record = Record(4 * query, key, partition)
    for rule in (Threshold(0.25), Threshold(0.6, normalize="softmax"), TopK(2)):
        reports, expected = inspect([record], rule), inspect([record.to("cpu")], rule)
        for actual, one in zip(reports, expected, strict=True):
            for name in ("density", "tile_density", "recall", "best_recall", "entropy"):
                assert getattr(actual, name) == pytest.approx(getattr(one, name), abs=2e-3)
