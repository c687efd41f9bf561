"""The gates "cells", "spread" and "exact", and block masses: equal to both oracles, and chosen by on every path."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from block_masks import to_slots
from tests import oracle_numpy
from tests.paths import shared_choice, shared_selection
from tests.strategies import Problem, problems, rules
from tests.test_selection import own_blocks
from vmoba_flex import (
    BlockPartition,
    Tail,
    Threshold,
    TopK,
    block_masses,
    reference,
    reference_gates,
    vmoba_attention,
    vmoba_mask,
    vmoba_selection,
)
from vmoba_flex.rules import GATES, Gate
from vmoba_flex.selection import cell_gate, cell_places, exact_gate
from vmoba_flex.selection.scores import gate_scores, ranked, tile_scores
from vmoba_flex.selection.tiles import choose_by_tiles

NEW = GATES[1:]
FEW = settings(max_examples=25)
Cell = tuple[int, int, int]
# Blocks of several cells, cut short along each axis, with text on both sides.
PARTITION = BlockPartition((5, 7, 9), (4, 6, 8), prefix=3, suffix=2)


@contextlib.contextmanager
def cells_of(cell: int | Cell) -> Iterator[None]:
    """Gives the gates other cells than those of about 64 tokens, which are whole blocks of small grids."""
    with mock.patch.object(cell_places, "Tail", functools.partial(Tail, cell)):
        yield


@st.composite
def gated(draw: st.DrawFn, **options: Any) -> tuple[Problem, Cell]:
    """A problem whose rule has one of the new gates, and cells of any shape that fits its blocks."""
    problem = draw(problems(**options))
    rule = dataclasses.replace(problem.rule, gate=draw(st.sampled_from(NEW)))
    cell = draw(st.tuples(*(st.integers(1, side) for side in problem.partition.block)))
    return dataclasses.replace(problem, rule=rule), cell


def video(x: Tensor, partition: BlockPartition) -> Tensor:
    return x[:, :, partition.prefix : partition.num_tokens - partition.suffix]


def tensors(partition: BlockPartition, dtype: torch.dtype = torch.float32, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Query of four heads, key of two."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, partition.num_tokens, dim, generator=generator) for heads in (4, 2))
    return (2 * query).to(dtype), (key + 0.5).to(dtype)


def expected_scores(problem: Problem, cell: Cell) -> Tensor:
    p = problem.partition
    query, key = video(problem.query, p), video(problem.key, p)
    return reference_gates.gate_scores(query, key, p, problem.rule.gate, cell)


def assert_close(actual: Tensor, expected: Tensor, unit: Tensor | float) -> None:
    """Holds logarithms of masses to the rounding of their exponents, whose terms are as large as ``unit``."""
    eps = torch.finfo(actual.dtype).eps
    assert (actual.double() - expected).abs().max() <= 32 * eps * (1 + unit)


def largest_term(problem: Problem) -> float:
    """A bound on a query's scaled scores and on the variance of these in a cell."""
    scale = problem.query.shape[-1] ** -0.5
    product = scale * (problem.query.abs().sum(-1).max() * problem.key.abs().max()).item()
    return product + product**2


@given(st.sampled_from([torch.float32, torch.float64]).flatmap(lambda dtype: gated(dtype=dtype)))
@FEW
def test_scores_are_those_of_both_oracles(drawn: tuple[Problem, Cell]):
    problem, cell = drawn
    p, of = problem.partition, problem.rule.gate
    with cells_of(cell):
        scores = gate_scores(problem.query, problem.key, p, of)
    assert scores.dtype == problem.query.dtype and scores.mT.is_contiguous()
    expected, ids = expected_scores(problem, cell), oracle_numpy.block_ids(p.grid, p.block)
    query, key = (video(x, p).numpy() for x in (problem.query, problem.key))
    if of == "exact":
        twice = oracle_numpy.exact_gate(query, key, ids, p.num_blocks)
    else:
        twice = oracle_numpy.cell_gate(query, key, p.grid, p.block, cell, of == "spread")
    # A variance near the least one is a difference that float64 rounds too.
    np.testing.assert_allclose(expected, twice, rtol=1e-9, atol=1e-9)
    if of == "spread" and problem.query.dtype == torch.float32:
        flat = _has_flat_cells(problem, cell)
        scores, expected = scores[..., ~flat], expected[..., ~flat]
    if scores.numel():
        assert_close(scores, expected, largest_term(problem))


