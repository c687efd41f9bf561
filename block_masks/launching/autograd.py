"""Autograd of the attention ops, whose backward is an op of its own.

Such an op takes ``tensors`` first, then the list of a plan's tensors, then settings. It returns an output and a
log-sum-exp, which has no gradient. Its backward op takes the output's gradient, these tensors, the output, the
log-sum-exp, the list and the settings, and returns gradients of query, key and value, then of coarse key and value
where there are coarse keys.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def save_of(tensors: int) -> Callable[[Any, tuple[Any, ...], tuple[Tensor, Tensor]], None]:
    """What such an op keeps for backward; ``tensors``: its arguments before the list."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:tensors], *output, *inputs[tensors])
        ctx.mark_non_differentiable(output[1])
        ctx.settings = inputs[tensors + 1 :]

    return save


def grad_of(backward: Callable[..., list[Tensor]], tensors: int) -> Callable[..., tuple[Any, ...]]:
    """The gradients of such an op: of query, key, value, and of the fifth and sixth argument, coarse key and value."""

    def grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # a checkpoint gives them out once
        plan = list(saved[tensors + 2 :])
        grads = backward(grad, *saved[: tensors + 2], plan, *ctx.settings)
        of_coarse = grads[3:] or [None] * 2
        return *grads[:3], None, None, *of_coarse, None, None, [None] * len(plan), *[None] * len(ctx.settings)

    return grad
