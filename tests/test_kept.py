"""A selection that is kept as bits: a later call with it is the call that would have chosen it, bit for bit."""

import copy
import dataclasses
import functools
import math
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from block_masks.attention import grouped
from block_masks.plans.rows import plan_rows
from tests.strategies import Problem, partitions, problems
from vmoba_flex import (
    BlockPartition,
    Selection,
    Tail,
    Threshold,
    TopK,
    VMoBAAttention,
    VMoBAConfig,
    vmoba_attention,
    vmoba_inputs,
    vmoba_mask,
    vmoba_selection,
)
from vmoba_flex.call import Call
from vmoba_flex.dispatch import shared
from vmoba_flex.user_error import UserError

# Dispatch, and what chooses in it.
WAYS = [("packed", "token"), ("tiles", "token"), ("auto", "token"), ("shared", "tile")]
PARTITION = BlockPartition((4, 6, 7), (2, 3, 4), prefix=3, suffix=5)
TAILS = [None, Tail((1, 1, 1)), Tail(6)]


def problem(rule: Any = None, **changes: Any) -> Problem:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, PARTITION.num_tokens, 8, generator=generator)
    return dataclasses.replace(Problem(query, key[:, :2], value[:, :2], PARTITION, rule or TopK(3)), **changes)


def kept(problem: Problem, choice: Any = "token") -> Selection:
    given = (problem.query, problem.key, problem.partition, problem.rule)
    return vmoba_selection(*given, choice=choice, text_lengths=problem.text_lengths, as_bits=True)


def call(problem: Problem, selection: Selection | None = None, **options: Any) -> Any:
    given: Any = {"scale": problem.scale, "enable_gqa": problem.gqa, "text_lengths": problem.text_lengths}
    rule = problem.rule if selection is None else None
    tensors = (problem.query, problem.key, problem.value)
    return vmoba_attention(
        *tensors, problem.partition, rule, tail=problem.tail, selection=selection, **given, **options
    )


def with_gradients(problem: Problem, selection: Selection | None = None, **options: Any) -> list[Tensor]:
    problem = problem.with_leaves()
    output, lse, stats = call(problem, selection, return_stats=True, return_lse=True, **options)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    grads = torch.autograd.grad(output, (problem.query, problem.key, problem.value), upstream)
    return [output.detach(), lse, *stats[:3], *grads]


@given(problems(), st.sampled_from(WAYS), st.sampled_from(TAILS[:2]), st.booleans())
@example(problem(text_lengths=torch.tensor([0, 7])), ("packed", "token"), Tail(6), False)
@example(problem(text_lengths=torch.tensor([0, 7])), ("packed", "token"), None, True)
@example(problem(Threshold(0.6, pool="global")), ("shared", "tile"), Tail(6), False)
@example(problem(Threshold(0.2, pool="query", max_density=0.2)), ("packed", "token"), Tail(6), True)
@settings(max_examples=25)
def test_a_call_with_a_selection_is_the_call_that_made_it(
    problem: Problem, way: tuple[str, str], tail: Tail | None, planned: bool
):
    dispatch, choice = way
    problem = dataclasses.replace(problem, tail=tail)
    selection = kept(problem, choice)
    if planned:
        selection = selection.planned(problem.query)
    expected = with_gradients(problem, dispatch=dispatch)
    for x, y in zip(with_gradients(problem, selection, dispatch=dispatch), expected, strict=True):
        assert torch.equal(x, y)
    if choice == "tile":  # which auto takes for no other reason
        assert torch.equal(call(problem, selection), expected[0])


