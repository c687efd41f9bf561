"""Partitions that are causal in chunks of frames, and calls with the queries of some frames."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import oracle_numpy
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
    untraced_flex_attention,
)
from tests.strategies import Problem, causal_partitions, problems
from tests.test_tail import assert_equals_reference, tailed, upstream_of
from vmoba_flex import (
    BlockPartition,
    Selection,
    Tail,
    TopK,
    block_masses,
    reference,
    reference_gates,
    vmoba_attention,
    vmoba_mask,
    vmoba_selection,
)
from vmoba_flex.call import Call
from vmoba_flex.dispatch.choose import choose_dispatch
from vmoba_flex.dispatch.one_device import check_pieces
from vmoba_flex.inputs import check_query_key
from vmoba_flex.pieces import queries_of_frames

DISPATCHES = ("tiles", "packed", "shared", "dense")
few = settings(max_examples=30)


def numpy_ids(partition: BlockPartition) -> Any:
    return oracle_numpy.block_ids(partition.grid, partition.block, partition.causal_frames)


def seen_by(partition: BlockPartition) -> Any:
    assert partition.causal_frames is not None
    return oracle_numpy.visible(partition.grid, partition.block, partition.causal_frames)


# Partitions


@given(causal_partitions())
def test_block_ids_equal_both_oracles_and_nest_in_chunks(partition: BlockPartition):
    ids = partition.block_ids()
    assert torch.equal(ids, reference_gates.ids_of(partition))
    assert np.array_equal(ids, numpy_ids(partition))
    assert torch.equal(partition.block_sizes(), torch.bincount(ids, minlength=partition.num_blocks))
    chunks = ids.view(partition.grid[0], -1).split(partition.causal_frames or 0)
    for earlier, later in itertools.pairwise(chunks):
        assert earlier.max() < later.min()
    assert BlockPartition.of_flat(partition.flat) == partition


@given(causal_partitions())
def test_block_order_sorts_by_block(partition: BlockPartition):
    tokens = torch.arange(partition.num_tokens)
    order = partition.to_block_order(tokens, dim=0)
    video = slice(partition.prefix, partition.prefix + partition.num_video_tokens)
    assert torch.equal(order[video] - partition.prefix, partition.block_ids().argsort(stable=True))
    assert torch.equal(partition.to_raster_order(order, dim=0), tokens)


def test_a_longer_block_ends_with_its_chunk():
    partition = BlockPartition.spatial((7, 4, 4), (2, 2), causal_frames=3)
    assert partition.block == (3, 2, 2)
    assert partition.cells == (3, 2, 2)
    assert partition.up_to(3).num_blocks == 4
    kinds = (BlockPartition.temporal((7, 4, 4), 2, causal_frames=3), BlockPartition((7, 4, 4), (2, 4, 4)))
    assert [kind.block_sizes().tolist() for kind in kinds] == [[32, 16, 32, 16, 16], [32, 32, 32, 16]]


# Choices


@given(problems(exact=True, causal=True))
def test_selections_equal_both_oracles(problem: Problem):
    p, rule = problem.partition, problem.rule
    ids = numpy_ids(p)
    query, key = (x.numpy()[:, :, p.prefix : p.prefix + len(ids)] for x in (problem.query, problem.key))
    scores = oracle_numpy.gate(query, key, ids, p.num_blocks)
    fields = {name: getattr(rule, name) for name in ("pool", "always", "k", "density", "tau", "max_density")
              if hasattr(rule, name)}  # fmt: skip
    expected = oracle_numpy.select(scores, ids, seen=seen_by(p), **fields)
    chosen = vmoba_selection(problem.query, problem.key, p, rule)
    assert np.array_equal(chosen, expected)
    assert torch.equal(chosen, reference.vmoba(problem.query, problem.key, problem.value, p, rule)[1])


@few
@given(problems(dtype=torch.float64, causal=True), st.sampled_from([None, 4]))
def test_every_gate_chooses_among_what_may_be_chosen(problem: Problem, tile_size: int | None):
    """In float64 no rounding decides, so that choices equal the reference's."""
    p, cell = problem.partition, Tail().cell_of(problem.partition)
    inputs = problem.query, problem.key, problem.value
    expected, selection = reference.vmoba(*inputs, p, problem.rule, problem.scale, tile_size, gate_cell=cell)
    of_padding = dataclasses.replace(problem, text_lengths=None)
    path = "attention, tiles" if tile_size is None else "shared, tiles of 4"
    assert torch.equal(reference.attention_mask(selection, p), expected_mask(of_padding, TILE_SIZES.get(path)))
    torch.testing.assert_close(SPARSE_PATHS[path](of_padding), expected)


