"""Dense attention, and attention of tiles that share a choice, by others, for comparison with ours."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.common.machine import error_text
from vmoba_flex import BlockPartition, vmoba_mask, vmoba_selection
from vmoba_flex.rules import Rule

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


@dataclasses.dataclass(frozen=True)
class TilePeer:
    """Attention in which each tile of queries attends some tiles of keys, as they lie in memory.

    Ours needs tokens sorted and padded for that, and chooses; here both are done before, and not timed.

    Attributes:
        load: imports it and returns a maker of calls; raises ``ImportError`` where it is not installed.
        tile: queries, and keys, of a tile.
    """

    load: Callable[[], Callable[[BlockPartition, Rule], Attend]]
    tile: int


def _full_tiles() -> Callable[[BlockPartition, Rule], Attend]:
    """FlexAttention with a mask of full tiles; compiled on a GPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        output = flex_attention(query, key, value, block_mask=mask)
        assert isinstance(output, Tensor)
        return output

    call = torch.compile(attend, fullgraph=True, dynamic=False) if torch.cuda.is_available() else attend
    return lambda partition, rule: _chosen_first(
        call, lambda query, key: vmoba_mask(query, key, partition, rule, choice="tile")
    )


def _fastvideo() -> Callable[[BlockPartition, Rule], Attend]:
    """FastVideo's kernel of block-sparse attention, its own list of blocks included."""
    from fastvideo_kernel import block_sparse_attn  # pyright: ignore[reportMissingImports]

    def attend(query: Tensor, key: Tensor, value: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
        return block_sparse_attn(query, key, value, *chosen)[0]

    def make(partition: BlockPartition, rule: Rule) -> Attend:
        tile = partition.block[2]

        def choose(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            chosen = vmoba_selection(query, key, partition, rule, choice="tile")[:, :, ::tile]
            return chosen.contiguous(), partition.block_sizes(query.device).int()

        return _chosen_first(attend, choose)

    return make


def _chosen_first(attend: Callable[..., Tensor], choose: Callable[[Tensor, Tensor], Any]) -> Attend:
    """A call that chooses on its first inputs only."""
    made: list[Any] = []

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not made:
            with torch.no_grad():
                made.append(choose(query.detach(), key.detach()))
        return attend(query, key, value, made[0])

    return call


TILE_PEERS = {
    "FlexAttention, full tiles": TilePeer(_full_tiles, 128),
    "FastVideo": TilePeer(_fastvideo, 64),
}


def why_missing(peer: Peer | TilePeer) -> str | None:
    """The error of loading a peer; None if it loads."""
    # Importing others' packages fails in many ways, such as by another package's version.
    try:
        peer.load()
    except Exception as error:
        return error_text(error)
    return None
