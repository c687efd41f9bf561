"""Coarse keys in the softmax of what was chosen, on all eager paths, against dense attention in float64."""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from block_masks import CoarseKeys, attend_packed, attend_slots, from_slots, merge_coarse_keys, plan_slots, to_slots
from block_masks.attention import coarse_attention, coarse_steps
from tests.strategies import generators


@dataclasses.dataclass(frozen=True)
class CoarseProblem:
    """Two heads of each of some samples, choices of groups for every ``together`` queries, and coarse keys."""

    selected: Tensor
    key_group: Tensor
    group_sizes: list[int]
    together: int
    tensors: tuple[Tensor, ...]  # query, key, value, coarse key, coarse value
    bias: Tensor
    coarse_group: Tensor

    def coarse(self, key: Tensor, value: Tensor) -> CoarseKeys:
        return CoarseKeys(key.flatten(0, 1), value.flatten(0, 1), self.bias.to(key.dtype), self.coarse_group)

    def of_queries(self) -> Tensor:
        """Choices of each query."""
        return self.selected.repeat_interleave(self.together, 2)[:, :, : self.tensors[0].shape[2]]

    def packed(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        slots = plan_slots(self.key_group, self.group_sizes, 4)
        query, key, value, *coarse = tensors
        return attend_packed(query, key, value, self.of_queries(), slots, scale=0.5, coarse=self.coarse(*coarse))

    def merged(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Into attention whose log-sum-exp has a gradient."""
        query, key, value, *coarse = tensors
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = (query @ key.mT * 0.5).masked_fill(~self.of_queries()[..., self.key_group], -torch.inf)
        some = self.of_queries().any(-1, keepdim=True)
        output = torch.where(some, torch.where(some, scores, 0).softmax(-1), 0) @ value
        lse = torch.where(some[..., 0], torch.where(some, scores, 0).logsumexp(-1), -torch.inf)
        return merge_coarse_keys(query, output, lse, self.coarse(*coarse), self.selected, 0.5, self.together)

    def expected(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Full softmax over keys and coarse keys, in float64."""
        query, *rest = (x.double() for x in tensors)
        key, value, coarse_key, coarse_value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in rest)
        chosen = self.of_queries()
        keys = (query @ key.mT * 0.5).masked_fill(~chosen[..., self.key_group], -torch.inf)
        coarse = query @ coarse_key.mT * 0.5 + self.bias.double()
        scores = torch.cat([keys, coarse.masked_fill(chosen[..., self.coarse_group], -torch.inf)], -1)
        some = scores.isfinite().any(-1, keepdim=True)
        p = torch.where(some, torch.where(some, scores, 0).softmax(-1), 0)
        return p @ torch.cat([value, coarse_value], 2), scores.logsumexp(-1)


@st.composite
def coarse_problems(draw: st.DrawFn, chosen_always: bool = False) -> CoarseProblem:
    generator = draw(generators())
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    keys = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    together, queries, cells = draw(st.sampled_from([1, 3])), draw(st.integers(1, 20)), draw(st.integers(1, 12))
    density = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    batch, key_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    shape = (batch, 2, -(-queries // together), len(sizes))
    selected = torch.rand(shape, generator=generator) < density
    if chosen_always:
        selected[..., 0] = True
    dims = draw(st.sampled_from([(3, 3), (8, 2)]))
    query = torch.randn((batch, 2, queries, dims[0]), generator=generator)
    of_keys = (torch.randn((batch, key_heads, n, d), generator=generator) for n in (len(keys), cells) for d in dims)
    bias = draw(st.sampled_from([0.0, 5.0, 80.0])) * torch.rand(cells, generator=generator)
    group = torch.randint(len(sizes), (cells,), generator=generator)
    return CoarseProblem(selected, keys, sizes, together, (query, *of_keys), bias, group)


@pytest.mark.parametrize("path", ["packed", "merged"])
@given(problem=coarse_problems())
def test_equals_one_softmax_over_keys_and_coarse_keys(path: str, problem: CoarseProblem):
    leaves = [x.clone().requires_grad_() for x in problem.tensors]
    exact = [x.double().requires_grad_() for x in problem.tensors]
    output, lse = getattr(problem, path)(*leaves)
    expected, expected_lse = problem.expected(*exact)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(output, leaves, grad)
    for actual, target in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(actual.double(), target, rtol=2e-4, atol=2e-4)


@given(problem=coarse_problems())
def test_chunks_of_queries_change_nothing(problem: CoarseProblem):
    upstream = torch.randn(problem.packed(*problem.tensors)[0].shape, generator=torch.Generator().manual_seed(0))

    def results() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in problem.tensors]
        output, lse = problem.merged(*leaves)
        return [output.detach(), lse.detach(), *torch.autograd.grad(output, leaves, upstream)]

    whole = results()
    with mock.patch.object(coarse_steps, "_CHUNK_SCORES", 100):
        chunked = results()
    for actual, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@given(problem=coarse_problems(chosen_always=True))
def test_tiles_of_slots_equal_one_softmax(problem: CoarseProblem):
    slots = plan_slots(problem.key_group, problem.group_sizes, 4)
    heads = problem.tensors[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    key, value, *coarse = (x.repeat_interleave(heads // x.shape[1], 1) for x in problem.tensors[1:])
    query = torch.randn((*key.shape[:3], key.shape[3]), generator=generator)
    selected = torch.rand((*query.shape[:2], len(slots.tile_group), len(slots.group_sizes)), generator=generator) < 0.5
    selected[..., 0] = True
    leaves = [x.requires_grad_() for x in (query, key, value, *coarse)]
    of_key = dataclasses.replace(
        problem, selected=selected.index_select(2, slots.key_slot // 4), together=1, tensors=tuple(leaves)
    )
    exact = [x.detach().double().requires_grad_() for x in leaves]
    in_slots = (to_slots(x, slots) for x in leaves[:3])
    output = from_slots(attend_slots(*in_slots, selected, slots, 0.5, coarse=problem.coarse(*leaves[3:]))[0], slots)
    expected, _ = of_key.expected(*exact)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn(output.shape, generator=generator)
    grads = torch.autograd.grad(output, leaves, grad)
    for actual, target in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(actual.double(), target, rtol=2e-4, atol=2e-4)


@given(problem=coarse_problems())
def test_a_query_that_chose_everything_keeps_its_bits(problem: CoarseProblem):
    everything = dataclasses.replace(problem, selected=torch.ones_like(problem.selected))
    query, key, value, *_ = problem.tensors
    slots = plan_slots(problem.key_group, problem.group_sizes, 4)
    without = attend_packed(query, key, value, everything.of_queries(), slots, scale=0.5)
    for actual, expected in zip(everything.packed(*problem.tensors), without, strict=True):
        assert torch.equal(actual, expected)


def test_registered_ops_are_well_formed():
    generator = torch.Generator().manual_seed(0)
    selected, group = torch.tensor([[[[True, False], [False, True], [False, False]]]]), torch.tensor([0, 1, 1])
    tensors = [torch.randn(1, 1, 3, 4, generator=generator).requires_grad_() for _ in range(5)]
    problem = CoarseProblem(selected, torch.tensor([0, 1, 1]), [1, 2], 1, tuple(tensors), torch.zeros(3), group)
    coarse = problem.coarse(*tensors[3:])
    lse = torch.randn(1, 1, 3, generator=generator).requires_grad_()
    torch.library.opcheck(
        torch.ops.block_masks.merge_coarse_keys, (tensors[0], tensors[1], lse, *coarse, selected, 0.5, 1)
    )
    slots = plan_slots(problem.key_group, problem.group_sizes, 4)
    flat = [x.flatten(0, 1) for x in (*tensors[:3], selected)]
    torch.library.opcheck(
        torch.ops.block_masks.attend_packed, (*flat, None, *coarse, *slots.flat, [1, 4, 1, 4], 0.5, "eager")
    )


def test_wide_values_have_no_kernel():
    """Kernels hold a whole value in a tile, so those wider than they take are merged by plain PyTorch, on a GPU too."""
    with FakeTensorMode():
        query, output = (torch.empty(1, 1, 4, dim, device="cuda") for dim in (64, 512))
    assert coarse_attention._modules(query, output)[0] is coarse_steps
    assert coarse_attention._modules(output, query)[0] is coarse_steps


@pytest.mark.parametrize(
    ("most", "more", "words"),
    [
        ((1, 2**31 - 1, 64), (1, 2**31, 64), "below 2..31, which kernels index, got 2147483648 . 1: let each"),
        ((9, 2**25 - 1, 64 * 64), (9, 2**25 - 1, 64 * 64 + 1), "got 33554431 . 65"),
        ((1, 9, 64 * 65_535), (1, 9, 64 * 65_535 + 1), "at most 4194240 coarse keys, got 4194241"),
        ((65_535, 9, 9), (65_536, 9, 9), "batch . heads of at most 65535 on a GPU, got 65536: split the batch"),
    ],
)
def test_as_many_coarse_keys_as_kernels_index(most: tuple[int, ...], more: tuple[int, ...], words: str):
    coarse_steps.check_coarse_size("coarse", *most)
    with pytest.raises(ValueError, match=f"coarse must .*{words}"):
        coarse_steps.check_coarse_size("coarse", *more)
    # An element of the keys of a head is indexed with int32, too.
    assert coarse_steps._MAX_PROGRAMS * 64 * coarse_steps.MAX_KERNEL_DIM < 2**31


@pytest.mark.parametrize("path", ["packed", "merge", "slots"])
def test_too_many_coarse_keys_for_a_gpu_are_refused_at_the_door(path: str):
    queries, keys = 2**20, 64
    with FakeTensorMode():
        query, key = (torch.empty(1, 1, n, 8, device="cuda") for n in (queries, keys))
        coarse_key, bias = torch.empty(1, 2**17 + 1, 8, device="cuda"), torch.empty(2**17 + 1, device="cuda")
        coarse = CoarseKeys(coarse_key, coarse_key, bias, torch.empty_like(bias, dtype=torch.int64))
        lse = torch.empty(1, 1, queries, device="cuda")
        selected = torch.ones(1, 1, queries, 1, dtype=torch.bool, device="cuda")
        slots = plan_slots(torch.zeros(keys, dtype=torch.int64, device="cuda"), [keys], 64)
        one_each = plan_slots(torch.zeros(queries, dtype=torch.int64, device="cuda"), [queries], 1)
        calls = {
            "packed": lambda: attend_packed(query, key, key, selected, slots, backend="triton", coarse=coarse),
            "merge": lambda: merge_coarse_keys(query, query, lse, coarse, selected, 1.0),
            "slots": lambda: attend_slots(query, query, query, selected, one_each, 1.0, coarse=coarse),
        }
        with pytest.raises(ValueError, match=r"coarse must keep rows .* got 1048576 \* 2049"):
            calls[path]()