@few
@given(problems(causal=True))
def test_block_masses_are_those_of_causal_attention(problem: Problem):
    given = problem.query, problem.key, problem.partition
    masses = block_masses(*given, scale=problem.scale, text_lengths=problem.text_lengths)
    expected = reference_gates.block_masses(*given, problem.scale, problem.text_lengths)
    torch.testing.assert_close(masses.double(), expected, rtol=1e-5, atol=1e-6)


# Attention


@given(problems(causal=True), st.sampled_from(sorted(SPARSE_PATHS)))
def test_every_path_equals_dense_masked_attention(problem: Problem, path: str):
    mask, upstream = expected_mask(problem, TILE_SIZES.get(path)), upstream_of(problem)
    if path.startswith("mask"):  # FlexAttention has no gradients on a CPU, and padding has outputs of its own
        valid = (upstream != 0).any(-1, keepdim=True)
        tensors = (SPARSE_PATHS[path](problem), low_precision(problem, mask), exact(problem, mask))
        ours, low, truth = (torch.where(valid, x, 0) for x in tensors)
        assert_within_budget([ours], [low], [truth])
    else:
        assert_equals_dense_masked_attention(SPARSE_PATHS[path], problem, upstream, mask)


@given(causal_partitions(), st.data())
def test_masks_equal_the_numpy_oracle(partition: BlockPartition, data: st.DataObject):
    shape = (1, 2, partition.num_video_tokens, partition.num_blocks)
    chosen = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).bool()
    chosen &= torch.from_numpy(seen_by(partition))
    text = (partition.prefix, partition.suffix)
    expected = oracle_numpy.attention_mask(chosen.numpy(), numpy_ids(partition), *text, causal=True)
    assert np.array_equal(reference.attention_mask(chosen, partition), expected)


@given(tailed(causal=True), st.sampled_from(sorted(SPARSE_PATHS)))
def test_every_path_with_a_tail_equals_the_reference(problem: Problem, path: str):
    assert_equals_reference(problem, path, upstream_of(problem))


@few
@given(problems(causal=True))
def test_full_attention_is_causal(problem: Problem):
    upstream, mask = upstream_of(problem), full_mask(problem)
    assert_equals_dense_masked_attention(through_attention("dense"), problem, upstream, mask)
    everything = dataclasses.replace(problem, rule=TopK(problem.partition.num_blocks))
    output, lse = attend(everything, dispatch="dense", return_lse=True)
    _, other = attend(everything, dispatch="packed", return_lse=True)
    torch.testing.assert_close(output, through_attention("dense")(problem))
    torch.testing.assert_close(lse, other)


def changed_after(problem: Problem, frame: int, x: Tensor) -> Tensor:
    """``x`` with NaN for all tokens of the video from a frame on."""
    _, height, width = problem.partition.grid
    first = problem.partition.prefix
    x = x.clone()
    x[:, :, first + frame * height * width : first + problem.partition.num_video_tokens] = torch.nan
    return x


