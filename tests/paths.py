"""Every way to run VMoBA, as functions of one problem, for the properties that all of them must have."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from block_masks import Slots, to_slots
from tests.strategies import Problem
from vmoba_flex import reference, reference_gates, vmoba_attention, vmoba_inputs, vmoba_mask, vmoba_selection
from vmoba_flex.call import Call
from vmoba_flex.dispatch.one_device import attend_here
from vmoba_flex.dispatch.shared import shared_attention
from vmoba_flex.groups import block_slots
from vmoba_flex.selection.tiles import choose_by_tiles, choose_tiles

Path = Callable[[Problem], Tensor]


def untraced_flex_attention(*tensors: Tensor, **options: Any) -> Any:
    """``flex_attention``, not traced where it runs eagerly, by torch's own switch.

    Eager calls trace themselves anew for each shape, which takes a second and runs the same operations.
    """
    if torch.compiler.is_compiling():
        return flex_attention(*tensors, **options)
    with mock.patch("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):
        return flex_attention(*tensors, **options)


def through_mask(token_order: str, tile_size: int = 16, choice: str = "token") -> Path:
    """``flex_attention`` with ``vmoba_mask``, on tokens in ``token_order``."""

    def path(problem: Problem) -> Tensor:
        partition, tensors = problem.partition, (problem.query, problem.key, problem.value)
        if token_order == "block":
            tensors = tuple(partition.to_block_order(x) for x in tensors)
        query, key, value = tensors
        options: Any = {"token_order": token_order, "tile_size": tile_size, "choice": choice}
        options["text_lengths"] = problem.text_lengths
        score_mod = None
        if problem.tail is None:
            mask = vmoba_mask(query, key, partition, problem.rule, **options)
        else:
            inputs = vmoba_inputs(query, key, value, partition, problem.rule, tail=problem.tail, **options)
            key, value, mask, score_mod = inputs
        gqa = {"scale": problem.scale, "enable_gqa": problem.gqa}
        output = untraced_flex_attention(query, key, value, block_mask=mask, score_mod=score_mod, **gqa)
        assert isinstance(output, Tensor)
        return partition.to_raster_order(output) if token_order == "block" else output

    return path


def attend(problem: Problem, **options: Any) -> Any:
    """``vmoba_attention`` of a problem."""
    tensors = (problem.query, problem.key, problem.value)
    fixed: Any = {"scale": problem.scale, "enable_gqa": problem.gqa, "text_lengths": problem.text_lengths}
    if problem.tail is not None:
        fixed["tail"] = problem.tail
    rule = None if "selection" in options else problem.rule
    return vmoba_attention(*tensors, problem.partition, rule, **fixed, **options)


def through_attention(dispatch: str, backend: str = "auto") -> Path:
    """``vmoba_attention`` with one dispatch."""

    def path(problem: Problem) -> Tensor:
        return attend(problem, dispatch=dispatch, backend=backend)

    return path


def through_shared(tile_size: int, backend: str = "eager") -> Path:
    """The dispatch ``"shared"`` with tiles small enough for several in a block."""

    def path(problem: Problem) -> Tensor:
        tensors = (problem.query, problem.key, problem.value)
        call = Call(
            problem.partition, problem.rule, problem.scale, problem.gqa, problem.text_lengths, tail=problem.tail
        )
        if problem.partition.causal_frames is None:
            return shared_attention(*tensors, call, backend, tile_size).output
        in_tiles = functools.partial(shared_attention, tile_size=tile_size)
        with mock.patch("vmoba_flex.dispatch.one_device.shared_attention", in_tiles):  # each chunk in a call
            return attend_here(*tensors, call, "shared", backend).output  # pyright: ignore[reportArgumentType]

    return path


SPARSE_PATHS: dict[str, Path] = {
    "mask, raster order": through_mask("raster"),
    "mask, block order": through_mask("block"),
    "mask, tiles choose": through_mask("block", choice="tile"),
    "attention, tiles": through_attention("tiles"),
    "attention, packed": through_attention("packed"),
    "attention, shared": through_attention("shared"),
    "shared, tiles of 4": through_shared(4),
}
# Paths whose queries choose together, and how many of them.
TILE_SIZES = {"mask, tiles choose": 128, "attention, shared": 128, "shared, tiles of 4": 4}


def expected_mask(problem: Problem, tile_size: int | None = None) -> Tensor:
    """The reference's mask for the library's own selection, which the selection's tests hold to the oracles."""
    if tile_size is None:
        selection = vmoba_selection(problem.query, problem.key, problem.partition, problem.rule)
    else:
        selection = shared_selection(problem, tile_size)
    return reference.attention_mask(selection, problem.partition, problem.text_lengths)


