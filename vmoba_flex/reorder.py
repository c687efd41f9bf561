"""A permutation of tokens whose gradient gathers, too."""

from typing import Any

import torch
from torch import Tensor

from block_masks.launching.transforms import transformed


def reorder(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """``x.index_select(dim, index)`` of a permutation, whose gradient gathers by its ``inverse``."""
    if transformed(x):  # a Function with a jvp would not compile
        return x.index_select(dim, index)
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

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse = ctx.saved_tensors
        return _Reorder.apply(*grads, inverse, index, ctx.dim), None, None, None
