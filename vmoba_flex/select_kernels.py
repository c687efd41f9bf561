"""Triton forms of ``selection.select``'s work, loaded on first use on a CUDA device: no sort of a long pool.

Each pair gets a 63-bit rank: its score's bits, made to order like the score, above its place in the pool, counted from
the end. Ranks are distinct and order pairs as the rule does, so a selection is "all ranks from a cut on".

Short pools (the blocks of one query) are sorted in registers. In long pools the cut is found digit by digit: a pass
adds up counts and weights by digit among the pairs that share the digits found so far, and the digit is the first, from
the top, at which a target is reached. All sums are of integers, so atomics do not make them depend on an order.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

SHORT = 1024
_DIGITS = (11, 11, 11, 10, 10, 10)
_PROGRAMS = 528  # four per multiprocessor of an H200: each has sums of its own, which bounds contention
_EVERYTHING, _NOTHING = tl.constexpr(-1), tl.constexpr(-2)
_LARGEST = tl.constexpr(2**63 - 1)


@triton.jit
def _rank(score, place):
    bits = tl.where(score != score, 0x7FC00000, score.to(tl.int32, bitcast=True))
    bits = tl.where(score == 0, 0, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((ordered.to(tl.int64) + 2**31) << 31) | (2**31 - 1 - place.to(tl.int64))


@triton.jit
def _weight(score, low, unit):
    return tl.where(unit == 0, 0, ((score.to(tl.float64) - low) * unit).to(tl.int64))


@triton.jit
def _rest(total, own, tau, one_bits, bounded):
    # Literals and scalar arguments would be float32.
    one = (tl.full((), 1, tl.int64) << one_bits).to(tl.float64)
    share = tl.load(tau)
    reach = tl.ceil(share * (total.to(tl.float64) + one * tl.full((), 1e-6, tl.float64))).to(tl.int64)
    return tl.where(bounded, reach - own, _LARGEST)


@triton.jit
def _short_kernel(
    scores, own, taken, inner, length, stride_outer, stride_inner, stride_entry, own_pools, max_pairs, tau, one_bits,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, POOLS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """One pool a row: ``POOLS`` neighbouring pools, sorted in registers."""
    blocks = tl.cdiv(inner, POOLS)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * POOLS + tl.arange(0, POOLS)
    place = tl.arange(0, LENGTH)[None, :]
    inside = (row < inner)[:, None] & (place < length)
    offset = outer * stride_outer + row[:, None].to(tl.int64) * stride_inner + place * stride_entry
    score = tl.load(scores + offset, mask=inside, other=0.0)
    pool = outer * inner + row
    mine = tl.load(own + (pool % own_pools)[:, None] * length + place, mask=inside, other=0) != 0
    others = inside & (mine == 0)
    ranks = tl.where(others, _rank(score, place), -1)
    sorted_ranks = tl.sort(ranks, descending=True)
    taken_here = sorted_ranks >= 0
    if HAS_CAP:
        taken_here = taken_here & (place < max_pairs - tl.sum(mine.to(tl.int32), 1)[:, None])
    if HAS_TAU:
        finite = tl.sum((inside & (tl.abs(score) < float("inf"))).to(tl.int32), 1) == tl.sum(inside.to(tl.int32), 1)
        value = tl.where(finite[:, None], score, 0.0)
        low = tl.min(tl.where(inside, value, float("inf")), 1).to(tl.float64)
        spread = tl.max(tl.where(inside, value, -float("inf")), 1).to(tl.float64) - low
        one = (tl.full((), 1, tl.int64) << one_bits).to(tl.float64)
        unit = one / tl.where(spread <= tl.full((), 1e-6, tl.float64), 1.0, spread)
        weight = tl.where(inside, _weight(value, low[:, None], unit[:, None]), 0)
        rest = _rest(tl.sum(weight, 1), tl.sum(tl.where(mine, weight, 0), 1), tau, one_bits, finite)
        ordered = ((sorted_ranks >> 31) - 2**31).to(tl.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        sorted_value = tl.where(finite[:, None], bits.to(tl.float32, bitcast=True), 0.0)
        sorted_weight = tl.where(sorted_ranks >= 0, _weight(sorted_value, low[:, None], unit[:, None]), 0)
        taken_here = taken_here & (tl.cumsum(sorted_weight, 1) - sorted_weight < rest[:, None])
    cut = tl.min(tl.where(taken_here, sorted_ranks, _LARGEST), 1)
    tl.store(taken + pool[:, None] * length + place, mine | (others & (ranks >= cut[:, None])), mask=inside)


@triton.jit
def _digit_kernel(
    scores, own, found, low, unit, counts, weights, own_counts, own_weights, length, own_pools, chunk, shift, chunks,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the non-own pairs of a chunk of a pool by their next digit; in the first pass also the own pairs."""
    pool, part = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    sums = tl.program_id(0).to(tl.int64) * (1 << BITS)
    prefix = tl.load(found + pool)
    base, step = tl.load(low + pool), tl.load(unit + pool)
    own_count = tl.zeros((BLOCK,), tl.int64)
    own_weight = tl.zeros((BLOCK,), tl.int64)
    weight = own_weight
    if FIRST or prefix >= 0:
        for start in range(0, chunk, BLOCK):
            place = part * chunk + start + tl.arange(0, BLOCK)
            inside = place < length
            score = tl.load(scores + pool.to(tl.int64) * length + place, mask=inside, other=0.0)
            mine = tl.load(own + (pool % own_pools).to(tl.int64) * length + place, mask=inside, other=0) != 0
            rank = _rank(score, place)
            live = inside & (mine == 0)
            if not FIRST:
                live = live & ((rank >> (shift + BITS)) == prefix)
            digit = ((rank >> shift) & ((1 << BITS) - 1)).to(tl.int32)
            if HAS_CAP:
                tl.atomic_add(counts + sums + digit, tl.full((BLOCK,), 1, tl.int64), mask=live, sem="relaxed")
            if HAS_TAU:
                weight = _weight(score, base, step)
                tl.atomic_add(weights + sums + digit, weight, mask=live, sem="relaxed")
            if FIRST:
                own_count += (inside & mine).to(tl.int64)
                if HAS_TAU:
                    own_weight += tl.where(inside & mine, weight, 0)
    if FIRST:
        tl.store(own_counts + tl.program_id(0), tl.sum(own_count, 0))
        tl.store(own_weights + tl.program_id(0), tl.sum(own_weight, 0))