def full_mask(problem: Problem) -> Tensor:
    """The mask of full attention, which keeps out nothing but padding."""
    partition = problem.partition
    shape = (*problem.query.shape[:2], partition.num_video_tokens, partition.num_blocks)
    everything = torch.ones(shape, dtype=torch.bool, device=problem.query.device)
    return reference.attention_mask(everything, partition, problem.text_lengths)


def shared_choice(problem: Problem, tile_size: int = 128) -> tuple[Tensor, Slots]:
    """What each query tile attends in the dispatch ``"shared"``, and the slots of these tiles."""
    slots = block_slots(problem.partition, problem.query.device, tile_size)
    query_slots = to_slots(problem.query, slots)
    return choose_tiles(query_slots, problem.key, problem.partition, problem.rule, slots), slots


def shared_selection(problem: Problem, tile_size: int) -> Tensor:
    """That choice for each video token: bool ``(B, H, video tokens, N)`` in raster order."""
    partition = problem.partition
    tiles = reference.shared_tiles(reference_gates.ids_of(partition), tile_size)
    selected = choose_by_tiles(problem.query, problem.key, partition, problem.rule, tile_size)
    return selected[:, :, tiles.to(selected.device)]


def low_precision(problem: Problem, mask: Tensor | None) -> Tensor:
    """Dense masked attention in the inputs' own dtype: its error is the budget of the paths in that dtype."""
    return torch.nn.functional.scaled_dot_product_attention(
        problem.query, problem.key, problem.value, attn_mask=mask, scale=problem.scale, enable_gqa=problem.gqa
    )


def exact(problem: Problem, mask: Tensor | None) -> Tensor:
    """Dense masked attention by the reference, in float64."""
    return reference.attention(problem.query, problem.key, problem.value, mask, problem.scale)[0]


def outputs_and_gradients(path: Path, problem: Problem, upstream: Tensor) -> list[Tensor]:
    """The output of a path and its gradients in query, key and value, for one upstream gradient."""
    problem = problem.with_leaves()
    output = path(problem)
    grads = torch.autograd.grad(output, (problem.query, problem.key, problem.value), upstream.to(output.dtype))
    return [output.detach(), *grads]


def largest_logit(problem: Problem) -> float:
    """The largest magnitude of a product of a query and a key, scaled as attention scales it."""
    query, key = problem.query.double(), problem.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    return float((query @ key.mT).abs().max() * abs(scale))


def assert_within_budget(
    actual: list[Tensor], low: list[Tensor], exact: list[Tensor], factor: float = 2.0, logit: float = 0.0
) -> None:
    """Holds each tensor's error to ``factor`` times the low-precision reference's own, both in the maximum norm.

    Rounding the exact result to the tensor's dtype is always granted: a lucky reference may hit it exactly. So is
    float32's rounding of a sum over the head dim of products as large as the results: gradients are differences of such
    sums, and where they cancel, as with only one key, the reference may take them in an order that leaves nothing. And
    so is float32's rounding of logits and log-sum-exps as large as ``logit``: it moves each weight by that times eps.
    """
    largest = max(truth.abs().max() for truth in exact)
    names = ("output", "dquery", "dkey", "dvalue")[: len(actual)]
    for name, x, reference_low, truth in zip(names, actual, low, exact, strict=True):
        error, budget = (x.double() - truth).abs().max(), (reference_low.double() - truth).abs().max()
        float32 = torch.finfo(torch.float32).eps * (x.shape[-1] + logit) * largest
        rounding = torch.finfo(x.dtype).eps * truth.abs().max() + float32
        assert error <= factor * (budget + rounding), f"{name}: error {error:.3g}, budget {budget:.3g} + {rounding:.3g}"


def assert_equals_dense_masked_attention(path: Path, problem: Problem, upstream: Tensor, mask: Tensor) -> None:
    """Holds a path's output and gradients to those of dense attention with ``mask``."""
    actual = outputs_and_gradients(path, problem, upstream)
    low = outputs_and_gradients(functools.partial(low_precision, mask=mask), problem, upstream)
    truth = outputs_and_gradients(functools.partial(exact, mask=mask), problem.to(torch.float64), upstream)
    assert_within_budget(actual, low, truth, logit=largest_logit(problem))


def assert_captured_graph_replays(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Callable[[int], list[Tensor]]
) -> None:
    """Holds replays of a CUDA graph of output and gradients, with fresh inputs, to eager runs, bit for bit.

    Args:
        attend: query, key and value -> output.
        inputs: a seed -> query, key, value and the output's gradient, on a GPU.
    """
    *leaves, upstream = inputs(0)
    for x in leaves:
        x.requires_grad_()

    def step() -> list[Tensor]:
        output = attend(*leaves)
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            for target, x in zip((*leaves, upstream), inputs(seed), strict=True):
                target.copy_(x)
        graph.replay()
        for x, y in zip(captured, step(), strict=True):
            assert torch.equal(x, y)
