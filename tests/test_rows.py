"""Packed rows: the plan, its mask, and attention over rows."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

from block_masks import RowPlan, Slots, plan_rows, plan_slots, row_mask
from block_masks.attention import row_steps
from block_masks.attention.row_attention import Room, attend_rows
from block_masks.plans.section import sections_of
from tests.paths import untraced_flex_attention
from tests.strategies import generators
from tests.test_block_masks import INDEX_TENSORS


@dataclasses.dataclass
class RowProblem:
    """Choices of key groups by the queries of some heads, with room for their rows, and data."""

    selected: Tensor
    key_group: Tensor
    group_sizes: list[int]
    row_tiles: int
    heads: int
    tile_size: int
    query: Tensor
    key: Tensor
    value: Tensor
    group_lengths: Tensor | None = None

    def to(self, device: str) -> "RowProblem":
        names = [
            "selected",
            "key_group",
            "query",
            "key",
            "value",
            *["group_lengths"] * (self.group_lengths is not None),
        ]
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def plan(self) -> RowPlan:
        return plan_rows(self.selected, self.row_tiles, self.heads, self.tile_size)

    def slots(self) -> Slots:
        known = bool((self.key_group.diff() >= 0).all())
        return plan_slots(self.key_group, self.group_sizes, self.tile_size, sorted_keys=known)

    def attend(self, *tensors: Tensor, scale: float = 0.5, backend: str = "eager") -> tuple[Tensor, Tensor]:
        return attend_rows(
            *(tensors or (self.query, self.key, self.value)),
            self.selected,
            self.slots(),
            rooms=(Room(self.heads, self.row_tiles), Room(self.heads, self.row_tiles)),
            scale=scale,
            backend=backend,
            group_lengths=self.group_lengths,
        )

    def expected(self, *tensors: Tensor, scale: float = 0.5) -> Tensor:
        """Dense masked attention in float64, zero where a query chose nothing."""
        query, key, value = (x.double() for x in tensors or (self.query, self.key, self.value))
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        mask = self.selected[..., self.key_group]
        if self.group_lengths is not None:
            same = self.key_group[:, None] == self.key_group
            place = same.tril(-1).sum(1)  # of each key in its group
            mask = mask & (place < self.group_lengths[:, None, self.key_group])
        scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
        return torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0) @ value


@st.composite
def row_problems(draw: st.DrawFn, tile_size: int | None = None) -> RowProblem:
    generator = draw(generators())
    tile = tile_size or draw(st.sampled_from([2, 4, 16]))
    sizes = draw(st.lists(st.integers(1, 2 * tile + 1), min_size=1, max_size=5))
    if draw(st.booleans()):  # whole tiles, which may be in their slots already
        sizes = [-(-size // tile) * tile for size in sizes]
    keys = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if draw(st.booleans()):
        keys = keys[torch.randperm(len(keys), generator=generator)]
    together, sections, queries = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    selected = torch.rand((together * sections, queries, len(sizes)), generator=generator) < density
    needed = ((selected.sum(1) + tile - 1) // tile).view(sections, -1).sum(1).max()
    tiles = max(int(needed) + draw(st.integers(0, 3)), 1)
    dims = draw(st.sampled_from([(3, 3), (8, 2)]))
    repeats = together if draw(st.booleans()) else 1
    query = torch.randn((together * sections, queries, dims[0]), generator=generator)
    key, value = (torch.randn((len(query) // repeats, len(keys), d), generator=generator) for d in dims)
    share = torch.rand((len(query), len(sizes)), generator=generator)
    group_lengths = (share * torch.tensor(sizes)).int() + 1 if draw(st.booleans()) else None
    return RowProblem(selected, keys, sizes, tiles, together, tile, query, key, value, group_lengths)


@given(row_problems())
def test_each_pair_has_a_row_of_its_own(problem: RowProblem):
    plan = problem.plan()
    heads, queries, groups = problem.selected.shape
    assert torch.equal(plan.query_count, problem.selected.sum(-1))
    for h in range(heads):
        section = h // problem.heads
        for s in range(queries):
            chosen = problem.selected[h, s].nonzero().flatten().tolist()
            for g, row in zip(chosen, plan.query_rows[h, : len(chosen), s].tolist(), strict=True):
                assert plan.row_query[section, row] == h * queries + s
                assert plan.row_pool[section, row // problem.tile_size] == h * groups + g
    assert (plan.row_query >= 0).sum() == problem.selected.sum()
    used = (plan.row_query >= 0).unflatten(1, (-1, problem.tile_size)).any(-1)
    assert torch.equal(plan.row_pool >= 0, used)


@given(row_problems(), st.integers(1, 3))
def test_queries_without_room_for_all_their_rows_are_marked(problem: RowProblem, row_tiles: int):
    plan = plan_rows(problem.selected, row_tiles, problem.heads, problem.tile_size)
    lost = plan.query_count < 0
    assert plan.row_query.shape[1] == row_tiles * problem.tile_size
    assert (plan.tiles >= 0).all()
    assert (plan.first_tile + plan.tiles <= row_tiles).all()
    assert torch.equal(plan.query_count[~lost], problem.selected.sum(-1)[~lost].int())
    assert plan.query_count[~lost].sum() <= (plan.row_query >= 0).sum() < problem.selected.sum() + (~lost).all()
    output, lse = dataclasses.replace(problem, row_tiles=row_tiles).attend()
    whole, whole_lse = problem.attend()
    assert output[lost].isnan().all() and lse[lost].isnan().all()
    assert torch.equal(output[~lost], whole[~lost]) and torch.equal(lse[~lost], whole_lse[~lost])


@given(row_problems())
def test_lists_equal_create_block_mask(problem: RowProblem):
    """Padding rows count as their tile's: what a tile sees, it sees as a whole."""
    plan, slots = problem.plan(), problem.slots()
    for section in range(len(plan.row_pool)):
        mask = row_mask(plan, slots, section)
        size = problem.tile_size
        expected = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=size)
        for name in INDEX_TENSORS:
            actual, target = getattr(mask, name)[0, 0], getattr(expected, name)[0, 0]
            if name.endswith("num_blocks"):
                assert torch.equal(actual, target), name
            else:
                counts = getattr(mask, name.replace("indices", "num_blocks"))[0, 0]
                for one, other, count in zip(actual, target, counts, strict=True):
                    assert torch.equal(one[:count], other[:count]), name


