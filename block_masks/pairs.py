"""Looks up inside a ``mask_mod`` whether a query chose a group of keys."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks.realize import realize

WORD_BITS = 64

PairLookup = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def pack_bits(selected: Tensor) -> Tensor:
    """Packs the last dim into int64 words, entry ``g`` into bit ``g % 64`` of word ``g // 64``.

    Args:
        selected: bool ``(..., G)``.

    Returns:
        int64 ``(..., ceil(G / 64))``; unused bits are 0.
    """
    groups = selected.shape[-1]
    words = -(-groups // WORD_BITS)
    padded = F.pad(selected, (0, words * WORD_BITS - groups)) if words > 1 else selected
    bits = torch.ones((), dtype=torch.int64, device=selected.device) << torch.arange(
        min(groups, WORD_BITS), device=selected.device
    )
    return torch.where(padded.unflatten(-1, (words, -1)), bits, 0).sum(-1)


def pair_lookup(selected: Tensor) -> PairLookup:
    """Returns a function of index tensors ``(b, h, q, g)`` that says whether query ``q`` chose group ``g``.

    One 64-bit word per query is read once per row of a tile instead of once per pair, and the words take an eighth of
    the bool table's bytes.

    Args:
        selected: bool ``(B, H, S, G)``.

    Raises:
        ValueError: if the words would have 2**31 entries or more, which compiled kernels index wrongly.
    """
    *rows, groups = selected.shape
    num_words = math.prod(rows) * -(-groups // WORD_BITS)
    if num_words >= 2**31:
        raise ValueError(
            "selected must pack into fewer than 2**31 words (B * H * S * ceil(G / 64)), "
            f"got shape {tuple(selected.shape)} with {num_words} words"
        )
    words = pack_bits(selected)
    if words.shape[-1] == 1:
        word = realize(words.squeeze(-1))

        def lookup(b: Tensor, h: Tensor, q: Tensor, g: Tensor) -> Tensor:
            return ((word[b, h, q] >> g) & 1) == 1
    else:
        words = realize(words)

        def lookup(b: Tensor, h: Tensor, q: Tensor, g: Tensor) -> Tensor:
            return ((words[b, h, q, g >> 6] >> (g & 63)) & 1) == 1

    return lookup