def _has_flat_cells(problem: Problem, cell: Cell) -> Tensor:
    """Blocks with a cell of one token: its variance, 0, may be rounding in float32."""
    p = problem.partition
    flat = torch.zeros(p.num_blocks, dtype=torch.bool)
    for block, tokens in reference_gates.cell_members(p, cell):
        flat[block] |= len(tokens) == 1
    return flat


@given(gated())
@FEW
def test_every_path_applies_the_rule_to_these_scores(drawn: tuple[Problem, Cell]):
    problem, cell = drawn
    p, rule, inputs = problem.partition, problem.rule, (problem.query, problem.key)
    ids = reference.block_ids(p.grid, p.block)
    with cells_of(cell):
        scores = ranked(gate_scores(*inputs, p, rule.gate), p, rule, 8)
        expected = reference.select(scores, ids, rule)
        assert torch.equal(vmoba_selection(*inputs, p, rule), expected)
        mask = vmoba_mask(*inputs, p, rule, tile_size=16, text_lengths=problem.text_lengths)
        index = torch.meshgrid(*(torch.arange(size) for size in mask.shape), indexing="ij")
        attended = mask.mask_mod(*index)
        truth = reference.attention_mask(expected, p, problem.text_lengths)
        assert torch.equal(attended, truth)
        options: Any = {"enable_gqa": problem.gqa, "text_lengths": problem.text_lengths}
        for dispatch in ("packed", "tiles"):
            output = vmoba_attention(*inputs, problem.value, p, rule, dispatch=dispatch, **options)
            dense = reference.attention(*inputs, problem.value, truth)[0]
            torch.testing.assert_close(output.double(), dense, rtol=0, atol=1e-4)


@given(gated(dtype=torch.float64), st.sampled_from([1, 3, 4, 128]))
@FEW
def test_tiles_choose_as_the_reference_says(drawn: tuple[Problem, Cell], tile_size: int):
    problem, cell = drawn
    p, rule = problem.partition, problem.rule
    query, key = video(problem.query, p), video(problem.key, p)
    tiles = reference.shared_tiles(reference.block_ids(p.grid, p.block), tile_size)
    expected = reference_gates.tile_scores(query, key, tiles, p, rule.gate, cell)
    with cells_of(cell):
        _, slots = shared_choice(problem, tile_size)
        scores = tile_scores(to_slots(problem.query, slots), problem.key, p, rule.gate, slots)
        chosen = shared_selection(problem, tile_size)
    assert_close(scores, expected, largest_term(problem))
    # On the library's own scores: equal ones may be rounded apart.
    of_tile = ranked(scores, p, rule, 8)
    tile_block = slots.tile_group[: scores.shape[2]]
    assert torch.equal(chosen, reference.select(of_tile, tile_block, rule)[:, :, tiles])


@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]).flatmap(problems))
@FEW
def test_masses_are_shares_of_full_attention(problem: Problem):
    p = problem.partition
    options: Any = {"scale": problem.scale, "text_lengths": problem.text_lengths}
    masses = block_masses(problem.query, problem.key, p, **options)
    expected = reference_gates.block_masses(problem.query, problem.key, p, **options)
    dtype = problem.query.dtype
    assert masses.dtype == (torch.float16 if dtype.itemsize == 2 else dtype) and masses.mT.is_contiguous()
    budget = 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (1 + largest_term(problem))
    rounding = torch.finfo(masses.dtype).eps / 2
    assert ((masses.double() - expected).abs() <= (budget + rounding) * expected + 3e-8 * (rounding > 1e-5)).all()
    lengths = problem.text_lengths
    if p.num_tokens == p.num_video_tokens or (lengths is not None and not lengths.any()):
        torch.testing.assert_close(masses.double().sum(-1), torch.ones(masses.shape[:3]).double(), rtol=0, atol=5e-3)


