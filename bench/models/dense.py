"""What replaces diffusers' call of attention: dense attention by others, or none."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.rows import FLASH_4, NONE, Attention


@contextlib.contextmanager
def attending(transformer: nn.Module, attention: Attention) -> Iterator[None]:
    """Replaces the self-attention of a stock transformer by ``attention`` inside the with block.

    Cross-attention stays as it is. Masks of text padding are dropped: all text tokens are valid, and dense attention is
    faster without a mask. With ``NONE`` the values are the output.

    Args:
        transformer: of diffusers, its attention backend already set.
        attention: a dense one, or ``NONE``.
    """
    module: Any = importlib.import_module(type(transformer).__module__)
    stock: Callable[..., Tensor] = module.dispatch_attention_fn
    skip = attention.name == NONE.name
    flash = _flash_4() if attention.name == FLASH_4.name else None

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.shape == key.shape:
            if skip:
                return value
            if flash is not None:
                return flash(query.contiguous(), key.contiguous(), value.contiguous())[0]
        return stock(query, key, value, **options)

    module.dispatch_attention_fn = attend
    try:
        yield
    finally:
        module.dispatch_attention_fn = stock


@functools.cache
def _flash_4() -> Callable[..., tuple[Tensor, Tensor]]:
    """FlashAttention-4 over ``(B, S, H, D)`` as an op, which ``torch.compile`` does not look into.

    diffusers has a backend "flash_4_hub", which downloads its kernels and has no such op.
    """
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # pyright: ignore[reportMissingImports]

    @torch.library.custom_op("vmoba_bench::flash_4", mutates_args=())
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, lse, *_ = _flash_attn_fwd(query, key, value, return_lse=True)
        return output, lse

    @forward.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, _ = query.shape
        return torch.empty_like(query).contiguous(), query.new_empty((batch, heads, tokens), dtype=torch.float32)

    @torch.library.custom_op("vmoba_bench::flash_4_backward", mutates_args=())
    def backward(
        query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _flash_attn_bwd(query, key, value, output, grad.contiguous(), lse)
        return grads[0], grads[1], grads[2]

    @backward.register_fake
    def _(
        query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    def gradients(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return backward(*ctx.saved_tensors, grad)

    forward.register_autograd(gradients, setup_context=keep)
    return forward
