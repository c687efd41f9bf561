"""Autograd of the attention ops, whose backward is an op of its own.

Such an op takes ``tensors`` first, then the list of a plan's tensors, then settings. It returns an output and a
log-sum-exp, which has no gradient. Its backward op takes the output's gradient, these tensors, the output, the
log-sum-exp, the list and the settings, and returns gradients of query, key and value, then of coarse key and value
where there are coarse keys. It has no derivative itself: with ``create_graph=True`` the gradients are taken through the
same attention in plain PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from block_masks.launching.transforms import log_plain


def save_of(tensors: int) -> Callable[[Any, tuple[Any, ...], tuple[Tensor, Tensor]], None]:
    """What such an op keeps for backward; ``tensors``: its arguments before the list."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:tensors], *output, *inputs[tensors])
        ctx.mark_non_differentiable(output[1])
        ctx.settings = inputs[tensors + 1 :]

    return save


def grad_of(
    backward: Callable[..., list[Tensor]], tensors: int, plain: Callable[..., Tensor]
) -> Callable[..., tuple[Any, ...]]:
    """The gradients of such an op: of query, key, value, and of the sixth and seventh argument, coarse key and value.

    Args:
        backward: the backward op.
        tensors: arguments of the op before the list.
        plain: the output of the op from its arguments, in plain PyTorch.
    """

    def grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # a checkpoint gives them out once
        plan = list(saved[tensors + 2 :])
        if torch.is_grad_enabled():
            settings = (plan, *ctx.settings)
            of_all = differentiable_grads(lambda *inputs: plain(*inputs, *settings), [*saved[:tensors]], grad)
            grads = [*of_all[:3], *of_all[5:7]]
        else:
            grads = backward(grad, *saved[: tensors + 2], plan, *ctx.settings)
        of_coarse = grads[3:] or [None] * 2
        return *grads[:3], None, None, *of_coarse, None, None, [None] * len(plan), *[None] * len(ctx.settings)

    return grad


def differentiable_grads(
    plain: Callable[..., Tensor], inputs: list[Tensor | None], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``plain``'s inputs that want one, which have derivatives themselves; None for the others."""
    log_plain("derivatives of gradients (create_graph=True)")
    # Views, so that an input that another one was made from gets its own part only.
    views = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    wanted = [x for x in views if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(plain(*views), wanted, grad, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in views]
