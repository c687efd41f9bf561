"""Coarse keys merged into any attention that gives its log-sum-exp, such as FlexAttention, as one registered op."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from block_masks.attention import coarse_steps, row_steps
from block_masks.attention.coarse_steps import CoarseKeys, check_coarse_size
from block_masks.attention.packed_checks import check_coarse, check_like_query
from block_masks.attention.plain import plain_merge
from block_masks.checks import check_device, check_finite, check_is, check_positive, check_shape, check_tensor
from block_masks.launching.autograd import differentiable_grads
from block_masks.launching.device import on_device
from block_masks.launching.transforms import in_transform
from block_masks.precision import accumulator


def merge_coarse_keys(
    query: Tensor, output: Tensor, lse: Tensor, coarse: CoarseKeys, selected: Tensor, scale: float, together: int = 1
) -> tuple[Tensor, Tensor]:
    """Attention over chosen groups, and over coarse keys of the others.

    Args:
        query: ``(B, H, S, D)``.
        output: ``(B, H, S, value dim)``, attention over the chosen groups.
        lse: ``(B, H, S)``, its natural log-sum-exp, float32, or float64 for float64 inputs.
        coarse: keys of the groups that were not chosen, of ``B * key heads`` heads.
        selected: bool ``(B, H, rows, G)``: which groups each ``together`` queries chose.
        scale: factor on the scores.
        together: queries to a row of ``selected``.

    Returns:
        The output, differentiable in all floating inputs, and the log-sum-exp, without a gradient.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; on a GPU, if there are more coarse keys than kernels index.
    """
    _check(query, output, lse, coarse, selected, scale, together)
    if query.is_cuda:
        check_coarse_size("coarse", query.shape[0] * query.shape[1], selected.shape[2], len(coarse.bias))
    if in_transform(query, output, lse, *coarse):
        return _plain(query, output, lse, *coarse, selected, scale, together)
    return _merge(query, output, lse, *coarse, selected, scale, together)


def _check(query: Any, output: Any, lse: Any, coarse: Any, selected: Any, scale: Any, together: Any) -> None:
    check_like_query(query, {"output": output})
    check_shape("output", output, (*query.shape[:3], output.shape[3]), "query")
    check_tensor("lse", lse, "float", ("B", "H", "S"))
    check_shape("lse", lse, tuple(query.shape[:3]), "query")
    check_device("lse", lse, query)
    if lse.dtype != accumulator(query):
        raise TypeError(f"lse must be {accumulator(query)} for query's {query.dtype}, got {lse.dtype}")
    check_finite("scale", scale)
    check_positive("together", together)
    check_tensor("selected", selected, "bool", ("B", "H", "rows", "G"))
    check_device("selected", selected, query)
    rows = -(-query.shape[2] // together)
    check_shape("selected", selected, (*query.shape[:2], rows, selected.shape[3]), "query and together")
    check_is("coarse", coarse, CoarseKeys)
    heads = coarse.key.shape[0] // query.shape[0] if isinstance(coarse.key, Tensor) else 0
    check_coarse(coarse, query, heads, output.shape[3], selected.shape[3])
    if not heads or query.shape[1] % heads:
        raise ValueError(f"coarse.key must have heads that divide query's {query.shape[1]}, got {heads} a sample")


@torch.library.custom_op("block_masks::merge_coarse_keys", mutates_args=())
@on_device
def _merge(
    query: Tensor, output: Tensor, lse: Tensor, coarse_key: Tensor, coarse_value: Tensor, coarse_bias: Tensor,
    coarse_group: Tensor, selected: Tensor, scale: float, together: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    coarse = CoarseKeys(coarse_key, coarse_value, coarse_bias, coarse_group)
    query, output, lse = (x.contiguous() for x in (query, output, lse))
    merged, merged_lse = torch.empty_like(output), torch.empty_like(lse)
    flat = [x.flatten(0, 1) for x in (query, output, lse, merged, merged_lse)]
    _modules(query, output)[0].merge_coarse(
        flat[0], coarse, selected.flatten(0, 1), flat[1], flat[2], (flat[3], flat[4]), scale, together
    )
    return merged, merged_lse


@_merge.register_fake
def _(query: Tensor, output: Tensor, lse: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return output.new_empty(output.shape), lse.new_empty(lse.shape)


@torch.library.custom_op("block_masks::merge_coarse_keys_backward", mutates_args=())
@on_device
def _merge_backward(
    grad: Tensor, query: Tensor, output: Tensor, lse: Tensor, coarse_key: Tensor, coarse_value: Tensor,
    coarse_bias: Tensor, coarse_group: Tensor, selected: Tensor, merged: Tensor, merged_lse: Tensor,
    scale: float, together: int,
) -> list[Tensor]:  # fmt: skip
    tail, move = _modules(query, output)
    coarse = CoarseKeys(coarse_key, coarse_value, coarse_bias, coarse_group)
    grad, query, output, lse = (x.contiguous() for x in (grad, query, output, lse))
    delta, grad_query = move.delta(grad, merged), torch.zeros_like(query)
    flat = [x.flatten(0, 1) for x in (query, grad, merged_lse, delta, grad_query)]
    of_coarse = tail.coarse_backward(flat[0], coarse, selected.flatten(0, 1), *flat[1:], scale, together)
    return [grad_query, *tail.split_grad(grad, output, lse, merged_lse, delta), *of_coarse]


@_merge_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:5]]


def _plain(
    query: Tensor, output: Tensor, lse: Tensor, coarse_key: Tensor, coarse_value: Tensor, coarse_bias: Tensor,
    coarse_group: Tensor, selected: Tensor, scale: float, together: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, of_rows, of_lse, chosen = (x.flatten(0, 1) for x in (query, output, lse, selected))
    coarse = CoarseKeys(coarse_key, coarse_value, coarse_bias, coarse_group)
    merged, whole = plain_merge(rows, of_rows, of_lse, coarse, chosen, scale, together)
    return merged.unflatten(0, query.shape[:2]), whole.unflatten(0, query.shape[:2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = inputs[8:]


def _backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        grads = differentiable_grads(lambda *inputs: _plain(*inputs, *ctx.settings)[0], [*saved[:8]], grad)[:5]
    else:
        grads = _merge_backward(grad, *saved, *ctx.settings)
    return *grads, None, None, None, None, None


_merge.register_autograd(_backward, setup_context=_save)


def _modules(query: Tensor, output: Tensor) -> tuple[ModuleType, ModuleType]:
    """What merges coarse keys, and what has ``delta``; Triton is imported on first use."""
    widest = max(query.shape[-1], output.shape[-1])
    if not query.is_cuda or query.dtype == torch.float64 or widest > coarse_steps.MAX_KERNEL_DIM:
        return coarse_steps, row_steps
    from block_masks.attention import coarse_kernels, row_kernels

    return coarse_kernels, row_kernels