@given(problems(), st.sampled_from(["token", "tile"]), st.sampled_from(["raster", "block"]))
@settings(max_examples=15)
def test_masks_with_a_selection_are_the_masks_that_chose_it(problem: Problem, choice: Any, order: Any):
    selection, partition = kept(problem, choice), problem.partition
    tensors = [problem.query, problem.key, problem.value]
    if order == "block":
        tensors = [partition.to_block_order(x) for x in tensors]
    options: Any = {"token_order": order, "choice": choice, "tile_size": 16, "text_lengths": problem.text_lengths}
    index = torch.meshgrid(*map(torch.arange, (*problem.query.shape[:2], *[partition.num_tokens] * 2)), indexing="ij")
    masks = [
        (
            vmoba_mask(*tensors[:2], partition, rule, selection=one, **options),
            vmoba_inputs(*tensors, partition, rule, selection=one, tail=Tail((1, 1, 1)), **options).block_mask,
        )
        for rule, one in ((problem.rule, None), (None, selection))
    ]
    for x, y in zip(*masks, strict=True):
        assert torch.equal(x.mask_mod(*index), y.mask_mod(*index))
        for tensor, other in zip(x.as_tuple(), y.as_tuple(), strict=True):
            assert not isinstance(tensor, Tensor) or torch.equal(tensor, other)


