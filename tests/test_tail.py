"""The tail: skipped blocks take part by the means of their cells, on every path, forward and backward."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests import oracle_numpy
from tests.paths import (
    SPARSE_PATHS,
    TILE_SIZES,
    assert_within_budget,
    attend,
    largest_logit,
    outputs_and_gradients,
    shared_selection,
)
from tests.strategies import Problem, problems
from vmoba_flex import (
    BlockPartition,
    Tail,
    Threshold,
    TopK,
    VMoBAAttention,
    VMoBAConfig,
    reference,
    vmoba_attention,
    vmoba_inputs,
    vmoba_selection,
)
from vmoba_flex.cells import cell_groups, cell_means, plain_means, plain_spread
from vmoba_flex.tail import Cells

PATHS = pytest.mark.parametrize("path", SPARSE_PATHS)


@st.composite
def tailed(draw: st.DrawFn, **options: Any) -> Problem:
    """A problem with cells of any shape that fits its blocks, or of about so many tokens."""
    problem = draw(problems(**options))
    cell = st.tuples(*(st.integers(1, side) for side in problem.partition.block))
    return dataclasses.replace(problem, tail=Tail(draw(cell | st.integers(1, 9))))


def selection_of(problem: Problem, path: str) -> Tensor:
    """What each video query chose on a path."""
    if path in TILE_SIZES:
        return shared_selection(problem, TILE_SIZES[path])
    return vmoba_selection(problem.query, problem.key, problem.partition, problem.rule)


def with_cells(problem: Problem, selection: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key and value with their cells, mask and bias, by the reference."""
    assert problem.tail is not None
    cell = problem.tail.cell_of(problem.partition)
    mask = reference.attention_mask(selection, problem.partition, problem.text_lengths)
    return reference.with_cells(problem.key, problem.value, selection, mask, problem.partition, cell)


def exactly(problem: Problem, selection: Tensor) -> Tensor:
    """The reference's output, in float64."""
    key, value, mask, bias = with_cells(problem, selection)
    return reference.attention(problem.query, key, value, mask, problem.scale, bias)[0]


def roughly(problem: Problem, selection: Tensor) -> Tensor:
    """The same in the inputs' own dtype, with means rounded to it: its error is the budget of all paths."""
    key, value, mask, bias = with_cells(problem, selection)
    key, value = key.to(problem.query.dtype), value.to(problem.query.dtype)
    added = torch.where(mask, bias, -torch.inf).to(problem.query.dtype)
    return F.scaled_dot_product_attention(
        problem.query, key, value, attn_mask=added, scale=problem.scale, enable_gqa=problem.gqa
    )


def results(path: str, problem: Problem, upstream: Tensor) -> list[Tensor]:
    """Output and gradients; FlexAttention has none on a CPU."""
    if path.startswith("mask") and not problem.query.is_cuda:
        return [SPARSE_PATHS[path](problem)]
    return outputs_and_gradients(SPARSE_PATHS[path], problem, upstream)


def assert_equals_reference(problem: Problem, path: str, upstream: Tensor) -> None:
    selection = selection_of(problem, path)
    actual = results(path, problem, upstream)
    if len(actual) == 1:
        low, exact = [roughly(problem, selection)], [exactly(problem, selection)]
    else:
        low = outputs_and_gradients(lambda p: roughly(p, selection), problem, upstream)
        exact = outputs_and_gradients(lambda p: exactly(p, selection), problem.to(torch.float64), upstream)
    # Padding has outputs of its own.
    valid = (upstream != 0).any(-1, keepdim=True)
    actual[0], low[0], exact[0] = (torch.where(valid, x[0], 0) for x in (actual, low, exact))
    assert_within_budget(actual, low, exact, logit=largest_logit(problem))


def upstream_of(problem: Problem) -> Tensor:
    shape = (*problem.query.shape[:3], problem.value.shape[3])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if problem.text_lengths is not None:  # padding has outputs that mean nothing
        partition = problem.partition
        text = [*range(partition.prefix), *range(partition.num_tokens - partition.suffix, partition.num_tokens)]
        for sample, length in enumerate(problem.text_lengths.tolist()):
            grad[sample, :, text[length:]] = 0
    return grad


