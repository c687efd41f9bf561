"""Packed rows: the plan, and the steps around attention over rows."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from block_masks import RowPlan, gather_rows, merge_rows, pad_keys, plan_rows
from tests.strategies import generators
from tests.test_block_masks import INDEX_TENSORS
from vmoba_flex.chunked import row_attention

INDICES = ("row_query", "pair_row", "slot_key", "key_slot", "row_group", "slot_group")


@dataclasses.dataclass
class RowProblem:
    """Choices of key groups by the queries of some heads, and data for the steps around attention."""

    selected: Tensor
    key_group: Tensor
    group_sizes: list[int]
    row_tiles: int
    tile_size: int
    query: Tensor

    def plan(self) -> RowPlan:
        return plan_rows(self.selected, self.key_group, self.group_sizes, self.row_tiles, self.tile_size)

    def to(self, device: str) -> "RowProblem":
        tensors = {name: getattr(self, name).to(device) for name in ("selected", "key_group", "query")}
        return dataclasses.replace(self, **tensors)

    def run(self) -> dict[str, Tensor]:
        """The plan's tensors and the results and gradients of all steps, on data that any device makes the same."""
        plan = self.plan()
        query = self.query.clone().requires_grad_()
        rows = gather_rows(query, plan)
        scale = torch.linspace(-1, 1, len(rows), device=rows.device)
        lse = (3 * scale).requires_grad_()
        output = (rows.detach() * scale[:, None]).requires_grad_()
        merged = merge_rows(output, lse, plan)
        weights = torch.linspace(-1, 1, merged.numel(), device=rows.device).view_as(merged)
        steps = {"rows": rows, "merged": merged}
        steps["dquery"] = torch.autograd.grad(rows, query, scale[:, None].expand_as(rows))[0]
        steps["doutput"], steps["dlse"] = torch.autograd.grad(merged, (output, lse), weights)
        steps |= {name: getattr(plan, name) for name in INDICES}
        steps |= {name: getattr(plan.block_mask, name) for name in INDEX_TENSORS}
        return {name: x.detach() for name, x in steps.items()}