@given(row_problems())
def test_lists_are_safe_to_read_to_their_ends(problem: RowProblem):
    mask = row_mask(problem.plan(), problem.slots())
    rows, keys = (length // problem.tile_size for length in mask.seq_lengths)
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        listed = getattr(mask, name)
        assert listed.min() >= 0, name
        assert listed.max() < (keys if "kv" in name else rows), name
        assert listed.is_contiguous()
    tensors = [getattr(mask, name) for name in INDEX_TENSORS]
    assert len({x.data_ptr() for x in tensors}) == len(tensors)


@given(row_problems(), st.sampled_from([0.5, -1.0, 0.0]))
def test_attention_equals_dense_masked_attention(problem: RowProblem, scale: float):
    output, lse = problem.attend(scale=scale)
    torch.testing.assert_close(output.double(), problem.expected(scale=scale), rtol=1e-5, atol=1e-5)
    assert torch.equal(lse == -torch.inf, ~problem.selected.any(-1))


@given(row_problems())
def test_flex_attention_over_the_mask_gives_the_same_rows(problem: RowProblem):
    plan, slots = problem.plan(), problem.slots()
    repeats = len(problem.query) // len(problem.key)
    key, value = (x.repeat_interleave(repeats, 0) for x in (problem.key, problem.value))
    keys, values = (row_steps.take_slots(x, slots.slot_key) for x in (key, value))
    for section in range(len(plan.row_pool)):
        part = slice(section * problem.heads, (section + 1) * problem.heads)
        place = plan.row_query[section]
        rows = torch.where((place >= 0)[:, None], problem.query.flatten(0, 1)[place.clamp(min=0)], 0)
        inputs = (x[None, None] for x in (rows, keys[part].flatten(0, 1), values[part].flatten(0, 1)))
        output, aux = untraced_flex_attention(
            *inputs, block_mask=row_mask(plan, slots, section), scale=0.5, return_aux=AuxRequest(lse=True)
        )
        of_section = sections_of(plan, slots, None)[section]
        mine, lse = row_steps.forward(problem.query, keys, values, of_section, 0.5)
        used = plan.row_pool[section].repeat_interleave(problem.tile_size) >= 0
        torch.testing.assert_close(output[0, 0][used], mine[used], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(aux.lse[0, 0][used], lse[used], rtol=1e-5, atol=1e-5)


@given(row_problems(tile_size=2))
def test_gradients_by_finite_differences(problem: RowProblem):
    leaves = [x.double().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    assert torch.autograd.gradcheck(lambda *x: problem.attend(*x)[0], leaves, fast_mode=True)


def _problem(selected: Tensor, dim: int = 4) -> RowProblem:
    """Two groups of one and two keys."""
    heads, queries, _ = selected.shape
    query, key, value = (torch.randn(heads, n, dim) for n in (queries, 3, 3))
    return RowProblem(selected, torch.tensor([0, 1, 1]), [1, 2], 16, heads, 2, query, key, value)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_nan_group_reaches_only_the_queries_that_chose_it(bad: int):
    problem = _problem(torch.tensor([[[True, False], [True, True], [False, True]]]))
    selected = torch.cat([problem.selected, torch.tensor([[[True], [True], [True]]])], -1)
    key, value = (torch.cat([x, x[:, :1]], 1) for x in (problem.key, problem.value))
    # The last group is narrower than the widest one: what fills it up must not be another group's.
    problem = dataclasses.replace(problem, key_group=torch.tensor([0, 1, 1, 2]), group_sizes=[1, 2, 1], key=key)
    problem = dataclasses.replace(problem, selected=selected, value=value)
    for x in (problem.key, problem.value):
        x[0, bad] = torch.nan
    assert problem.attend()[0][0].isnan().all(-1).tolist() == problem.selected[0, :, bad].tolist()


def test_registered_ops_are_well_formed():
    problem = _problem(torch.ones(2, 5, 2, dtype=torch.bool))
    leaves = [x.requires_grad_() for x in (problem.query, problem.key, problem.value)]
    ops, tail = torch.ops.block_masks, (*problem.slots().flat, [2, 16, 1, 8], 0.5, "eager")
    without = (None,) * 4  # coarse keys
    torch.library.opcheck(ops.attend_packed, (*leaves, problem.selected, None, *without, *tail))
    output, lse = problem.attend()
    inputs = [x.detach() for x in (output, *leaves)]
    saved = (problem.selected, None, *without, output.detach(), lse.detach())
    torch.library.opcheck(ops.attend_packed_backward, (*inputs, *saved, *tail))
    torch.library.opcheck(ops.pack_bits, (problem.selected,))
    torch.library.opcheck(ops.tile_lists, (problem.selected,))
