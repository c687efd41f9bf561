"""Looks up inside a ``mask_mod`` whether a query chose a group of keys."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks.checks import check_tensor

WORD_BITS = 64

PairLookup = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def pack_bits(selected: Tensor) -> Tensor:
    """Packs the last dim into int64 words, entry ``g`` into bit ``g % 64`` of word ``g // 64``.

    Args:
        selected: bool ``(..., G)``.

    Returns:
        int64 ``(..., ceil(G / 64))``; unused bits are 0.

    Raises:
        TypeError: if ``selected`` is no dense bool tensor.
        ValueError: if it has no dim.
    """
    _check(selected)
    return _pack_bits(selected)


def _check(selected: Any) -> None:
    check_tensor("selected", selected, "bool")
    if not selected.dim() or not selected.shape[-1]:
        raise ValueError(f"selected must have at least one group in its last dim, got shape {tuple(selected.shape)}")


# Opaque to Inductor, which on torch 2.11 cannot read the sum of bytes as words.
@torch.library.custom_op("block_masks::pack_bits", mutates_args=())
def _pack_bits(selected: Tensor) -> Tensor:
    groups = selected.shape[-1]
    words = -(-groups // WORD_BITS)
    # Bytes first, and eight of them read as a word (little-endian): eight times less memory than words at once.
    octets = F.pad(selected, (0, words * WORD_BITS - groups)).unflatten(-1, (-1, 8))
    bits = torch.ones((), dtype=torch.uint8, device=selected.device) << torch.arange(8, device=selected.device)
    return torch.where(octets, bits.to(torch.uint8), 0).sum(-1, dtype=torch.uint8).view(torch.int64)


@_pack_bits.register_fake
def _(selected: Tensor) -> Tensor:
    return selected.new_empty(*selected.shape[:-1], -(-selected.shape[-1] // WORD_BITS), dtype=torch.int64)


def pair_lookup(selected: Tensor) -> PairLookup:
    """Returns a function of index tensors ``(b, h, q, g)`` that says whether query ``q`` chose group ``g``.

    A query's choices are packed into 64-bit words: an eighth of the bool table's bytes, and loads per row of a tile
    instead of per pair.

    Args:
        selected: bool ``(B, H, S, G)``.

    Raises:
        TypeError: if ``selected`` is no dense bool tensor.
        ValueError: if it has another number of dims, or the words would have 2**31 entries or more, which compiled
            kernels index wrongly.
    """
    check_tensor("selected", selected, "bool", ("B", "H", "S", "G"))
    *rows, groups = selected.shape
    num_words = math.prod(rows) * -(-groups // WORD_BITS)
    if num_words >= 2**31:
        raise ValueError(
            "selected must pack into fewer than 2**31 words (B * H * S * ceil(G / 64)), "
            f"got shape {tuple(selected.shape)} with {num_words} words"
        )
    return word_lookup(pack_bits(selected))


def word_lookup(words: Tensor) -> PairLookup:
    """The same from the words of ``pack_bits``, int64 ``(B, H, S, ceil(G / 64))``."""

    def lookup(b: Tensor, h: Tensor, q: Tensor, g: Tensor) -> Tensor:
        # Each word is one load per row of a tile. Indexing the word by g would be one per pair, more than the shared
        # memory of a Hopper GPU holds in backward.
        word = words[b, h, q, 0]
        for i in range(1, words.shape[-1]):
            word = torch.where(g >= i * WORD_BITS, words[b, h, q, i], word)
        return ((word >> (g & (WORD_BITS - 1))) & 1) == 1

    return lookup
