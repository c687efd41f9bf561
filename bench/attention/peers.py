"""Dense attention by others, for comparison with ours."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench.common.machine import error_text

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """Dense attention over ``(B, H, S, D)``.

    Attributes:
        load: imports it and returns the call; raises ``ImportError`` where it is not installed.
        context: surrounds all calls; entering it is not timed.
        fast: whether it may be the fastest dense attention, and so is measured on every shape.
    """

    load: Callable[[], Attend]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    fast: bool = False


def _sdpa(backend: SDPBackend, fast: bool = False) -> Peer:
    return Peer(lambda: torch.nn.functional.scaled_dot_product_attention, functools.partial(sdpa_kernel, backend), fast)


@functools.cache
def flex() -> Attend:
    """FlexAttention without a mask; compiled on a GPU. With fullgraph it never falls back to S x S scores."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = flex_attention(query, key, value)
        assert isinstance(output, Tensor)
        return output

    return torch.compile(attend, fullgraph=True, dynamic=False) if torch.cuda.is_available() else attend


def _flash_attention_4() -> Attend:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return _tokens_first(flash_attn_func)


def _xformers() -> Attend:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return _tokens_first(memory_efficient_attention)


def _tokens_first(function: Callable[..., Any]) -> Attend:
    """Wraps attention over ``(B, S, H, D)``; the transpositions are views."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = function(*(x.transpose(1, 2) for x in (query, key, value)))
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return attend


PEERS = {
    "FlashAttention-4": Peer(_flash_attention_4, fast=True),
    "cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION, fast=True),
    "FlexAttention": Peer(flex),
    "FlashAttention-2": _sdpa(SDPBackend.FLASH_ATTENTION),
    "memory-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "xformers": Peer(_xformers),
}
# Of these PyTorch's own flash kernel is the fastest on a CPU.
CPU_PEERS = {
    "FlashAttention-2": _sdpa(SDPBackend.FLASH_ATTENTION, fast=True),
    "FlexAttention": PEERS["FlexAttention"],
    "xformers": PEERS["xformers"],
}


def why_missing(peer: Peer) -> str | None:
    """The error of loading a peer; None if it loads."""
    # Importing others' packages fails in many ways, such as by another package's version.
    try:
        peer.load()
    except Exception as error:
        return error_text(error)
    return None
