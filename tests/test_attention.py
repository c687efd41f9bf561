"""vmoba_mask and vmoba_attention: every path equals dense masked attention."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from tests.paths import (
    SPARSE_PATHS,
    TILE_SIZES,
    assert_equals_dense_masked_attention,
    assert_within_budget,
    attend,
    exact,
    expected_mask,
    full_mask,
    low_precision,
    through_attention,
    through_mask,
)
from tests.strategies import Problem, partitions, problems
from tests.test_block_masks import INDEX_TENSORS
from vmoba_flex import BlockPartition, Tail, Threshold, TopK, reference, vmoba_attention, vmoba_mask, vmoba_selection

dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.mark.parametrize("path", SPARSE_PATHS)
@given(dtypes.flatmap(problems))
def test_outputs_equal_dense_masked_attention(path: str, problem: Problem):
    mask = expected_mask(problem, TILE_SIZES.get(path))
    output = SPARSE_PATHS[path](problem)
    assert output.dtype == problem.query.dtype
    assert_within_budget([output], [low_precision(problem, mask)], [exact(problem, mask)])


@given(problems())
def test_auto_is_packed_on_a_cpu(problem: Problem):
    assert torch.equal(through_attention("auto")(problem), through_attention("packed")(problem))


@pytest.mark.parametrize("path", [path for path in SPARSE_PATHS if not path.startswith("mask")])
@given(dtypes.flatmap(problems))
def test_gradients_equal_dense_masked_attention(path: str, problem: Problem):
    mask = expected_mask(problem, TILE_SIZES.get(path))
    upstream = torch.randn(problem.query.shape, generator=torch.Generator().manual_seed(1))
    assert_equals_dense_masked_attention(SPARSE_PATHS[path], problem, upstream, mask)


@given(problems(), st.sampled_from(["attention, tiles", *TILE_SIZES]))
def test_whole_attention_equals_the_reference_with_its_own_selection(problem: Problem, path: str):
    tile_size = TILE_SIZES.get(path)
    inputs, partition = (problem.query, problem.key, problem.value), problem.partition
    cell = Tail().cell_of(partition)
    expected, selection = reference.vmoba(*inputs, partition, problem.rule, problem.scale, tile_size, gate_cell=cell)
    # Where rounding of the gate decides, two selections are right, and the reference's may be the other one.
    if torch.equal(reference.attention_mask(selection, problem.partition), expected_mask(problem, tile_size)):
        assert (SPARSE_PATHS[path](problem) - expected).abs().max() < 1e-5 * expected.abs().max()


@given(problems(), st.sampled_from(sorted(SPARSE_PATHS)), st.booleans())
def test_everything_chosen_equals_full_attention(problem: Problem, path: str, top_k: bool):
    rule = TopK(problem.partition.num_blocks) if top_k else Threshold(1.0)
    problem = dataclasses.replace(problem, rule=rule)
    mask = full_mask(problem)
    assert_within_budget([SPARSE_PATHS[path](problem)], [low_precision(problem, mask)], [exact(problem, mask)])


@given(dtypes.flatmap(problems))
def test_dense_dispatch_is_full_attention(problem: Problem):
    full = low_precision(problem, None if problem.text_lengths is None else full_mask(problem)[:, :1])
    torch.testing.assert_close(through_attention("dense")(problem), full)


@pytest.mark.parametrize("token_order", ["raster", "block"])
@given(problems(), st.sampled_from([8, 16, 128]))
def test_mask_equals_create_block_mask(token_order: str, problem: Problem, tile_size: int):
    partition, (query, key) = problem.partition, (problem.query, problem.key)
    dense = expected_mask(problem)
    if token_order == "block":
        query, key = partition.to_block_order(query), partition.to_block_order(key)
        dense = partition.to_block_order(partition.to_block_order(dense, -1), -2)
    options = {"token_order": token_order, "tile_size": tile_size, "text_lengths": problem.text_lengths}
    mask = vmoba_mask(query, key, partition, problem.rule, **options)
    expected = create_block_mask(lambda b, h, q, k: dense[b, h, q, k], *dense.shape, device="cpu", BLOCK_SIZE=tile_size)
    for name in INDEX_TENSORS:
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name


@given(problems(), st.sampled_from(sorted(SPARSE_PATHS)), st.randoms(use_true_random=False))
def test_permuting_samples_permutes_outputs(problem: Problem, path: str, random):
    order = list(range(problem.query.shape[0]))
    random.shuffle(order)
    names = ["query", "key", "value", *["text_lengths"] * (problem.text_lengths is not None)]
    permuted = dataclasses.replace(problem, **{name: getattr(problem, name)[order] for name in names})
    torch.testing.assert_close(SPARSE_PATHS[path](permuted), SPARSE_PATHS[path](problem)[order], rtol=1e-5, atol=1e-6)


@given(
    problems(),
    st.sampled_from(sorted(SPARSE_PATHS)),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    st.booleans(),
)
def test_non_finite_values_stay_in_their_rows_and_samples(problem: Problem, path: str, bad: float, in_query: bool):
    two = {name: torch.cat([getattr(problem, name)] * 2)[:2].contiguous() for name in ("query", "key", "value")}
    problem = dataclasses.replace(problem, **two, text_lengths=None)
    before = SPARSE_PATHS[path](problem)
    token = problem.partition.num_tokens // 2
    two["query" if in_query else "key"][0, 0, token, 3] = bad
    output = SPARSE_PATHS[path](dataclasses.replace(problem, **two))
    attends = expected_mask(dataclasses.replace(problem, **two), TILE_SIZES.get(path))[0, 0, :, token]
    full = F.scaled_dot_product_attention(two["query"], two["key"], two["value"], enable_gqa=problem.gqa)[0, 0]
    assert torch.equal(output[1], before[1])
    hit = torch.arange(len(attends)) == token if in_query else attends
    assert output[0, 0][hit & full.isnan().any(-1)].isnan().all()
    assert output[0, 0][~hit].isfinite().all()


@given(problems())
def test_stats_count_pairs_and_tiles(problem: Problem):
    output, stats = attend(problem, return_stats=True)
    selection = vmoba_selection(problem.query, problem.key, problem.partition, problem.rule)
    assert torch.equal(output, through_attention("auto")(problem))
    assert torch.equal(stats.pairs, selection.sum((2, 3)))
    torch.testing.assert_close(stats.density, selection.float().mean((2, 3)))
    partition = problem.partition
    dense = partition.to_block_order(partition.to_block_order(expected_mask(problem), -1))
    tiles = F.max_pool2d(dense.float(), 128, ceil_mode=True)
    torch.testing.assert_close(stats.tile_density, tiles.mean((2, 3)))


@pytest.mark.parametrize("rule", [TopK(1), TopK(2), Threshold(0.2)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([60])], ids=["text", "padding"])
def test_tile_density_counts_full_and_partial_tiles_in_block_order(rule, lengths: torch.Tensor | None):
    partition = BlockPartition((4, 16, 16), (4, 8, 8), prefix=40, suffix=300)
    query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 8, generator=torch.Generator().manual_seed(0))
    _, stats = vmoba_attention(query, key, value, partition, rule, return_stats=True, text_lengths=lengths)
    dense = reference.attention_mask(vmoba_selection(query, key, partition, rule), partition, lengths)
    dense = partition.to_block_order(partition.to_block_order(dense, -1))
    tiles = F.max_pool2d(dense.float(), 128, ceil_mode=True)
    torch.testing.assert_close(stats.tile_density, tiles.mean((2, 3)))


@pytest.mark.parametrize("scale", [None, 0.05, 1.0])
def test_the_flex_branch_equals_the_reference(monkeypatch, scale: float | None):
    """What a GPU runs, eagerly on the CPU."""
    partition = BlockPartition((3, 5, 5), (2, 2, 3), prefix=2, suffix=3)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, partition.num_tokens, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, partition.num_tokens, 8, generator=generator)
    expected, _ = reference.vmoba(query, key, value, partition, TopK(2), scale)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    output = vmoba_attention(query, key, value, partition, TopK(2), scale=scale, enable_gqa=True)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", SPARSE_PATHS)
def test_unattended_keys_stay_out_however_low_the_attended_scores_are(path: str):
    partition = BlockPartition.temporal((3, 2, 2), 1)
    key = torch.ones(1, 1, 12, 8)
    query, value = -1e6 * key, torch.randn(1, 1, 12, 8)
    expected = value.unflatten(2, (3, 4)).mean(3, keepdim=True).expand(-1, -1, -1, 4, -1).flatten(2, 3)
    torch.testing.assert_close(SPARSE_PATHS[path](Problem(query, key, value, partition, TopK(1))), expected)


def test_the_cpu_path_saves_no_scores_for_backward():
    partition = BlockPartition.spatial((3, 8, 8), (4, 4))
    leaves = [torch.randn(1, 1, partition.num_tokens, 4, requires_grad=True) for _ in range(3)]
    saved = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        vmoba_attention(*leaves, partition, TopK(2))
    assert max(saved) < partition.num_tokens**2


def test_tile_density_counts_full_and_skips_empty_tiles():
    partition = BlockPartition.temporal((4, 16, 16), 1)
    query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 8)
    _, stats = vmoba_attention(query, key, value, partition, TopK(1), return_stats=True)
    assert (stats.tile_density == 0.25).all()


def test_dense_stats_are_full():
    partition = BlockPartition((2, 4, 4), (1, 4, 4))
    query = torch.randn(2, 3, 32, 8)
    _, stats = vmoba_attention(query, query, query, partition, TopK(1), dispatch="dense", return_stats=True)
    assert stats.density.shape == stats.pairs.shape == (2, 3)
    assert (stats.density == 1).all() and (stats.tile_density == 1).all() and (stats.pairs == 64).all()


def test_gradients_by_finite_differences():
    partition = BlockPartition((2, 2, 3), (1, 2, 2), prefix=1, suffix=1)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, partition.num_tokens, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    key, value = (
        torch.randn(1, 1, partition.num_tokens, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(2)
    )

    def attend(query, key, value):
        return vmoba_attention(query, key, value, partition, TopK(2), enable_gqa=True)

    assert torch.autograd.gradcheck(attend, (query, key, value))


@given(partitions(), st.sampled_from([3, 8, 16]), st.sampled_from(["tiles", "packed", "shared"]))
def test_value_dim_is_free(partition: BlockPartition, value_dim: int, dispatch: str):
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 8)
    value = torch.randn(1, 2, partition.num_tokens, value_dim)
    expected, _ = reference.vmoba(query, key, value, partition, TopK(1))
    output = vmoba_attention(query, key, value, partition, TopK(1), dispatch=dispatch)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared", "dense"])
def test_autocast_casts_once_for_every_path(dispatch: str):
    partition = BlockPartition.spatial((2, 6, 6), (3, 3))
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 16)
    value = torch.randn(1, 2, partition.num_tokens, 16, dtype=torch.bfloat16)
    attend = functools.partial(vmoba_attention, partition=partition, rule=Threshold(0.3), dispatch=dispatch)
    expected = attend(query.bfloat16(), key.bfloat16(), value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(query, key, value), expected)


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared"])
def test_16_bit_scores_are_accumulated_in_float32(dispatch: str):
    """Scores near 1,000 that differ by less than 16 bits hold: rounding them would change the softmax by far."""
    partition = BlockPartition((1, 1, 64), (1, 1, 64))
    query = torch.full((1, 1, 64, 16), 8.0, dtype=torch.bfloat16)
    key = torch.full((1, 1, 64, 16), 8.0, dtype=torch.bfloat16)
    key[0, 0, :, 0] += torch.arange(64) / 16
    value = torch.randn(1, 1, 64, 16, dtype=torch.bfloat16)
    output = vmoba_attention(query, key, value, partition, TopK(1), scale=1.0, dispatch=dispatch)
    expected, _ = reference.attention(query, key, value, scale=1.0)
    assert (output - expected).abs().max() < 2**-7 * expected.abs().max()


@pytest.mark.parametrize("rule", [TopK(2), TopK(2, pool="global"), Threshold(0.3), Threshold(0.3, max_density=0.5)])
def test_packed_head_groups_do_not_show(rule):
    partition = BlockPartition.spatial((3, 5, 5), (2, 3), prefix=2)
    query, key, value = torch.randn(3, 2, 6, partition.num_tokens, 8)
    attend = functools.partial(vmoba_attention, query, key, value, partition, rule, dispatch="packed")
    whole = attend()
    for max_row_bytes in (1, 200_000):
        torch.testing.assert_close(attend(max_row_bytes=max_row_bytes), whole, rtol=1e-6, atol=1e-6)


def test_chunks_do_not_show(monkeypatch):
    partition = BlockPartition.spatial((3, 5, 5), (2, 3), prefix=2)
    query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 8)
    whole = vmoba_attention(query, key, value, partition, TopK(2))
    monkeypatch.setattr("vmoba_flex.dispatch.chunked._CHUNK_SCORES", 2 * partition.num_tokens * 7)
    torch.testing.assert_close(vmoba_attention(query, key, value, partition, TopK(2)), whole, rtol=1e-6, atol=1e-6)


def test_inputs_are_not_changed_and_may_be_strided():
    partition = BlockPartition.temporal((4, 3, 3), 2)
    stacked = torch.randn(1, partition.num_tokens, 3, 2, 8)
    query, key, value = stacked.transpose(1, 3).unbind(2)
    copies = [x.clone() for x in (query, key, value)]
    for path in SPARSE_PATHS.values():
        strided = path(Problem(query, key, value, partition, TopK(1)))
        torch.testing.assert_close(strided, path(Problem(*copies, partition, TopK(1))))
    assert all(torch.equal(x, copy) for x, copy in zip((query, key, value), copies, strict=True))


PARTITION = BlockPartition((2, 3, 4), (1, 3, 2))
X = torch.zeros(1, 4, 24, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"dispatch": "fast"},
            ValueError,
            r"dispatch must be one of \('auto', 'tiles', 'packed', 'shared', 'dense'\), got 'fast'",
        ),
        ({"backend": "cuda"}, ValueError, r"backend must be one of \('auto', 'triton', 'flash'\), got 'cuda'"),
        ({"value": X[:, :2]}, ValueError, r"value must have shape \(1, 4, 24, 8\) .* got \(1, 2, 24, 8\)"),
        ({"value": X.half()}, TypeError, "value must have query's dtype torch.float32, got torch.float16"),
        ({"value": X[0]}, ValueError, "value must have 4 dims"),
        ({"value": None}, TypeError, "value must be a float16, .* tensor, got NoneType"),
        ({"value": X.to("meta")}, ValueError, "value must be on query's device cpu, got meta"),
        (
            {"key": X[:, :2], "value": X[:, :2]},
            ValueError,
            "key must have query's 4 heads unless enable_gqa=True, got 2",
        ),
        ({"query": X[:, :, :9]}, ValueError, r"query must have grid \+ prefix \+ suffix = 2x3x4 \+ 0 \+ 0 = 24 tokens"),
        ({"rule": TopK(7)}, ValueError, "k must lie in 1..num_blocks = 1..4, got 7"),
        ({"dispatch": "shared", "rule": TopK(7)}, ValueError, "k must lie in 1..num_blocks = 1..4, got 7"),
        ({"dispatch": "shared", "backend": "triton"}, ValueError, "backend must be 'auto' on device cpu, got 'triton'"),
        ({"dispatch": "dense", "rule": TopK(7)}, ValueError, "k must lie in 1..num_blocks = 1..4, got 7"),
        (
            {"dispatch": "dense", "rule": None},
            ValueError,
            "exactly one of rule and selection must be given, got None and None",
        ),
        ({"scale": "big"}, TypeError, "scale must be a number or None, got 'big'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"max_row_bytes": 0}, ValueError, "max_row_bytes must be at least 1, got 0"),
        ({"max_row_bytes": 1.5}, TypeError, "max_row_bytes must be an int, got 1.5"),
        ({"backend": "triton"}, ValueError, "backend must be 'auto' on device cpu, got 'triton'"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"query": X, "key": X, "value": X, "partition": PARTITION, "rule": TopK(1)} | changes
    with pytest.raises(error, match=message):
        vmoba_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_order": "column"}, ValueError, r"token_order must be one of \('raster', 'block'\), got 'column'"),
        ({"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ({"tile_size": 64.0}, TypeError, "tile_size must be an int, got 64.0"),
        ({"query": X[:, :, 1:], "token_order": "block"}, ValueError, "query must have grid"),
    ],
)
def test_bad_mask_input(changes, error, message):
    arguments = {"query": X, "key": X, "partition": PARTITION, "rule": TopK(1)} | changes
    with pytest.raises(error, match=message):
        vmoba_mask(**arguments)


def test_through_mask_covers_both_orders():
    """The two mask paths differ in what they are given, or one of them would test nothing."""
    partition = BlockPartition.spatial((2, 4, 4), (2, 2))
    query, key, value = torch.randn(3, 1, 1, partition.num_tokens, 8)
    raster = vmoba_mask(query, key, partition, TopK(1), tile_size=4)
    block = vmoba_mask(
        partition.to_block_order(query),
        partition.to_block_order(key),
        partition,
        TopK(1),
        token_order="block",
        tile_size=4,
    )
    full_tiles = [int(mask.full_kv_num_blocks.sum()) for mask in (raster, block)]  # pyright: ignore
    assert full_tiles == [0, 16]
    problem = Problem(query, key, value, partition, TopK(1))
    torch.testing.assert_close(through_mask("raster")(problem), through_mask("block")(problem))