@triton.jit
def _scan_kernel(
    counts, weights, own_counts, own_weights, found, left_count, left_weight, finite, max_pairs, tau, one_bits, chunks,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Finds the next digit of a pool's cut, and what is left of the targets below it."""
    pool = tl.program_id(0)
    digit = tl.arange(0, 1 << BITS)
    count = tl.zeros((1 << BITS,), tl.int64)
    weight = tl.zeros((1 << BITS,), tl.int64)
    own_count = tl.full((), 0, tl.int64)
    own_weight = tl.full((), 0, tl.int64)
    for part in range(chunks):
        sums = (pool * chunks + part).to(tl.int64) * (1 << BITS)
        if HAS_CAP:
            count += tl.load(counts + sums + digit)
        if HAS_TAU:
            weight += tl.load(weights + sums + digit)
        if FIRST:
            own_count += tl.load(own_counts + pool * chunks + part)
            own_weight += tl.load(own_weights + pool * chunks + part)
    prefix = tl.load(found + pool)
    if FIRST:
        pairs = max_pairs - own_count
        rest = own_weight
        if HAS_TAU:
            rest = _rest(tl.sum(weight, 0) + own_weight, own_weight, tau, one_bits, tl.load(finite + pool) != 0)
    else:
        pairs, rest = tl.load(left_count + pool), tl.load(left_weight + pool)
    above_count, above_weight = tl.cumsum(count, 0, reverse=True), tl.cumsum(weight, 0, reverse=True)
    reached = digit < 0
    none_wanted = pool < 0
    if HAS_CAP:
        reached = reached | (above_count >= pairs)
        none_wanted = none_wanted | (pairs <= 0)
    if HAS_TAU:
        reached = reached | (above_weight >= rest)
        none_wanted = none_wanted | (rest <= 0)
    here = tl.max(tl.where(reached, digit, -1), 0)
    pairs -= tl.sum(tl.where(digit == here, above_count - count, 0), 0)
    rest -= tl.sum(tl.where(digit == here, above_weight - weight, 0), 0)
    if FIRST:
        prefix = tl.full((), 0, tl.int64)
    grown = (prefix << BITS) | here.to(tl.int64)
    if FIRST:
        grown = tl.where(here < 0, _EVERYTHING, grown)
        grown = tl.where(none_wanted, _NOTHING, grown)
    tl.store(found + pool, tl.where(prefix < 0, prefix, grown))
    tl.store(left_count + pool, pairs)
    tl.store(left_weight + pool, rest)


@triton.jit
def _cut_kernel(scores, own, found, taken, length, own_pools, blocks, BLOCK: tl.constexpr):
    """Takes own pairs, and all from the cut on."""
    pool = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    cut = tl.load(found + pool)
    cut = tl.where(cut == _EVERYTHING, 0, tl.where(cut == _NOTHING, _LARGEST, cut))
    score = tl.load(scores + pool * length + place, mask=inside, other=0.0)
    mine = tl.load(own + (pool % own_pools) * length + place, mask=inside, other=0) != 0
    tl.store(taken + pool * length + place, mine | (_rank(score, place) >= cut), mask=inside)


def _share(tau: float | None, like: Tensor) -> Tensor:
    """``tau`` in memory, in float64: a scalar argument would be rounded to float32."""
    return torch.full((), tau or 0.0, dtype=torch.float64, device=like.device)


def take_short(scores: Tensor, own: Tensor, max_pairs: int | None, tau: float | None, one_bits: int) -> Tensor:
    """Takes pairs in pools of at most ``SHORT`` entries.

    Args:
        scores: float32 ``(outer, inner, entries)``, any strides; each ``(outer, inner)`` is a pool.
        own: bool ``(own pools, entries)``, contiguous; pool p has row ``p % own pools``.
        max_pairs: pairs that a pool keeps, or None.
        tau: share of the pool's weight to reach, or None.
        one_bits: fraction bits of the fixed-point weights.

    Returns:
        bool ``(outer * inner, entries)``.
    """
    outer, inner, length = scores.shape
    padded = max(triton.next_power_of_2(length), 2)
    pools = max(1, min(32, 2048 // padded))
    taken = torch.empty(outer * inner, length, dtype=torch.bool, device=scores.device)
    _short_kernel[outer * triton.cdiv(inner, pools),](
        scores, own, taken, inner, length, *scores.stride(), len(own), max_pairs or 0, _share(tau, scores), one_bits,
        HAS_CAP=max_pairs is not None, HAS_TAU=tau is not None, POOLS=pools, LENGTH=padded,
    )  # fmt: skip
    return taken


def take_long(scores: Tensor, own: Tensor, max_pairs: int | None, tau: float | None, one_bits: int) -> Tensor:
    """Takes pairs in pools of any length.

    Args:
        scores: float32 ``(pools, entries)``, contiguous.
        own: as in ``take_short``.
        max_pairs: as in ``take_short``.
        tau: as in ``take_short``.
        one_bits: as in ``take_short``.

    Returns:
        bool ``(pools, entries)``.
    """
    pools, length = scores.shape
    block = 1024
    chunks = max(1, min(triton.cdiv(length, 4 * block), _PROGRAMS // pools))
    chunk = triton.cdiv(triton.cdiv(length, chunks), block) * block

    def per_pool(value: int = 0) -> Tensor:
        return torch.full((pools,), value, dtype=torch.int64, device=scores.device)

    found, left_count, left_weight = per_pool(), per_pool(), per_pool()
    own_counts, own_weights = (torch.empty(pools * chunks, dtype=torch.int64, device=scores.device) for _ in range(2))
    if tau is None:
        low, unit, finite = found, found, found
    else:
        least, most = scores.aminmax(dim=-1)
        low, spread = least.double(), most.double() - least.double()
        finite = spread.isfinite()
        low, unit = low.where(finite, 0), (2.0**one_bits / torch.where(spread <= 1e-6, 1.0, spread)).where(finite, 0)
    flags = {"HAS_CAP": max_pairs is not None, "HAS_TAU": tau is not None}
    share, shift = _share(tau, scores), sum(_DIGITS)
    for i, bits in enumerate(_DIGITS):
        shift -= bits
        shape = (pools * chunks, 2**bits)
        counts, weights = (
            torch.zeros(shape if wanted else 1, dtype=torch.int64, device=scores.device) for wanted in flags.values()
        )
        _digit_kernel[pools * chunks,](
            scores, own, found, low, unit, counts, weights, own_counts, own_weights,
            length, len(own), chunk, shift, chunks, FIRST=i == 0, BITS=bits, BLOCK=block, **flags,
        )  # fmt: skip
        _scan_kernel[pools,](
            counts, weights, own_counts, own_weights, found, left_count, left_weight, finite,
            max_pairs or 0, share, one_bits, chunks, FIRST=i == 0, BITS=bits, **flags,
        )  # fmt: skip
    taken = torch.empty(pools, length, dtype=torch.bool, device=scores.device)
    blocks = triton.cdiv(length, block)
    _cut_kernel[pools * blocks,](scores, own, found, taken, length, len(own), blocks, BLOCK=block)
    return taken
