"""A permutation of tokens whose gradient gathers, too."""

from typing import Any

import torch
from torch import Tensor


def reorder(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """``x.index_select(dim, index)`` of a permutation, whose gradient gathers by its ``inverse``."""
    return _Reorder.apply(x, index, inverse, dim)


class _Reorder(torch.autograd.Function):
    """A permutation whose gradient is the inverse gather, where ``index_select`` would scatter-add."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
        return x.index_select(dim, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        _, index, inverse, ctx.dim = inputs
        ctx.save_for_backward(index, inverse)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse = ctx.saved_tensors
        return _Reorder.apply(*grads, inverse, index, ctx.dim), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (index,) = ctx.saved_tensors
        return tangents[0].index_select(ctx.dim, index)