def test_a_negative_scale_and_a_scale_of_zero():
    query, key = tensors(PARTITION)
    for scale in (-0.3, 0.0):
        masses = block_masses(query, key, PARTITION, scale=scale)
        expected = reference_gates.block_masses(query, key, PARTITION, scale=scale)
        torch.testing.assert_close(masses.double(), expected, rtol=1e-5, atol=0)


@given(problems())
@FEW
def test_a_threshold_on_exact_masses_keeps_its_share_of_attention(problem: Problem):
    p = problem.partition
    rule = Threshold(0.9, normalize="softmax", gate="exact", pool="query")
    chosen = vmoba_selection(problem.query, problem.key, p, rule)
    video_only = BlockPartition(p.grid, p.block)
    query, key = video(problem.query, p), video(problem.key, p)
    masses = reference_gates.block_masses(query, key, video_only)
    kept = (masses * chosen).sum(-1)
    assert (kept >= 0.9 - 1e-5).all()
    # Without the least of the others it falls short.
    least = masses.masked_fill(~chosen | own_blocks(p), torch.inf).amin(-1)
    assert ((kept - least < 0.9 + 1e-5) | least.isinf()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cells_of_one_token_give_exact_masses(dtype: torch.dtype):
    partition = BlockPartition((3, 4, 5), (1, 1, 1), suffix=2)
    assert Tail().cell_of(partition) == (1, 1, 1)
    query, key = tensors(partition, dtype)
    exact, cells, spread = (gate_scores(query, key, partition, of) for of in ("exact", "cells", "spread"))
    torch.testing.assert_close(cells, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread, exact + math.log(cell_places.LEAST_VARIANCE) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of", NEW)
def test_16_bit_scores_are_off_by_the_rounding_of_what_they_are_made_of(of: Gate, dtype: torch.dtype):
    query, key = tensors(PARTITION, dtype)
    scores = gate_scores(query, key, PARTITION, of)
    assert scores.dtype == torch.float32
    cell = Tail().cell_of(PARTITION)
    expected = reference_gates.gate_scores(video(query, PARTITION), video(key, PARTITION), PARTITION, of, cell)
    # Mean, variance and squared query are each off by half a unit in the last place, and exact scores by none.
    size = (video(query, PARTITION).double().abs().sum(-1) / 4).max() * 2
    eps = torch.finfo(torch.float32).eps * 64 if of == "exact" else torch.finfo(dtype).eps
    assert (scores - expected).abs().max() <= eps * size
    assert of == "exact" or (scores - expected).abs().max() > 1e-5  # means are rounded, as a tail's are


def test_cells_without_spread_rank_last():
    partition = BlockPartition((1, 4, 16), (1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, partition.num_tokens, 16, generator=generator)
    flat = partition.block_ids() == 2
    key[:, :, flat] = key[:, :, flat].mean(2, keepdim=True)
    scores = gate_scores(query, key, partition, "spread")
    assert scores.isfinite().all() and (scores.argmin(-1) == 2).all()
    # So no pool is full because of them.
    assert (vmoba_selection(query, key, partition, Threshold(0.3, gate="spread")).float().mean((2, 3)) < 0.9).all()


def test_variances_that_16_bits_cannot_hold_stay_finite():
    query, key = (x * 200 for x in tensors(PARTITION, torch.float16))
    for of in ("cells", "spread"):
        assert gate_scores(query, key, PARTITION, of).isfinite().all()


@pytest.mark.parametrize("of", NEW)
def test_chunks_of_queries_make_no_difference(of: Gate):
    query, key = tensors(PARTITION)
    expected, masses = gate_scores(query, key, PARTITION, of), block_masses(query, key, PARTITION)
    with mock.patch.object(cell_gate, "_CHUNK_SCORES", 1000), mock.patch.object(exact_gate, "_CHUNK_SCORES", 20_000):
        torch.testing.assert_close(gate_scores(query, key, PARTITION, of), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block_masses(query, key, PARTITION), masses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", NEW)
def test_autocast_changes_no_score_and_no_gradient_flows(of: Gate):
    query, key = tensors(PARTITION)
    expected = gate_scores(query, key, PARTITION, of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate_scores(query, key, PARTITION, of), expected)
    query.requires_grad_()
    scores = gate_scores(query, key.requires_grad_(), PARTITION, of)
    assert not scores.requires_grad and torch.equal(scores, expected)
    assert not block_masses(query, key, PARTITION).requires_grad


def choose_and_weigh(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """A selection by each gate, and masses."""
    chosen = [vmoba_selection(query, key, PARTITION, TopK(2, gate=of)) for of in NEW]
    rule = Threshold(0.5, gate="spread", normalize="softmax")
    chosen.append(vmoba_selection(query, key, PARTITION, rule))
    return *chosen, block_masses(query, key, PARTITION, text_lengths=torch.tensor([0, 4], device=query.device))


def choose_tiles(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """A choice of tiles by each gate."""
    return tuple(choose_by_tiles(query, key, PARTITION, TopK(2, gate=of)) for of in NEW)


def test_compiled_choices_and_masses_are_eager_ones():
    query, key = tensors(PARTITION)
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: (*choose_and_weigh(*x), *choose_tiles(*x)), fullgraph=True)(query, key)
    for ours, eager in zip(compiled, (*choose_and_weigh(query, key), *choose_tiles(query, key)), strict=True):
        assert ours.stride() == eager.stride() and torch.equal(ours, eager)


def test_shapes_without_data():
    query, key = tensors(PARTITION)
    with FakeTensorMode() as mode:
        fake = choose_and_weigh(mode.from_tensor(query), mode.from_tensor(key))
    on_meta = choose_and_weigh(query.to("meta"), key.to("meta"))
    for found in (fake, on_meta):
        for ours, real in zip(found, choose_and_weigh(query, key), strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("of", NEW)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_pool_with_a_bad_score_keeps_everything(of: Gate, bad: float):
    query, key = tensors(PARTITION)
    key[0, 0, 10] = bad
    for rule in (Threshold(0.1, gate=of), Threshold(0.1, gate=of, normalize="softmax")):
        chosen = vmoba_selection(query, key, PARTITION, rule)
        assert chosen[0, :2].all() and not chosen[0, 2:].all() and not chosen[1].all()


Q, K = tensors(PARTITION)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q, K, (2, 3, 4)), {}, TypeError, "partition must be a BlockPartition, got tuple"),
        ((Q, K[:, :, 1:], PARTITION), {}, ValueError, "key must have shape"),
        ((Q, K.half(), PARTITION), {}, TypeError, "key must have query's dtype torch.float32, got torch.float16"),
        ((Q[:, :3], K, PARTITION), {}, ValueError, "key heads must divide query heads 3, got 2"),
        ((Q, K, PARTITION), {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ((Q, K, PARTITION), {"text_lengths": [1, 2]}, TypeError, "text_lengths must be an int64 tensor, got list"),
        ((Q, K, PARTITION), {"text_lengths": torch.tensor([1])}, ValueError, r"text_lengths must have shape \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input_to_masses(arguments: Any, options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        block_masses(*arguments, **options)


@given(rules(8))
def test_only_the_gate_tells_rules_apart(rule: TopK | Threshold):
    others = {dataclasses.replace(rule, gate=of) for of in GATES}
    assert len(others) == len({repr(other) for other in others}) == len({other.flat[0] for other in others}) == 4
