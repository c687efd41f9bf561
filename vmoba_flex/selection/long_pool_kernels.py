"""Scores of long pools -> the pairs taken, without a sort; loaded on first use on a CUDA device.

1. Pairs are binned by the top bits of their weights: in fixed point if scores are stretched to 0..1, and in float32 if
   they are masses, most of which are small.
2. The counts and bounds of the bins bracket the cutoff, the last pair taken: mostly in one of 128 bins.
3. The pairs in the bracket are listed, and the cutoff is found among them digit by digit, in a pair's *rank*: its key
   followed by its place counted from the end, so that no two ranks are equal.

A pool whose pairs all fall into one bin is listed whole, which takes more time and changes no result. All sums are of
integers, so that atomics give the same result in any order. Nothing is read by the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.selection.bracket_kernels import DIGITS, RECORD, bin_kernel, bracket_kernel, list_kernel, range_kernel
from vmoba_flex.selection.digit_kernels import digit_kernel
from vmoba_flex.selection.pair_kernels import bits_of, key_of
from vmoba_flex.selection.weights import Targets, fraction_bits

_PROGRAMS = 2112  # sixteen per multiprocessor of an H200
_BLOCK = 1024
_BINS = 128


@QuickLaunch
@triton.jit(do_not_specialize=["step"])
def take_kernel(scores, own, state, taken, fields, step, length, own_pools, place_bits, blocks, BLOCK: tl.constexpr):
    """Takes own pairs, and all pairs down to the cutoff."""
    pool = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    cutoff = tl.load(state + pool * fields + DIGITS + step * RECORD)
    cutoff_key = ((cutoff >> place_bits) - 2**31).to(tl.int32)
    last_place = (tl.full((), 1, tl.int64) << place_bits) - 1
    # The place of the cutoff, counted from this block's first.
    cutoff_place = last_place - (cutoff & last_place) - first
    cutoff_place = tl.minimum(tl.maximum(cutoff_place, -1), BLOCK).to(tl.int32)
    here = tl.arange(0, BLOCK)
    inside = here < tl.minimum(length - first, BLOCK).to(tl.int32)
    key = key_of(tl.load(scores + (pool * length + first) + here, mask=inside, other=0.0))
    mine = tl.load(own + ((pool % own_pools) * length + first) + here, mask=inside, other=0) != 0
    chosen = mine | (key > cutoff_key) | ((key == cutoff_key) & (here <= cutoff_place))
    tl.store(taken + (pool * length + first) + here, chosen, mask=inside)


def take_long(scores: Tensor, own: Tensor, targets: Targets) -> Tensor:
    """Takes pairs in pools of any length.

    Args:
        scores: float32 ``(pools, entries)``, contiguous.
        own: bool ``(own pools, entries)``, contiguous; pool p has row ``p % own pools``.
        targets: what to keep.

    Returns:
        bool ``(pools, entries)``.
    """
    (pools, length), own_pools, device = scores.shape, len(own), scores.device
    max_pairs, tau, stretch = targets
    one_bits = fraction_bits(length)
    parts = max(1, min(triton.cdiv(length, _BLOCK), _PROGRAMS // pools))
    chunk = triton.cdiv(triton.cdiv(length, parts), _BLOCK) * _BLOCK
    parts = triton.cdiv(length, chunk)
    list_parts = max(1, min(triton.cdiv(length, 4096), 264 // pools))
    bits = 11 if pools <= 64 else 8  # each pool has sums for every digit: keep them small for many pools
    place_bits = (length - 1).bit_length()
    steps = triton.cdiv(32 + place_bits, bits)
    fields = DIGITS.value + (steps + 1) * RECORD.value
    flags = {"HAS_CAP": max_pairs is not None, "HAS_TAU": tau is not None}
    bin_bits = _BINS.bit_length() - 1

    state = torch.zeros(pools * fields, dtype=torch.int64, device=device)
    counts = torch.zeros(pools * (_BINS + (3 << bits)), dtype=torch.int32, device=device)
    weights = torch.zeros(pools * (3 << bits) if tau is not None else 1, dtype=torch.int64, device=device)
    listed = torch.empty(pools * length, dtype=torch.int32, device=device)
    taken = torch.empty(pools, length, dtype=torch.bool, device=device)
    digit_counts = counts[pools * _BINS :]
    grid = (pools * parts,)
    range_kernel[grid](scores, state, fields, length, chunk, parts, BLOCK=_BLOCK)
    bin_kernel[grid](
        scores, own, state, counts, fields, length, own_pools, chunk, parts, one_bits,
        HAS_TAU=tau is not None, STRETCH=stretch, BIN_BITS=bin_bits, BLOCK=_BLOCK,
    )  # fmt: skip
    bracket_kernel[pools,](
        state, counts, fields, max_pairs or 0, bits_of(tau), one_bits, STRETCH=stretch, BIN_BITS=bin_bits, **flags
    )
    list_kernel[grid](
        scores, own, state, listed, fields, length, own_pools, chunk, parts, one_bits,
        HAS_TAU=tau is not None, STRETCH=stretch, BLOCK=_BLOCK,
    )  # fmt: skip
    for step in range(steps + 1):
        digit_kernel[pools * list_parts,](
            scores, state, listed, digit_counts, weights, fields, length, list_parts, place_bits, one_bits, step, pools,
            STRETCH=stretch, FIRST=step == 0, BITS=bits, BLOCK=1024, **flags,
        )  # fmt: skip
    blocks = triton.cdiv(length, _BLOCK)
    take_kernel[pools * blocks,](
        scores, own, state, taken, fields, steps, length, own_pools, place_bits, blocks, BLOCK=_BLOCK
    )
    return taken
