"""Scores of short pools, the blocks of one query -> the pairs taken; loaded on first use on a CUDA device.

Nothing is sorted. A pool's best pairs are those with a key above its *cutoff*, the key of the last pair taken, and the
first of those with a key equal to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.selection.pair_kernels import bits_of, key_of, rest_of, scale_of, score_of, weight_of
from vmoba_flex.selection.weights import Targets, fraction_bits

# No score has this key: it stands for pairs that do not compete.
_NO_KEY = tl.constexpr(-(2**31))


@QuickLaunch
@triton.jit(do_not_specialize=["max_pairs", "tau_bits"])
def _short_kernel(
    scores, own, taken, inner, length, stride_outer, stride_inner, stride_entry, own_inner, own_entry,
    max_pairs, tau_bits, one_bits,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, STRETCH: tl.constexpr, LENGTH: tl.constexpr, POOLS: tl.constexpr,
):  # fmt: skip
    """Each column is a pool: finds the bits of its cutoff from the top, by adding up the pairs above."""
    blocks = tl.cdiv(inner, POOLS)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * POOLS + tl.arange(0, POOLS)
    place = tl.arange(0, LENGTH)[:, None]
    inside = (place < length) & (column < inner)[None, :]
    # Within a head 32 bits do: it has fewer than 2**31 entries.
    scores += outer * stride_outer
    offset = column[None, :] * stride_inner + place * stride_entry
    own_offset = column[None, :] * own_inner + place * own_entry
    # Let a thread hold much of one pool, and not parts of neighbouring pools, so that few threads add up together.
    score = tl.load(tl.max_contiguous(scores + offset, [1, 1]), mask=inside, other=0.0)
    mine = tl.load(tl.max_contiguous(own + own_offset, [1, 1]), mask=inside, other=0) != 0
    mine = mine & inside
    key = key_of(score)
    pairs = tl.zeros((POOLS,), tl.int32)
    rest = tl.zeros((POOLS,), tl.int64)
    weight = tl.zeros((1, 1), tl.int64)
    if HAS_CAP:
        pairs = max_pairs.to(tl.int32) - tl.sum(mine.to(tl.int32), 0)
    if HAS_TAU:
        least = tl.min(tl.where(inside, key, 0x7FFFFFFF), 0)
        most = tl.max(tl.where(inside, key, -(2**31)), 0)
        low, unit, finite = scale_of(score_of(least), score_of(most), one_bits, STRETCH)
        value = tl.where(finite[None, :], score, 0.0)
        weight = tl.where(inside, weight_of(value, low[None, :], unit[None, :]), 0)
        rest = rest_of(tl.sum(weight, 0), tl.sum(tl.where(mine, weight, 0), 0), tau_bits, one_bits, finite)
    key = tl.where(inside & (mine == 0), key, _NO_KEY)

    # The cutoff is the largest key at which a target is reached, in bits that order as unsigned. Where none is reached,
    # it is _NO_KEY, below all of them.
    cutoff = tl.zeros((POOLS,), tl.int32)
    found = column >= inner
    bit = 31
    while bit >= 0:
        tried = cutoff | (tl.full((), 1, tl.int32) << bit)
        above = key >= (tried ^ _NO_KEY)[None, :]
        reached = column < 0
        exact = column < 0
        if HAS_CAP:
            count = tl.sum(above.to(tl.int32), 0)
            reached = count >= pairs
            exact = count == pairs
        if HAS_TAU:
            held = tl.sum(tl.where(above, weight, 0), 0)
            reached = reached | (held >= rest)
            exact = exact & (held < rest)
        cutoff = tl.where(reached & (found == 0), tried, cutoff)
        # Exactly the wanted pairs are above: the lower bits do not matter.
        found = found | exact
        bit -= 1
        if HAS_CAP:
            bit = tl.where(tl.min(found.to(tl.int32), 0) != 0, -1, bit)
    cutoff = cutoff ^ _NO_KEY
    above = key > cutoff[None, :]
    tied = (key != _NO_KEY) & (key == cutoff[None, :])
    before = tl.cumsum(tied.to(tl.int32), 0) - tied.to(tl.int32)
    if HAS_CAP:
        tied = tied & (before < (pairs - tl.sum(above.to(tl.int32), 0))[None, :])
    if HAS_TAU:
        left = rest - tl.sum(tl.where(above, weight, 0), 0)
        tied = tied & (before.to(tl.int64) * weight < left[None, :])
    taken += outer * length * inner
    chosen = (key == _NO_KEY) | above | tied  # inside a pool, only own pairs have _NO_KEY
    tl.store(tl.max_contiguous(taken + (place * inner + column[None, :]), [1, 1]), chosen, mask=inside)


def shape_of_program(length: int, has_tau: bool) -> tuple[int, int]:
    """Pools and warps of a program, for pools padded to ``length`` entries, a power of two."""
    # A thread keeps 32 keys, or half as many with their weights; more would spill. A short pool stays in one warp, and
    # the longest ones take all 16 warps, few at a time.
    keys_per_warp = 512 if has_tau else 1024
    pools = min(32, max(8, keys_per_warp // length), 16 * keys_per_warp // length)
    return pools, max(1, min(16, length * pools // keys_per_warp))


def take_short(scores: Tensor, own: Tensor, targets: Targets) -> Tensor:
    """Takes pairs in pools of at most ``select.SHORT`` entries.

    Args:
        scores: float32 ``(outer, inner, entries)``, dense in some order of dims; each ``(outer, inner)`` is a pool.
        own: bool ``(inner, entries)``, dense in either order.
        targets: what to keep.

    Returns:
        bool ``(outer, entries, inner)``, contiguous.
    """
    outer, inner, length = scores.shape
    max_pairs, tau, stretch = targets
    padded = max(triton.next_power_of_2(length), 2)
    pools, warps = shape_of_program(padded, tau is not None)
    taken = torch.empty(outer, length, inner, dtype=torch.bool, device=scores.device)
    _short_kernel[outer * triton.cdiv(inner, pools),](
        scores, own, taken, inner, length, *scores.stride(), *own.stride(), max_pairs or 0, bits_of(tau),
        fraction_bits(length), HAS_CAP=max_pairs is not None, HAS_TAU=tau is not None, STRETCH=stretch,
        LENGTH=padded, POOLS=pools, num_warps=warps,
    )  # fmt: skip
    return taken