@st.composite
def row_problems(draw: st.DrawFn, tile_size: int | None = None) -> RowProblem:
    generator = draw(generators())
    tile = tile_size or draw(st.sampled_from([2, 4, 16]))
    sizes = draw(st.lists(st.integers(1, 2 * tile + 1), min_size=1, max_size=5))
    keys = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if draw(st.booleans()):
        keys = keys[torch.randperm(len(keys), generator=generator)]
    heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    selected = torch.rand((heads, queries, len(sizes)), generator=generator) < density
    needed = int(((selected.sum(1) + tile - 1) // tile).sum())
    spare = draw(st.integers(0, 3))
    query = torch.randn((heads, queries, draw(st.sampled_from([3, 8]))), generator=generator)
    return RowProblem(selected, keys, sizes, max(needed + spare, 1), tile, query)


@given(row_problems())
def test_each_pair_has_a_row_of_its_own(problem: RowProblem):
    plan = problem.plan()
    _, queries, groups = problem.selected.shape
    assert torch.equal(plan.pair_row >= 0, problem.selected.transpose(1, 2))
    for h, g, s in problem.selected.transpose(1, 2).nonzero().tolist():
        row = int(plan.pair_row[h, g, s])
        assert plan.row_query[row] == h * queries + s
        assert plan.row_group[row // problem.tile_size] == h * groups + g
    assert (plan.row_query >= 0).sum() == problem.selected.sum()


@given(row_problems())
def test_slots_hold_each_key_once_in_tiles_of_one_group(problem: RowProblem):
    plan = problem.plan()
    groups = len(problem.group_sizes)
    held = plan.slot_key[plan.slot_key >= 0]
    assert torch.equal(held.sort().values, torch.arange(len(problem.key_group)))
    assert torch.equal(plan.slot_key[plan.key_slot], torch.arange(len(problem.key_group)))
    slot_group = plan.slot_group.view(-1, len(plan.slot_key))
    for h, of_slot in enumerate(slot_group):
        assert torch.equal(of_slot[plan.key_slot], problem.key_group + h * groups)
        assert (of_slot[plan.slot_key < 0] == -1).all()
        for tile in of_slot.split(problem.tile_size):
            assert tile[tile >= 0].unique().numel() == 1


@given(row_problems())
def test_lists_equal_create_block_mask(problem: RowProblem):
    """Rows that fill a tile count as their tile's: what a tile sees, it sees as a whole."""
    mask = problem.plan().block_mask
    expected = create_block_mask(
        mask.mask_mod, None, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=problem.tile_size
    )
    for name in INDEX_TENSORS:
        actual, target = getattr(mask, name)[0, 0], getattr(expected, name)[0, 0]
        if name.endswith("num_blocks"):
            assert torch.equal(actual, target), name
        else:
            for one, other, count in zip(
                actual, target, getattr(mask, name.replace("indices", "num_blocks"))[0, 0], strict=True
            ):
                assert torch.equal(one[:count], other[:count]), name


@given(row_problems())
def test_lists_are_safe_to_read_to_their_ends(problem: RowProblem):
    mask = problem.plan().block_mask
    rows, keys = (length // problem.tile_size for length in mask.seq_lengths)
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        listed = getattr(mask, name)
        assert listed.min() >= 0, name
        assert listed.max() < (keys if "kv" in name else rows), name
        assert listed.is_contiguous()
    tensors = [getattr(mask, name) for name in INDEX_TENSORS]
    assert len({x.data_ptr() for x in tensors}) == len(tensors)


@given(row_problems(), st.integers(0, 2**32 - 1))
def test_merged_rows_equal_attention_over_chosen_groups(problem: RowProblem, seed: int):
    plan = problem.plan()
    generator = torch.Generator().manual_seed(seed)
    shape = (problem.query.shape[0], len(problem.key_group), problem.query.shape[2])
    key, value = torch.randn((2, *shape), generator=generator)
    rows, keys, values = gather_rows(problem.query, plan), pad_keys(key, plan), pad_keys(value, plan)
    mask = problem.selected[..., problem.key_group]
    scores = (problem.query.double() @ key.double().mT * 0.5).masked_fill(~mask, -torch.inf)
    expected = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0) @ value.double()
    merged = merge_rows(*row_attention(rows, keys, values, plan, 0.5), plan)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = (x[None, None] for x in (rows, keys, values))
    flex, aux = flex_attention(*inputs, block_mask=plan.block_mask, scale=0.5, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(merge_rows(flex[0, 0], aux.lse[0, 0], plan).double(), expected, rtol=1e-5, atol=1e-5)


@given(row_problems(tile_size=2))
def test_gradients_by_finite_differences(problem: RowProblem):
    plan = problem.plan()
    query = problem.query.double().requires_grad_()
    lse = torch.randn(len(plan.row_query), dtype=torch.float64, requires_grad=True)
    output = torch.randn(len(lse), 2, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(query.shape[0], len(problem.key_group), 2, dtype=torch.float64, requires_grad=True)
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(lambda q: gather_rows(q, plan), query, **fast)
    assert torch.autograd.gradcheck(lambda k: pad_keys(k, plan), keys, **fast)
    assert torch.autograd.gradcheck(lambda o, x: merge_rows(o, x, plan), (output, lse), **fast)


def test_a_nan_row_makes_its_query_nan_alone():
    problem = RowProblem(torch.ones(1, 3, 2, dtype=torch.bool), torch.tensor([0, 1]), [1, 1], 4, 2, torch.ones(1, 3, 2))
    plan = problem.plan()
    output, lse = torch.ones(8, 2), torch.zeros(8)
    lse[plan.pair_row[0, 1, 1]] = torch.nan
    assert merge_rows(output, lse, plan)[0].isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dispatch_tile", [128])
def test_registered_ops_are_well_formed(dispatch_tile):
    problem = RowProblem(
        torch.ones(2, 5, 2, dtype=torch.bool), torch.tensor([0, 1, 1]), [1, 2], 4, dispatch_tile, torch.randn(2, 5, 4)
    )
    plan = problem.plan()
    rows = torch.randn(len(plan.row_query), 4, requires_grad=True)
    lse = torch.randn(len(rows), requires_grad=True)
    ops = torch.ops.block_masks
    query = problem.query
    torch.library.opcheck(ops.plan_rows, (problem.selected, problem.key_group, 4, 2, 1, dispatch_tile))
    torch.library.opcheck(ops.gather_rows, (query.requires_grad_(), plan.row_query, plan.pair_row))
    key = torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(ops.gather_slots, (key, plan.slot_key, plan.key_slot))
    torch.library.opcheck(ops.pack_bits, (problem.selected,))
    torch.library.opcheck(ops.take_rows, (query.detach().flatten(0, 1), plan.row_query))
    torch.library.opcheck(ops.sum_rows, (rows.detach(), plan.pair_row))
    torch.library.opcheck(ops.merge_rows, (rows, lse, plan.pair_row, plan.row_query))
    torch.library.opcheck(ops.tile_lists, (problem.selected,))