@given(tailed(causal=True), st.sampled_from(DISPATCHES), st.data())
def test_the_future_changes_nothing(problem: Problem, dispatch: str, data: st.DataObject):
    """Not a bit of any output before it, prefix and suffix included, and no gradient reaches it."""
    p = problem.partition
    assert p.causal_frames is not None
    frame = p.causal_frames * data.draw(st.integers(0, -(-p.grid[0] // p.causal_frames) - 1))
    if dispatch == "dense":
        problem = dataclasses.replace(problem, tail=None)
    problem = problem.with_leaves()
    output, lse = attend(problem, dispatch=dispatch, return_lse=True)
    inputs = problem.query, problem.key, problem.value
    other = dict(zip(("query", "key", "value"), (changed_after(problem, frame, x) for x in inputs), strict=True))
    unknown, unknown_lse = attend(dataclasses.replace(problem, **other), dispatch=dispatch, return_lse=True)
    past = ~changed_after(problem, frame, output).isnan()
    assert torch.equal(output[past], unknown[past])
    assert torch.equal(lse[past[..., 0]], unknown_lse[past[..., 0]])
    grads = torch.autograd.grad(output[past].sum(), inputs, allow_unused=True)
    for x, grad in zip(inputs, grads, strict=True):
        assert grad is None or not grad[changed_after(problem, frame, x).isnan()].any()


@few
@given(problems(causal=True), st.sampled_from(DISPATCHES))
def test_text_without_a_valid_token_is_finite(problem: Problem, dispatch: str):
    partition = dataclasses.replace(problem.partition, prefix=2, suffix=1)
    shape = (*problem.query.shape[:2], partition.num_tokens, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    lengths = torch.zeros(len(x), dtype=torch.int64)
    problem = Problem(x, x, x, partition, problem.rule, text_lengths=lengths).with_leaves()
    output = attend(problem, dispatch=dispatch)
    assert output.isfinite().all()
    for grad in torch.autograd.grad(output.sum(), (problem.query, problem.key, problem.value)):
        assert grad.isfinite().all()


# Queries of some frames


def of_frames(problem: Problem, frames: tuple[int, int], x: Tensor) -> Tensor:
    """The video tokens of some frames."""
    _, height, width = problem.partition.grid
    first = problem.partition.prefix
    return x[:, :, first + frames[0] * height * width : first + frames[1] * height * width]


@st.composite
def framed(draw: st.DrawFn) -> tuple[Problem, tuple[int, int]]:
    """A problem in float64, causal or not, with a tail or not, and some of its frames."""
    problem = draw(tailed(dtype=torch.float64, causal=draw(st.booleans())))
    if draw(st.booleans()):
        problem = dataclasses.replace(problem, tail=None)
    first = draw(st.integers(0, problem.partition.grid[0] - 1))
    return problem, (first, draw(st.integers(first + 1, problem.partition.grid[0])))


@given(framed(), st.sampled_from(DISPATCHES))
def test_queries_of_some_frames_equal_the_reference(case: tuple[Problem, tuple[int, int]], dispatch: str):
    problem, frames = case
    p = problem.partition
    problem = dataclasses.replace(problem, text_lengths=None, tail=None if dispatch == "dense" else problem.tail)
    tail, rule = problem.tail, TopK(p.num_blocks) if dispatch == "dense" else problem.rule
    problem = problem.with_leaves()
    query, key, value = of_frames(problem, frames, problem.query), problem.key, problem.value
    output = attend(dataclasses.replace(problem, query=query), dispatch=dispatch, query_frames=frames)
    expected, _ = reference.vmoba(
        query, key, value, p, rule, problem.scale, 128 if dispatch == "shared" else None,
        None if tail is None else tail.cell_of(p), Tail().cell_of(p), frames,
    )  # fmt: skip
    torch.testing.assert_close(output, expected)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = (torch.autograd.grad(x, (problem.query, key, value), upstream) for x in (output, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@given(framed(), st.sampled_from(("tiles", "packed", "dense")))
def test_queries_of_some_frames_are_rows_of_the_whole_call(case: tuple[Problem, tuple[int, int]], dispatch: str):
    problem, frames = case
    rule = dataclasses.replace(problem.rule, pool="query")
    problem = dataclasses.replace(problem, rule=rule, tail=None if dispatch == "dense" else problem.tail)
    whole, lse = attend(problem, dispatch=dispatch, return_lse=True)
    part = dataclasses.replace(problem, query=of_frames(problem, frames, problem.query))
    output, sums, stats = attend(part, dispatch=dispatch, query_frames=frames, return_lse=True, return_stats=True)
    torch.testing.assert_close(output, of_frames(problem, frames, whole))
    torch.testing.assert_close(sums, of_frames(problem, frames, lse[..., None])[..., 0])
    if dispatch != "dense":
        kept = vmoba_selection(problem.query, problem.key, problem.partition, rule, as_bits=True)
        torch.testing.assert_close(attend(part, dispatch=dispatch, selection=kept, query_frames=frames), output)
        tokens = kept.bits.shape[-1] // problem.partition.grid[0]
        assert torch.equal(stats.pairs, kept.selected()[:, :, frames[0] * tokens : frames[1] * tokens].sum((2, 3)))


@few
@given(problems(dtype=torch.float64, causal=True))
def test_chunk_by_chunk_equals_the_causal_call(problem: Problem):
    """Each chunk with the keys so far, in a partition of the frames so far: what a generator does."""
    p = dataclasses.replace(problem.partition, prefix=0, suffix=0)
    chunk, (frames, height, width) = p.causal_frames, p.grid
    assert chunk is not None
    query, key, value = (x[:, :, : p.num_tokens] for x in (problem.query, problem.key, problem.value))
    options: Any = {"enable_gqa": problem.gqa, "tail": Tail(2)}
    outputs = []
    for first in range(0, frames, chunk):
        end = min(first + chunk, frames)
        so_far = [x[:, :, : end * height * width] for x in (query, key, value)]
        new, past = so_far[0][:, :, first * height * width :], p.up_to(end)
        outputs.append(vmoba_attention(new, *so_far[1:], past, problem.rule, query_frames=(first, end), **options))
    torch.testing.assert_close(torch.cat(outputs, 2), vmoba_attention(query, key, value, p, problem.rule, **options))


# What belongs to a call


@few
@given(problems(causal=True), st.sampled_from(DISPATCHES))
def test_stats_are_shares_of_what_may_be_chosen(problem: Problem, dispatch: str):
    p = problem.partition
    allowed = int(seen_by(p).sum())
    _, stats = attend(problem, dispatch=dispatch, return_stats=True)
    torch.testing.assert_close(stats.density, (stats.pairs.double() / allowed).float())
    assert ((stats.tile_density > 0) & (stats.tile_density <= 1)).all()
    if dispatch == "dense":
        assert (stats.pairs == allowed).all()
        return
    choice = "tile" if dispatch == "shared" else "token"
    chosen = vmoba_selection(problem.query, problem.key, p, problem.rule, choice=choice)
    assert torch.equal(stats.pairs, chosen.sum((2, 3)))


@few
@given(tailed(causal=True), st.sampled_from(("tiles", "packed")))
def test_a_kept_choice_attends_the_same(problem: Problem, dispatch: str):
    kept = vmoba_selection(problem.query, problem.key, problem.partition, problem.rule, as_bits=True)
    expected, stats = attend(problem, dispatch=dispatch, return_stats=True)
    torch.testing.assert_close(attend(problem, dispatch=dispatch, selection=kept), expected)
    assert torch.equal(kept.density(), stats.density)


@pytest.mark.parametrize(
    ("backend", "dispatch", "options"),
    [
        ("inductor", "tiles", {"query_frames": (3, 5)}),
        ("aot_eager", "packed", {"tail": Tail((1, 2, 2))}),
        ("aot_eager", "dense", {}),
        ("aot_eager", "shared", {"query_frames": (3, 5)}),
    ],
)
def test_a_compiled_call_equals_the_eager_one(backend: str, dispatch: Any, options: dict[str, Any]):
    partition = BlockPartition((5, 4, 4), (2, 2, 4), prefix=3, causal_frames=3)
    query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    if options.get("query_frames"):
        query = query[:, :, 3 + 48 :]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return vmoba_attention(query, key, value, partition, TopK(3), dispatch=dispatch, **options)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(query, key, value), run(query, key, value), rtol=1e-5, atol=1e-5)


PARTITION = BlockPartition((6, 2, 2), (2, 2, 2), causal_frames=3)


def call(frames: Any = None, tokens: int = 24, **options: Any) -> Any:
    """A call of one partition, with or without a rule."""
    query, key = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, PARTITION.num_tokens, 8)
    rule = None if "selection" in options else TopK(2)
    return vmoba_attention(query, key, key, PARTITION, rule, query_frames=frames, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"frames": (4, 7)}, ValueError, r"query_frames must be \(first, end\) with 0 <= first < end <= 6 .*\(4, 7\)"),
        ({"frames": (3, 3)}, ValueError, r"query_frames must be .*got \(3, 3\)"),
        ({"frames": (4, 2)}, ValueError, r"query_frames must be .*got \(4, 2\)"),
        ({"frames": (-1, 2)}, ValueError, r"query_frames must be .*got \(-1, 2\)"),
        ({"frames": 3}, TypeError, "query_frames must be two ints .* got 3"),
        ({"frames": (0, 1, 2)}, TypeError, "query_frames must be two ints"),
        ({"frames": (0.0, 3)}, TypeError, "query_frames must be two ints"),
        ({"frames": (0, True)}, TypeError, "query_frames must be two ints"),
        ({"frames": (3, 6)}, ValueError, "query must have the 12 tokens of query_frames, .* got 24"),
        ({"tokens": 12}, ValueError, "query must have grid .* = 24 tokens in dim -2, got 12"),
        ({"group": object()}, ValueError, "partition must have no causal_frames with a group, got 3"),
        ({"frames": (3, 6), "group": object()}, ValueError, r"query_frames must be None with a group, got \(3, 6\)"),
    ],
)
def test_bad_frames(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_chunks(value: Any, error: type[Exception]):
    with pytest.raises(error, match=f"causal_frames must be .*got {value}"):
        BlockPartition((6, 2, 2), (2, 2, 2), causal_frames=value)
    with pytest.raises(error, match=f"frames must be .*got {value}"):
        PARTITION.up_to(value)


def test_what_gpus_do_not_take():
    even, whole = (dataclasses.replace(PARTITION, causal_frames=chunk) for chunk in (2, None))
    with FakeTensorMode():
        x = torch.empty(1, 2, 24, 8, device="cuda")
        assert check_query_key(x, x, even, TopK(3)) == even
        with pytest.raises(ValueError, match=r"block must divide causal_frames = 3 along frames on a GPU.*\(2, 2, 2\)"):
            check_query_key(x, x, PARTITION, TopK(3))
    for where, call in (
        ("a partition's causal_frames", Call(even, TopK(3))),
        ("query_frames", Call(whole, TopK(3), queries=queries_of_frames((1, 2), whole))),
    ):
        check_pieces(call, "packed", True)
        with pytest.raises(ValueError, match=f"dispatch must not be 'shared' with {where} on a GPU"):
            check_pieces(call, "shared", True)


def test_auto_counts_the_queries_that_there_are():
    partition = BlockPartition((48, 16, 144), (1, 16, 144))
    with FakeTensorMode():
        few, all_of_them = (
            torch.empty(1, 12, frames * 16 * 144, 128, dtype=torch.bfloat16, device="cuda") for frames in (1, 48)
        )
        picked = [choose_dispatch(x, all_of_them, all_of_them, partition, TopK(9))[0] for x in (few, all_of_them)]
    assert picked == ["dense", "packed"]


@pytest.mark.parametrize("dispatch", ["tiles", "packed"])
def test_a_choice_of_ones_own_attends_no_later_chunk(dispatch: Any):
    query, key, value = torch.randn(3, 1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    kept = Selection.of(torch.ones(1, 2, 24, PARTITION.num_blocks, dtype=torch.bool), PARTITION)
    output = vmoba_attention(query, key, value, PARTITION, None, selection=kept, dispatch=dispatch)
    dense = vmoba_attention(query, key, value, PARTITION, TopK(1), dispatch="dense")
    torch.testing.assert_close(output, dense)
    mask = vmoba_mask(query, key, PARTITION, None, selection=kept)
    torch.testing.assert_close(untraced_flex_attention(query, key, value, block_mask=mask), dense)
    with pytest.raises(ValueError, match="selected must hold at least one block for each query"):
        Selection.of(kept.selected().roll(2, -1) & ~kept.selected(), PARTITION)


def test_more_blocks_than_may_be_chosen_are_all_of_them():
    query, key, value = torch.randn(3, 1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"k must lie in 1..num_blocks = 1..3, got 5"):
        vmoba_attention(query, key, value, dataclasses.replace(PARTITION, causal_frames=None), TopK(5))
    output = vmoba_attention(query, key, value, PARTITION, TopK(5, always=(9,)))
    torch.testing.assert_close(output, vmoba_attention(query, key, value, PARTITION, TopK(1), dispatch="dense"))


def test_the_bound_of_a_kept_choice_is_of_all_pairs():
    x = torch.randn(1, 1, 24, 8, generator=torch.Generator().manual_seed(0))
    kept = vmoba_selection(x, x, PARTITION, TopK(2), as_bits=True)
    assert kept.selected().float().mean() == kept.bounds.density == 0.5
    assert kept.density().item() == pytest.approx(2 / 3)  # of what may be chosen
    assert "at most 0.5 of all pairs" in repr(kept)


def test_bad_selections():
    with pytest.raises(ValueError, match=r"frames must lie in 1..grid\[0\] = 1..6, got 7"):
        PARTITION.up_to(7)
    x = torch.randn(1, 2, 24, 8)
    tiles = vmoba_selection(x, x, PARTITION, TopK(2), choice="tile", as_bits=True)
    with pytest.raises(ValueError, match="selection must have choice='token' with a partition's causal_frames"):
        call(selection=tiles, dispatch="shared")
    with pytest.raises(ValueError, match="partition must have no causal_frames for a plan"):
        vmoba_selection(x, x, PARTITION, TopK(2), as_bits=True).planned(x)
    other = Selection.of(torch.ones(1, 2, 24, 3, dtype=torch.bool), BlockPartition((6, 2, 2), (2, 2, 2)))
    with pytest.raises(ValueError, match="selection must be of the call's partition"):
        call(selection=other)
