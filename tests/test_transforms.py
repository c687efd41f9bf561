"""Forward mode, torch.func and second derivatives: each right on every dispatch, against dense masked attention."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from block_masks import CoarseKeys, attend_packed, attend_slots, from_slots, merge_coarse_keys, plan_slots, to_slots
from block_masks.launching import transforms
from tests.paths import attend, expected_mask, full_mask, shared_selection
from tests.strategies import Problem
from vmoba_flex import BlockPartition, Tail, Threshold, TopK, reference, vmoba_attention, vmoba_selection
from vmoba_flex.cells import cell_means
from vmoba_flex.tail import Cells

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PARTITION = BlockPartition((2, 4, 4), (1, 2, 3), prefix=1, suffix=2)
CELL = (1, 2, 2)
CASES = {
    "top-k": (TopK(2), {}),
    "threshold": (Threshold(0.3, normalize="softmax", gate="exact"), {}),
    "padding": (TopK(2, pool="head"), {"text_lengths": torch.tensor([1, 3])}),
    "tail": (TopK(2, gate="spread"), {"tail": Tail(CELL)}),
}
WAYS = [
    (dispatch, case)
    for dispatch in ("packed", "tiles", "shared", "dense", "auto")
    for case in CASES
    if (dispatch, case) != ("dense", "tail")
]


@pytest.fixture(autouse=True)
def logs_anew():
    transforms.log_plain.cache_clear()


def tensors(count: int = 3, key_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = [4, key_heads, key_heads] * (count // 3)
    shape = (PARTITION.num_tokens, 8)
    return [torch.randn(2, each, *shape, generator=generator, dtype=torch.float64) for each in heads]


def ours_and_oracle(dispatch: str, case: str) -> tuple[Attention, Attention, list[Tensor]]:
    rule, options = CASES[case]
    inputs = tensors()
    problem = Problem(*inputs, PARTITION, rule, 0.3, **options)
    if dispatch == "dense":
        selection, mask = None, full_mask(problem)
    elif dispatch == "shared":
        selection, mask = shared_selection(problem, 128), expected_mask(problem, 128)
    else:
        selection, mask = vmoba_selection(problem.query, problem.key, PARTITION, rule), expected_mask(problem)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(dataclasses.replace(problem, query=query, key=key, value=value), dispatch=dispatch)

    def oracle(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shown, bias = mask, None
        if "tail" in options:
            assert selection is not None
            key, value = (x.repeat_interleave(2, 1) for x in (key, value))
            key, value, shown, bias = reference.with_cells(key, value, selection, mask, PARTITION, CELL)
        return reference.attention(query, key, value, shown, 0.3, bias)[0]

    return ours, oracle, inputs


@pytest.mark.parametrize(("dispatch", "case"), WAYS)
class TestEveryDispatch:
    def test_tangents_of_torch_func(self, dispatch: str, case: str):
        ours, oracle, inputs = ours_and_oracle(dispatch, case)
        tangents = tuple(torch.randn_like(x) for x in inputs)
        actual, expected = (torch.func.jvp(f, tuple(inputs), tangents) for f in (ours, oracle))
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("training", [False, True])
    def test_tangents_of_dual_numbers(self, dispatch: str, case: str, training: bool):
        ours, oracle, inputs = ours_and_oracle(dispatch, case)
        directions = [torch.randn_like(x) for x in inputs]
        with forward.dual_level():
            dual = [
                forward.make_dual(x.clone().requires_grad_(training), y)
                for x, y in zip(inputs, directions, strict=True)
            ]
            actual, expected = (forward.unpack_dual(f(*dual)).tangent for f in (ours, oracle))
        assert actual is not None and expected is not None
        torch.testing.assert_close(actual, expected)

    def test_gradients_of_torch_func(self, dispatch: str, case: str):
        ours, oracle, inputs = ours_and_oracle(dispatch, case)
        actual, expected = (
            torch.func.grad(lambda *x, f=f: f(*x).square().sum(), (0, 1, 2))(*inputs) for f in (ours, oracle)
        )
        torch.testing.assert_close(actual, expected)

    def test_forward_over_reverse(self, dispatch: str, case: str):
        ours, oracle, inputs = ours_and_oracle(dispatch, case)
        tangents = tuple(torch.randn_like(x) for x in inputs)

        def slope(f: Attention, *x: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*x)

        actual, expected = (
            torch.func.jvp(functools.partial(slope, f), tuple(inputs), tangents)[1] for f in (ours, oracle)
        )
        torch.testing.assert_close(actual, expected)

    def test_second_derivatives(self, dispatch: str, case: str):
        ours, oracle, inputs = ours_and_oracle(dispatch, case)

        def penalty(f: Attention) -> tuple[Tensor, ...]:
            leaves = [x.clone().requires_grad_() for x in inputs]
            grads = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in grads), leaves)  # pyright: ignore

        with sdpa_kernel([SDPBackend.MATH]):  # dense attention's fused kernels have none
            torch.testing.assert_close(penalty(ours), penalty(oracle))

    def test_vmap_equals_a_loop(self, dispatch: str, case: str):
        ours, _, inputs = ours_and_oracle(dispatch, case)
        batches = [torch.stack([x, x.flip(2), x * 0.5]) for x in inputs]
        expected = torch.stack([ours(*each) for each in zip(*batches, strict=True)])
        torch.testing.assert_close(torch.func.vmap(ours)(*batches), expected)


@pytest.mark.parametrize("dispatch", ["packed", "tiles", "shared"])
def test_tangents_inside_compile(dispatch: str):
    torch.compiler.reset()
    ours, oracle, inputs = ours_and_oracle(dispatch, "top-k")
    tangents = tuple(torch.randn_like(x) for x in inputs)
    graph = torch.compile(lambda *x: torch.func.jvp(ours, x, tangents), backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(*inputs), torch.func.jvp(oracle, tuple(inputs), tangents))


SLOTS = plan_slots(torch.tensor([0, 2, 1, 0, 2, 2, 0]), [3, 1, 3], 2)


def coarse_keys(heads: int) -> CoarseKeys:
    key, value = torch.randn(2, heads, 3, 4, dtype=torch.float64)
    return CoarseKeys(key, value, torch.rand(3, dtype=torch.float64), torch.arange(3))


def packed(query: Tensor, key: Tensor, value: Tensor, *coarse: Tensor) -> Tensor:
    chosen = torch.tensor([[True, False, True], [False, False, False], [True, True, True]]).expand(1, 2, 3, 3)
    rest = coarse_keys(1)[2:]
    return attend_packed(query[:, :, :3], key, value, chosen, SLOTS, coarse=CoarseKeys(*coarse, *rest))[0]


def slotted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (to_slots(x, SLOTS) for x in (query, key.expand_as(query), value.expand_as(query)))
    chosen = torch.rand(1, 2, len(SLOTS.tile_group), 3, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[..., 0] = True
    return from_slots(attend_slots(q, k, v, chosen, SLOTS, 0.4)[0], SLOTS)


def merged(query: Tensor, output: Tensor, *coarse: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    lse = torch.randn(query.shape[:3], generator=generator, dtype=torch.float64)
    lse[:, :, 0] = -torch.inf
    chosen = torch.rand(*query.shape[:3], 3, generator=generator) < 0.5
    chosen[:, :, 0, 0], chosen[:, :, 1] = False, True
    bias = torch.arange(3, dtype=torch.float64)
    return merge_coarse_keys(query, output, lse, CoarseKeys(*coarse, bias, torch.arange(3)), chosen, 0.4)[0]


def means(x: Tensor) -> Tensor:
    return cell_means(x, Cells(BlockPartition((1, 2, 3), (1, 2, 2), suffix=1), (1, 1, 2)))


def in_slots(x: Tensor) -> Tensor:
    return to_slots(x, SLOTS)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (packed, [(1, 2, 7, 4), (1, 1, 7, 4), (1, 1, 7, 4), (1, 3, 4), (1, 3, 4)]),
        (slotted, [(1, 2, 7, 4), (1, 1, 7, 4), (1, 1, 7, 4)]),
        (merged, [(1, 2, 7, 4), (1, 2, 7, 4), (2, 3, 4), (2, 3, 4)]),
        (means, [(1, 2, 7, 4)]),
        (in_slots, [(1, 2, 7, 4)]),
    ],
)
def test_every_op_has_all_derivatives(op: Callable[..., Tensor], shapes: list[tuple[int, ...]]):
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def same_each_time(*inputs: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return op(*inputs)

    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(same_each_time, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(same_each_time, inputs)


def test_a_transform_is_logged_once_and_nothing_else_is_one(caplog: pytest.LogCaptureFixture):
    query, key, value = tensors(key_heads=4)
    assert not transforms.in_transform(query, None)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        vmoba_attention(query, key, value, PARTITION, TopK(2), dispatch="packed")
        assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.func.jvp(
                lambda x: vmoba_attention(x, key, value, PARTITION, TopK(2), dispatch="packed"), (query,), (query,)
            )
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs in plain PyTorch, at the cost of full attention: torch.func or forward-mode derivatives"
    ]