@given(st.data(), partitions(), st.sampled_from(["token", "tile"]))
def test_bits_come_back(data: st.DataObject, partition: BlockPartition, choice: Any):
    sizes = partition.block_sizes().tolist()
    rows = partition.num_video_tokens if choice == "token" else sum(-(-size // 128) for size in sizes)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    selected = torch.rand(2, 3, rows, partition.num_blocks, generator=generator) < data.draw(st.floats(0, 1))
    selected[..., 0] = True
    selection = Selection.of(selected, partition, choice)
    assert selection.bits.shape == (2, 3, -(-partition.num_blocks // 8), rows)
    assert selection.bits.is_contiguous()
    assert selection.nbytes == selection.bits.numel()
    values = selection.bits.mT.to(torch.int64) @ (256 ** torch.arange(selection.bits.shape[2]))
    assert torch.equal(values, (selected * 2 ** torch.arange(partition.num_blocks)).sum(-1))
    of_tokens = selection.selected()
    if choice == "token":
        assert torch.equal(of_tokens, selected)
        assert selection.bounds.density == pytest.approx(selected.float().mean().item())
    torch.testing.assert_close(selection.density(), of_tokens.float().mean((2, 3)))


@pytest.mark.parametrize("choice", ["token", "tile"])
def test_copies_are_the_same(choice: Any, tmp_path: Path):
    one = problem(Threshold(0.3))
    selection = dataclasses.replace(kept(one, choice), recall=torch.rand(2, 4))
    selection.save(tmp_path / "kept.pt")
    selection = selection.planned(one.query)
    assert selection.plan is not None
    copies = [
        copy.deepcopy(selection),
        pickle.loads(pickle.dumps(selection)),
        Selection.load(tmp_path / "kept.pt"),
        selection.to("cpu"),
    ]
    for other in copies:
        for field in dataclasses.fields(Selection):
            x, y = getattr(other, field.name), getattr(dataclasses.replace(selection, plan=None), field.name)
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
        assert other.nbytes == selection.bits.numel() + 2 * 4 * 4
    assert repr(selection).startswith(f"Selection(2 x 4 heads, {selection.bits.shape[3]} {choice}s choose of 8 blocks")
    assert "\n" not in repr(selection)


def test_files_that_hold_none(tmp_path: Path):
    with pytest.raises(UserError, match=r"must end in \.pt"):
        kept(problem()).save(tmp_path / "kept.safetensors")
    torch.save({"bits": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"version": 2}, tmp_path / "new.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    kept(problem()).save(tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt")
    bounds = [
        (math.nan, [], None),
        (1.0, ["x"], None),
        (1.0, [], "x"),
        (1.0, [1, 0], None),
        (1.0, [], 0),
        (2.0, [], None),
        (),
    ]
    for i, wrong in enumerate(bounds):
        torch.save(whole | {"bounds": wrong}, tmp_path / f"bounds{i}.pt")
    for name in ("other.pt", "new.pt", "text.pt", "none.pt", *(f"bounds{i}.pt" for i in range(len(bounds)))):
        with pytest.raises(UserError, match=rf"{name} holds no Selection \("):
            Selection.load(tmp_path / name)


def test_stale_selections_are_refused():
    one = problem()
    selection, tiles = kept(one), kept(one, "tile")
    other = dataclasses.replace(PARTITION, block=(2, 3, 7))
    cases = [
        ("selection must be of the call's partition", dataclasses.replace(one, partition=other), selection, {}),
        ("selection must have query's batch 1, got 2", problem_of(one, slice(1), slice(4)), selection, {}),
        ("selection must have query's heads 2, got 4", problem_of(one, slice(2), slice(2)), selection, {}),
        ("selection must be on query's device cpu, got meta: pass", one, selection.to("meta"), {}),
        ("choice='token' for dispatch='packed', got 'tile'", one, tiles, {"dispatch": "packed"}),
        ("choice='token' for dispatch='tiles', got 'tile'", one, tiles, {"dispatch": "tiles"}),
        ("choice='tile' for dispatch='shared', got 'token'", one, selection, {"dispatch": "shared"}),
        ("selection must be None for dispatch='dense'", one, selection, {"dispatch": "dense"}),
    ]
    for message, of_call, stale, options in cases:
        with pytest.raises(ValueError, match=message):
            call(of_call, stale, **options)
    tensors = (one.query, one.key)
    with pytest.raises(ValueError, match="choice='tile' for choice='tile', got 'token'"):
        vmoba_mask(*tensors, PARTITION, None, choice="tile", selection=selection)
    for rule, other in ((None, None), (TopK(1), selection)):
        with pytest.raises(ValueError, match="exactly one of rule and selection must be given"):
            vmoba_mask(*tensors, PARTITION, rule, selection=other)
    with pytest.raises(ValueError, match="backend must be one of"):
        selection.planned(one.query, "eager")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"selection must be a Selection or None, got Tensor: Selection\.of makes"):
        call(one, selection.selected())  # pyright: ignore[reportArgumentType]


def problem_of(one: Problem, batch: slice, heads: slice) -> Problem:
    tensors = {name: getattr(one, name)[batch, heads] for name in ("query", "key", "value")}
    return dataclasses.replace(one, **tensors)


def test_bad_values_of_selections_are_named():
    selected = kept(problem()).selected()
    bits = kept(problem()).bits
    nothing = selected.clone()
    nothing[0, 0, 5] = False
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "selected must be a bool tensor, got torch.uint8", lambda: Selection.of(bits, PARTITION)),
        (TypeError, "partition must be a BlockPartition, got str", lambda: Selection.of(selected, "24x36x64")),  # pyright: ignore[reportArgumentType]
        (TypeError, "rule must be a TopK or a Threshold, got int", lambda: Selection.of(selected, PARTITION, rule=3)),  # pyright: ignore[reportArgumentType]
        (ValueError, "choice must be one of", lambda: Selection.of(selected, PARTITION, "head")),  # pyright: ignore[reportArgumentType]
        (ValueError, r"selected must have shape \(B, H, 8, 8\)", lambda: Selection.of(selected, PARTITION, "tile")),
        (ValueError, "selected must hold at least one block", lambda: Selection.of(nothing, PARTITION)),
        (ValueError, r"bits must have shape \(B, H, 1, 168\)", lambda: Selection(bits[..., 1:], PARTITION)),
        (TypeError, "recall must be a float16, .* tensor, got float", lambda: Selection(bits, PARTITION, recall=0.9)),  # pyright: ignore[reportArgumentType]
        (
            ValueError,
            r"recall must have 2 dims \(B, H\), got shape \(4,\)",
            lambda: Selection.of(selected, PARTITION, recall=torch.ones(4)),
        ),
        (TypeError, "bounds must be Bounds, got float", lambda: Selection(bits, PARTITION, bounds=0.5)),  # pyright: ignore[reportArgumentType]
        (TypeError, "query must be a float16, .* tensor, got str", lambda: kept(problem()).planned("flash")),  # pyright: ignore[reportArgumentType]
        (TypeError, "as_bits must be a bool", lambda: vmoba_selection(*[bits] * 2, PARTITION, TopK(1), as_bits=1)),  # pyright: ignore[reportArgumentType, reportCallIssue]
    ]
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()


def test_a_selection_of_ones_own_knows_its_rows_and_reads_nothing_later():
    one = problem(Threshold(0.4))
    selected = kept(one).selected()
    selection = Selection.of(selected, PARTITION)
    assert selection.bounds.rows is not None
    tiles = -(-(selected.sum(2) + 8) // 128)
    assert selection.bounds.rows.row_tiles >= int(tiles.sum(2).max()) + 2
    assert torch.equal(call(one, selection, dispatch="packed"), call(one, dispatch="packed"))
    known = Selection.of(selected, PARTITION, rule=TopK(8))
    assert known.bounds == kept(dataclasses.replace(one, rule=TopK(8))).bounds
    assert (known.bounds.density, known.bounds.blocks) == (1.0, 8)


def test_a_selection_made_in_inference_mode_trains():
    one = problem()
    with torch.inference_mode():
        selections = [(kept(one), "packed"), (kept(one, "tile"), "shared")]
    for selection, dispatch in selections:
        expected = with_gradients(one, dispatch=dispatch)
        for x, y in zip(with_gradients(one, selection, dispatch=dispatch), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("dispatch", "choice"), [("packed", "token"), ("shared", "tile")])
def test_checkpoints_compute_with_the_selection_again(dispatch: str, choice: Any):
    one, again = problem().with_leaves(), problem().with_leaves()
    selection = kept(one, choice)
    call(one, selection, dispatch=dispatch).sum().backward()
    output: Any = checkpoint(lambda: call(again, selection, dispatch=dispatch), use_reentrant=False)
    output.sum().backward()
    for x, y in ((one.query, again.query), (one.key, again.key), (one.value, again.value)):
        assert x.grad is not None and y.grad is not None
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(("dispatch", "choice"), [("packed", "token"), ("shared", "tile")])
def test_new_selections_of_the_same_shapes_compile_nothing_again(dispatch: str, choice: Any):
    graphs = CompileCounterWithBackend("eager")
    one = problem()
    compiled = torch.compile(functools.partial(call, dispatch=dispatch), backend=graphs, fullgraph=True)
    for planned in (False, True):
        for seed in range(2):
            query = torch.randn(one.query.shape, generator=torch.Generator().manual_seed(seed))
            selection = kept(dataclasses.replace(one, query=query), choice)
            selection = selection.planned(query) if planned else selection
            # A compiled call of tiles runs flex_attention, and rounds otherwise.
            expected = call(one, selection, dispatch=dispatch)
            torch.testing.assert_close(compiled(one, selection), expected, rtol=1e-5, atol=1e-6)
            assert graphs.frame_count == 1 + planned

    def whole(one: Problem) -> tuple[Tensor, Selection]:
        selection = kept(one, choice)
        return call(one, selection, dispatch=dispatch), selection

    output, selection = torch.compile(whole, backend="eager", fullgraph=True)(one)
    torch.testing.assert_close(output, call(one, dispatch=dispatch), rtol=1e-5, atol=1e-6)
    assert torch.equal(selection.bits, kept(one, choice).bits)


def test_densities_that_fall_take_one_more_graph_at_most():
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(functools.partial(call, dispatch="packed"), backend=graphs, fullgraph=True)
    for k in (4, 3, 2, 1):
        selection = kept(problem(TopK(k)))
        assert torch.equal(compiled(problem(), selection), call(problem(), selection, dispatch="packed"))
    assert graphs.frame_count <= 2


PLANS = "block_masks.attention.row_attention.plan_rows"


class Ops(TorchDispatchMode):
    """Keeps the names of our ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("vmoba_flex", "block_masks"):
            self.names.add(func.__name__.partition(".")[0])
        return func(*args, **kwargs or {})


def test_a_plan_leaves_attention_and_merge():
    one = problem()
    planned = kept(one).planned(one.query)
    assert planned.nbytes > kept(one).nbytes
    with mock.patch(PLANS, side_effect=AssertionError), Ops() as ops:
        with_gradients(one, planned, dispatch="packed")
    stats = {"tile_lists"}  # nobody's but those of stats
    assert ops.names - stats == {"attend_packed", "attend_packed_backward"}
    with Ops() as ops:
        call(dataclasses.replace(one, tail=Tail(6)), planned, dispatch="packed")
    assert ops.names == {"attend_packed", "slots_and_means"}


def test_a_plan_of_tiles_has_the_lists_of_a_mask():
    one = problem()
    tiles = kept(one, "tile")
    with (
        mock.patch.object(shared, "has_flex_kernel", return_value=True),
        mock.patch.object(shared, "realize", lambda x: x),
    ):
        for backend in ("triton", "flash"):
            plan = tiles.planned(one.query, backend)
            given = [one.query, one.query, one.query, Call(PARTITION, plan, tail=Tail(6))]
            if backend == "flash":
                expected = shared.shared_attention(*given[:3], given[3]._replace(rule=tiles), backend).output
                with mock.patch("block_masks.attention.slot_attention._key_tiles", side_effect=AssertionError):
                    assert torch.equal(shared.shared_attention(*given, backend).output, expected)
                continue
            masks = []
            for rule in (tiles, plan):
                with mock.patch.object(shared, "compiled_flex_attention", side_effect=StopIteration) as kernel:
                    with pytest.raises(StopIteration):
                        shared.shared_attention(*given[:3], given[3]._replace(rule=rule), backend)
                    masks.append(kernel.call_args.kwargs["block_mask"])
            index = torch.meshgrid(*map(torch.arange, masks[0].shape), indexing="ij")
            assert torch.equal(masks[0].mask_mod(*index), masks[1].mask_mod(*index))
            for x, y in zip(masks[0].as_tuple()[:-2], masks[1].as_tuple()[:-2], strict=True):
                assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def test_a_plan_without_room_is_made_again_and_says_so(caplog: pytest.LogCaptureFixture):
    one = problem(TopK(2), partition=dataclasses.replace(PARTITION, suffix=0, prefix=8))
    planned, expected = kept(one).planned(one.query), call(one, dispatch="packed", max_row_bytes=1)
    grouped._log_no_room.cache_clear()
    with mock.patch(PLANS, wraps=plan_rows) as made:
        for _ in range(2):
            assert torch.equal(call(one, planned, dispatch="packed", max_row_bytes=1), expected)
    assert made.call_count == 2
    assert caplog.text.count("rows are planned again: max_row_bytes=1 does not allow sections of 4 heads") == 1
    small = kept(one).planned(one.query, max_row_bytes=1)
    with mock.patch(PLANS, side_effect=AssertionError):
        assert torch.equal(call(one, small, dispatch="packed", max_row_bytes=1), expected)
        assert torch.equal(call(one, small, dispatch="packed"), expected)


@pytest.mark.parametrize("rule", [TopK(3), TopK(1, always=(2, 5)), Threshold(0.9, pool="query", max_density=0.1)])
def test_plans_of_queries_that_choose_few_blocks_are_small(rule: Any):
    partition = BlockPartition((4, 6, 8), (1, 3, 2))
    query = torch.randn(1, 2, partition.num_tokens, 8, generator=torch.Generator().manual_seed(0))
    one = Problem(query, query, query, partition, rule)
    selection = kept(one)
    plans = [selection.planned(query).plan, Selection.of(selection.selected(), partition).planned(query).plan]
    for plan in plans:
        assert plan is not None and plan.rows is not None
        assert plan.rows.query_rows.shape == (2, 3, partition.num_tokens)
    assert torch.equal(call(one, selection.planned(query), dispatch="packed"), call(one, dispatch="packed"))
    # A bound too small must not go unseen.
    wrong = dataclasses.replace(selection, bounds=selection.bounds._replace(blocks=2)).planned(query)
    assert call(one, wrong, dispatch="packed").isnan().any()


def test_modules_take_a_selection():
    module = VMoBAAttention(VMoBAConfig(2, (3, 4), (2, 3, 4), TopK(2), dispatch="packed"), layer=2, num_layers=3)
    one = problem(TopK(2), key=problem().query, value=problem().query)
    tensors, text = (one.query, one.key, one.value), {"prefix": 3, "suffix": 5}
    expected = module(*tensors, PARTITION.grid, **text)
    assert torch.equal(module(*tensors, PARTITION.grid, **text, selection=kept(one)), expected)
    with pytest.raises(ValueError, match="selection must be None for dispatch='dense'"):
        module(*tensors, PARTITION.grid, **text, dense=True, selection=kept(one))