@PATHS
@given(problem=tailed(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_the_reference_with_gradients(path: str, problem: Problem, dtype: torch.dtype):
    problem = problem.to(dtype)
    assert_equals_reference(problem, path, upstream_of(problem))


@pytest.mark.parametrize("causal", [False, True])
@given(data=st.data())
def test_the_reference_equals_the_numpy_oracle(causal: bool, data: st.DataObject):
    problem = data.draw(tailed(causal=causal))
    whole = problem.partition
    partition = BlockPartition(whole.grid, whole.block, causal_frames=whole.causal_frames)
    video = slice(problem.partition.prefix, problem.partition.prefix + partition.num_video_tokens)
    heads = problem.query.shape[1]
    key, value = (x[:, :, video].repeat_interleave(heads // x.shape[1], 1) for x in (problem.key, problem.value))
    query = problem.query[:, :, video]
    changed: Any = {"query": query, "key": key, "value": value, "partition": partition, "text_lengths": None}
    problem = dataclasses.replace(problem, **changed, scale=0.7)
    assert problem.tail is not None
    selection = vmoba_selection(problem.query, key, partition, problem.rule)
    arrays = [x.double().numpy() for x in (problem.query, key, value)]
    cell = problem.tail.cell_of(partition)
    shapes = (partition.grid, partition.block, cell, 0.7, partition.causal_frames)
    expected = oracle_numpy.tail_attention(*arrays, selection.numpy(), *shapes)
    torch.testing.assert_close(exactly(problem, selection), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def full_attention(problem: Problem) -> Tensor:
    partition = problem.partition
    shape = (*problem.query.shape[:2], partition.num_video_tokens, partition.num_blocks)
    mask = reference.attention_mask(torch.ones(shape, dtype=torch.bool), partition, problem.text_lengths)
    return reference.attention(problem.query, problem.key, problem.value, mask, problem.scale)[0]


@PATHS
@given(problem=problems())
def test_cells_of_one_token_give_full_attention(path: str, problem: Problem):
    problem = dataclasses.replace(problem, tail=Tail((1, 1, 1)))
    actual, expected = SPARSE_PATHS[path](problem), full_attention(problem)
    valid = upstream_of(problem) != 0
    torch.testing.assert_close(actual.double()[valid], expected[valid], rtol=1e-4, atol=1e-4)


@PATHS
@given(problem=tailed())
def test_constant_cells_give_full_attention(path: str, problem: Problem):
    assert problem.tail is not None
    partition, cell = problem.partition, problem.tail.cell_of(problem.partition)
    video = slice(partition.prefix, partition.prefix + partition.num_video_tokens)
    first: dict[tuple[int, ...], int] = {}
    source = []
    for token, place in enumerate(itertools.product(*map(range, partition.grid))):
        blocks = [p // side for p, side in zip(place, partition.block, strict=True)]
        corner = [p % side // part for p, side, part in zip(place, partition.block, cell, strict=True)]
        source.append(first.setdefault((*blocks, *corner), token))
    key, value = problem.key.clone(), problem.value.clone()
    for x in (key, value):
        x[:, :, video] = x[:, :, video][:, :, source]
    problem = dataclasses.replace(problem, key=key, value=value)
    actual, expected = SPARSE_PATHS[path](problem), full_attention(problem)
    valid = upstream_of(problem) != 0
    torch.testing.assert_close(actual.double()[valid], expected[valid], rtol=1e-4, atol=1e-4)


@PATHS
@given(problem=tailed())
def test_everything_chosen_is_the_path_without_a_tail_bit_for_bit(path: str, problem: Problem):
    everything = dataclasses.replace(problem, rule=TopK(density=1.0))
    plain = dataclasses.replace(everything, tail=None)
    pairs = (results(path, x, upstream_of(problem)) for x in (everything, plain))
    for x, y in zip(*pairs, strict=True):
        if path.startswith("mask"):  # more keys, hence other sums
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(x, y)


@PATHS
@given(problem=tailed())
def test_the_own_block_only(path: str, problem: Problem):
    assert_equals_reference(dataclasses.replace(problem, rule=TopK(1)), path, upstream_of(problem))


@PATHS
def test_tokens_of_a_cell_can_change_places(path: str):
    """What is skipped is seen by its mean only: swapping two tokens of a cell swaps their gradients."""
    generator = torch.Generator().manual_seed(3)
    partition = BlockPartition.temporal((4, 2, 4), 1)
    query, key, value = (torch.randn(1, 1, 32, 8, generator=generator) for _ in range(3))
    query[:, :, 8:] = query[:, :, 8:9]  # block 0 is nobody's choice but its own
    problem = Problem(query, key, value, partition, TopK(1), tail=Tail((1, 2, 2)))
    upstream = torch.randn(1, 1, 32, 8, generator=generator)
    upstream[:, :, :8] = 0  # the queries of block 0, which see it token by token
    order = torch.arange(32)
    order[[0, 5]] = torch.tensor([5, 0])  # (0, 0, 0) and (0, 1, 1) share a cell
    swapped = dataclasses.replace(problem, key=key[:, :, order], value=value[:, :, order])
    one, other = (results(path, x, upstream) for x in (problem, swapped))
    for x, y in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(x[:, :, 8:], y[:, :, 8:])
    for x, y in zip(one[2:], other[2:], strict=True):
        torch.testing.assert_close(x[:, :, order], y)


@PATHS
@given(problem=tailed(), bad=st.sampled_from([torch.nan, torch.inf]))
def test_what_is_not_finite_stays_in_its_sample_and_head(path: str, problem: Problem, bad: float):
    rule = TopK(1)  # within a query: no pool carries it elsewhere
    two = dataclasses.replace(
        problem,
        query=torch.cat([problem.query] * 2), key=torch.cat([problem.key] * 2), value=torch.cat([problem.value] * 2),
        rule=rule, text_lengths=None if problem.text_lengths is None else torch.cat([problem.text_lengths] * 2),
    )  # fmt: skip
    value = two.value.clone()
    value[0, 0, problem.partition.prefix] = bad
    actual = SPARSE_PATHS[path](dataclasses.replace(two, value=value))
    clean = SPARSE_PATHS[path](two)
    batch, repeats = len(problem.query), problem.query.shape[1] // problem.value.shape[1]
    assert torch.equal(actual[batch:], clean[batch:])
    assert torch.equal(actual[:, repeats:], clean[:, repeats:])


@PATHS
def test_gradients_of_a_query_with_one_key(path: str):
    """Nearly all weight is on one key, so that gradients are differences that cancel: 6 times the budget was seen."""
    partition = BlockPartition((3, 5, 2), (2, 3, 1), prefix=1, suffix=4)
    generator = torch.Generator().manual_seed(347)
    query, key, value = (torch.randn((1, 1, partition.num_tokens, 8), generator=generator) for _ in range(3))
    problem = Problem(query, key, value, partition, TopK(1), scale=1.0, tail=Tail(2))
    assert_equals_reference(problem, path, upstream_of(problem))


@PATHS
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_large_logits_do_not_overflow(path: str, shift: float):
    generator = torch.Generator().manual_seed(0)
    partition = BlockPartition.temporal((6, 4, 8), 2)
    query, key, value = (torch.randn(1, 1, 192, 8, generator=generator) for _ in range(3))
    query, key = query + 10, key + shift / 20
    problem = Problem(query, key, value, partition, TopK(1), tail=Tail((2, 4, 8)))  # cells of 64 tokens
    assert_equals_reference(problem, path, upstream_of(problem))


@given(problem=problems(), cell=st.tuples(*[st.integers(1, 3)] * 3))
def test_cells_are_those_of_the_reference(problem: Problem, cell: tuple[int, int, int]):
    partition = problem.partition
    cells = Cells(partition, tuple(min(c, b) for c, b in zip(cell, partition.block, strict=True)))  # pyright: ignore[reportArgumentType]
    nobody = torch.zeros(*problem.query.shape[:2], partition.num_video_tokens, partition.num_blocks, dtype=torch.bool)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool).expand(*problem.query.shape[:3], partition.num_tokens)
    key, *_, bias = reference.with_cells(problem.key, problem.value, nobody, mask, partition, cells.cell)
    means, (logs, group) = cell_means(problem.key, cells), cell_groups(cells, problem.key)
    assert means.shape[2] == len(logs) == len(group) == cells.total

    def in_order(x: Tensor) -> Tensor:
        return x[:, x.sum((0, 2)).argsort()]

    expected = torch.cat([key[0, :1, partition.num_tokens :], bias[None, partition.num_tokens :, None]], -1)
    actual = torch.cat([means[0, :1].double(), logs[None, :, None].double()], -1)
    torch.testing.assert_close(in_order(actual), in_order(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(group.bincount(minlength=partition.num_blocks) > 0, torch.ones(partition.num_blocks) > 0)


def test_about_so_many_tokens_a_cell():
    assert Tail().cell_of(BlockPartition.spatiotemporal((24, 36, 64), (8, 12, 8))) == (4, 4, 4)
    assert Tail(36).cell_of(BlockPartition.spatiotemporal((8, 18, 32), (4, 6, 16))) == (4, 2, 4)
    assert Tail(10**6).cell_of(BlockPartition.temporal((4, 2, 2), 2)) == (2, 2, 2)
    assert Tail(1).cell_of(BlockPartition.temporal((4, 2, 2), 2)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (0, ValueError, "cell must be at least 1, got 0"),
        ((1, 0, 1), ValueError, "cell must be at least 1 everywhere"),
        ((1, 2), ValueError, "cell must have 3 sizes"),
        (1.5, TypeError, "cell must be an int or a tuple of 3 ints, got 1.5"),
        ((1, 2.0, 1), TypeError, "cell must hold ints"),
        (True, TypeError, "cell must be an int or a tuple of 3 ints, got True"),
        (None, TypeError, "cell must be an int or a tuple of 3 ints, got None"),
    ],
)
def test_bad_cells(cell: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Tail(cell)


def small(**options: Any) -> Problem:
    partition = BlockPartition.temporal((4, 2, 2), 2)
    query, key, value = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    return Problem(query, key, value, partition, TopK(1), **options)


def test_bad_tails_of_a_call():
    with pytest.raises(ValueError, match=r"cell must not be larger than block \(2, 2, 2\), got \(3, 1, 1\)"):
        attend(small(tail=Tail((3, 1, 1))), dispatch="packed")
    with pytest.raises(ValueError, match="tail must be None for dispatch='dense'"):
        attend(small(tail=Tail(2)), dispatch="dense")
    with pytest.raises(TypeError, match="tail must be a Tail or None, got 4"):
        attend(small(tail=4), dispatch="packed")  # pyright: ignore[reportArgumentType]
    problem = small()
    tensors = problem.query, problem.key, problem.value
    with pytest.raises(TypeError, match="tail must be a Tail or None, got None"):
        vmoba_inputs(*tensors, problem.partition, problem.rule, tail=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared"])
@pytest.mark.parametrize("grad", [False, True])
def test_fullgraph_without_recompiling(dispatch: str, grad: bool):
    problem = small(tail=Tail(2))
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(dataclasses.replace(problem, query=query, key=key, value=value), dispatch=dispatch)

    for seed in range(3):
        tensors = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(seed)).unbind()
        leaves = [x.clone().requires_grad_(grad) for x in tensors]
        names = dict(zip(("query", "key", "value"), leaves, strict=True))
        expected = attend(dataclasses.replace(problem, **names), dispatch=dispatch)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            actual = run(*leaves)
        torch.testing.assert_close(actual, expected)
        if grad:
            for x, y in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (actual, expected)), strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared"])
def test_autocast_rounds_nothing_but_the_inputs(dispatch: str):
    problem = small(tail=Tail(2)).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attend(problem, dispatch=dispatch)
    assert torch.equal(actual, attend(problem, dispatch=dispatch))


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared"])
def test_checkpointing(dispatch: str):
    problem = small(tail=Tail(2), scale=0.5).with_leaves()
    leaves = problem.query, problem.key, problem.value

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(dataclasses.replace(problem, query=query, key=key, value=value), dispatch=dispatch)

    kept = checkpoint(run, *leaves, use_reentrant=False)
    for x, y in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (kept, run(*leaves))), strict=True):
        assert torch.equal(x, y)


def test_stats_are_those_of_the_choice():
    problem = small(tail=Tail(2))
    _, stats = attend(dataclasses.replace(problem, rule=Threshold(0.5)), dispatch="packed", return_stats=True)
    _, plain = attend(
        dataclasses.replace(problem, rule=Threshold(0.5), tail=None), dispatch="packed", return_stats=True
    )
    assert all(torch.equal(x, y) for x, y in zip(stats, plain, strict=True))


def test_a_module_takes_its_configs_tail():
    config = VMoBAConfig(2, (2, 2), (2, 2, 2), TopK(1), dispatch="packed", tail=Tail(2))
    query, key, value = torch.randn(3, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        module = VMoBAAttention(config, layer, 3)
        partition = config.partition(config.layer(layer, 3).kind, (4, 4, 4))
        expected = vmoba_attention(query, key, value, partition, TopK(1), dispatch="packed", tail=Tail(2))
        assert torch.equal(module(query, key, value, (4, 4, 4)), expected)
        full = F.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(module(query, key, value, (4, 4, 4), dense=True), full)


def test_a_config_keeps_its_tail():
    for tail in (None, Tail(), Tail((1, 2, 3))):
        config = VMoBAConfig(2, (2, 2), (2, 2, 3), TopK(1), tail=tail)
        assert VMoBAConfig.from_json(config.to_json()) == config
    with pytest.raises(TypeError, match="tail must be a Tail or None, or BySteps of these, got 64"):
        VMoBAConfig(2, (2, 2), (2, 2, 2), TopK(1), tail=64)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tail must be None for dispatch='dense'"):
        VMoBAConfig(2, (2, 2), (2, 2, 2), TopK(1), dispatch="dense", tail=Tail())


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared", "dense"])
def test_the_log_sum_exp(dispatch: str):
    partition = BlockPartition.spatial((2, 3, 4), (2, 2), suffix=3)
    query, key, value = torch.randn(3, 2, 2, partition.num_tokens, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([3, 1])
    problem = Problem(query, key, value, partition, TopK(2), 0.5, lengths, Tail(2) if dispatch != "dense" else None)
    output, lse, stats = attend(problem, dispatch=dispatch, return_lse=True, return_stats=True)
    assert stats.density.shape == (2, 2)
    if dispatch == "dense":
        full = torch.ones(2, 2, partition.num_video_tokens, partition.num_blocks, dtype=torch.bool)
        mask = reference.attention_mask(full, partition, lengths)
        expected = reference.attention(query, key, value, mask, 0.5)
    else:
        path = "attention, shared" if dispatch == "shared" else "attention"
        keys, values, mask, bias = with_cells(problem, selection_of(problem, path))
        expected = reference.attention(query, keys, values, mask, 0.5, bias)
    valid = torch.ones(2, partition.num_tokens, dtype=torch.bool)
    valid[1, -2:] = False
    for actual, target in zip((output, lse[..., None]), (expected[0], expected[1][..., None]), strict=True):
        pairs = (x.transpose(1, 2)[valid].double() for x in (actual, target))
        torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["auto", "packed", "shared", "tiles"])
def test_cells_too_small_for_the_kernels_are_refused_at_the_door(dispatch: Any):
    partition = BlockPartition.spatial((1, 1024, 1024), (128, 128))
    with FakeTensorMode():
        query = torch.empty(1, 1, partition.num_tokens, 8, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"tail must keep rows .* got 1048576 \* 8192: let each coarse key stand"):
            vmoba_attention(query, query, query, partition, TopK(1), dispatch=dispatch, tail=Tail((1, 1, 2)))


def test_plain_means_read_nothing_from_the_device():
    cells = Cells(BlockPartition((3, 4, 5), (2, 2, 3), prefix=1), (2, 1, 2))
    with FakeTensorMode():  # which has no values to read
        means = plain_means(torch.empty(1, 1, 61, 8, dtype=torch.float64), cells)
        assert means.shape[2] == cells.total
        assert plain_spread(means, cells).shape[2] == 61
