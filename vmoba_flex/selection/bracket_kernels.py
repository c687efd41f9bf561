"""Scores of long pools -> brackets around each pool's cutoff, and lists of the pairs inside, for ``long_pool_kernels``.

The kernels share an int64 record per pool, ``state``: each writes what the next ones read.
"""

import triton
import triton.language as tl

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.selection.pair_kernels import LARGEST, key_of, rest_of, scale_of, score_of, weight_of

# The fields of a pool's state, int64, zero at first. Keys count from -2**31 here, and the smallest key is kept as the
# largest difference of any key to 2**32 - 1.
KEY_MAX, KEY_LACK, TOTAL, OWN_WEIGHT, OWN_COUNT, ABOVE_WEIGHT, ABOVE_COUNT, LISTED, FROM, TO = (
    tl.constexpr(i) for i in range(10)
)
PAIRS, REST, OUTCOME, DIGITS = (tl.constexpr(i) for i in range(10, 14))
# From DIGITS on one record per digit: the lowest rank that the cutoff can have, the bits of its rank still unknown, and
# what is left of the two targets.
RECORD = tl.constexpr(4)
# Bins of masses: by exponent and two bits of mantissa, the last ones up to the bin of 1.
_BIN_SHIFT = tl.constexpr(21)
_ONE_BIN = tl.constexpr(0x3F800000 >> 21)
OPEN, EVERYTHING, NOTHING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KEYS = tl.constexpr(2**32 - 1)


@QuickLaunch
@triton.jit
def range_kernel(scores, state, fields, length, chunk, parts, BLOCK: tl.constexpr):
    """Smallest and largest key of each pool."""
    pool, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first = (tl.program_id(0) % parts).to(tl.int64) * chunk
    least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    most = tl.full((BLOCK,), -(2**31), tl.int32)
    for start in range(0, chunk, BLOCK):
        inside = tl.arange(0, BLOCK) < tl.minimum(length - first - start, BLOCK).to(tl.int32)
        at = scores + (pool.to(tl.int64) * length + first + start)
        key = key_of(tl.load(at + tl.arange(0, BLOCK), mask=inside, other=0.0))
        least = tl.where(inside, tl.minimum(least, key), least)
        most = tl.where(inside, tl.maximum(most, key), most)
    if part * chunk.to(tl.int64) < length:
        here = state + pool.to(tl.int64) * fields
        tl.atomic_max(here + KEY_MAX, tl.max(most, 0).to(tl.int64) + 2**31, sem="relaxed")
        tl.atomic_max(here + KEY_LACK, 2**31 - 1 - tl.min(least, 0).to(tl.int64), sem="relaxed")


@triton.jit
def pool_scale(here, one_bits, STRETCH: tl.constexpr):
    """``scale_of`` a pool."""
    most = score_of((tl.load(here + KEY_MAX) - 2**31).to(tl.int32))
    least = score_of((2**31 - 1 - tl.load(here + KEY_LACK)).to(tl.int32))
    return scale_of(least, most, one_bits, STRETCH)


@triton.jit
def _bin_key(slot, BIN_BITS: tl.constexpr):
    """The smallest key in a bin of masses; the first bin also has smaller ones."""
    return (slot + (_ONE_BIN + 1 - (1 << BIN_BITS))) << _BIN_SHIFT


@QuickLaunch
@triton.jit
def bin_kernel(
    scores, own, state, counts, fields, length, own_pools, chunk, parts, one_bits,
    HAS_TAU: tl.constexpr, STRETCH: tl.constexpr, BIN_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the non-own pairs of each bin, and adds up weights and own pairs."""
    pool, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first = part.to(tl.int64) * chunk
    here = state + pool.to(tl.int64) * fields
    low, unit, _ = pool_scale(here, one_bits, STRETCH)
    total = tl.zeros((BLOCK,), tl.int64)
    own_weight = tl.zeros((BLOCK,), tl.int64)
    own_count = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((1 << BIN_BITS,), tl.int32)
    for start in range(0, chunk, BLOCK):
        inside = tl.arange(0, BLOCK) < tl.minimum(length - first - start, BLOCK).to(tl.int32)
        at = scores + (pool.to(tl.int64) * length + first + start)
        score = tl.load(at + tl.arange(0, BLOCK), mask=inside, other=0.0)
        own_at = own + ((pool % own_pools).to(tl.int64) * length + first + start)
        mine = (tl.load(own_at + tl.arange(0, BLOCK), mask=inside, other=0) != 0) & inside
        weight = weight_of(score, low, unit)
        if STRETCH:
            slot = weight >> (one_bits - BIN_BITS)
        else:
            slot = tl.maximum((key_of(score) >> _BIN_SHIFT) - (_ONE_BIN + 1 - (1 << BIN_BITS)), 0)
        slot = tl.minimum(slot, (1 << BIN_BITS) - 1).to(tl.int32)
        count += tl.histogram(tl.where(inside, slot, 0), 1 << BIN_BITS, mask=inside & (mine == 0))
        own_count += mine.to(tl.int32)
        if HAS_TAU:
            total += tl.where(inside, weight, 0)
            own_weight += tl.where(mine, weight, 0)
    bins = counts + pool.to(tl.int64) * (1 << BIN_BITS) + tl.arange(0, 1 << BIN_BITS)
    tl.atomic_add(bins, count, mask=count > 0, sem="relaxed")
    tl.atomic_add(here + OWN_COUNT, tl.sum(own_count, 0).to(tl.int64), sem="relaxed")
    if HAS_TAU:
        tl.atomic_add(here + TOTAL, tl.sum(total, 0), sem="relaxed")
        tl.atomic_add(here + OWN_WEIGHT, tl.sum(own_weight, 0), sem="relaxed")


@QuickLaunch
@triton.jit(do_not_specialize=["max_pairs", "tau_bits"])
def bracket_kernel(
    state, counts, fields, max_pairs, tau_bits, one_bits,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, STRETCH: tl.constexpr, BIN_BITS: tl.constexpr,
):  # fmt: skip
    """The targets of a pool's non-own pairs, whether its cutoff is known, and else the keys that bracket it."""
    here = state + tl.program_id(0).to(tl.int64) * fields
    low, unit, finite = pool_scale(here, one_bits, STRETCH)
    slot = tl.arange(0, 1 << BIN_BITS)
    count = tl.load(counts + tl.program_id(0).to(tl.int64) * (1 << BIN_BITS) + slot).to(tl.int64)
    pairs = tl.full((), 0, tl.int64)
    rest = pairs
    sure = slot < 0
    possible = slot < 0
    nothing = pairs < 0
    if HAS_CAP:
        pairs = max_pairs - tl.load(here + OWN_COUNT)
        sure = tl.cumsum(count, 0, reverse=True) >= pairs
        possible = sure
        nothing = pairs <= 0
    if HAS_TAU:
        own_weight = tl.load(here + OWN_WEIGHT)
        rest = rest_of(tl.load(here + TOTAL), own_weight, tau_bits, one_bits, finite)
        if STRETCH:
            lowest = slot.to(tl.int64) << (one_bits - BIN_BITS)
            # The largest weight may be one, rounded up.
            top = (tl.full((), 1, tl.int64) << one_bits) + (tl.full((), 1, tl.int64) << (one_bits // 2))
            width = tl.full((), 1, tl.int64) << (one_bits - BIN_BITS)
            highest = tl.where(slot == (1 << BIN_BITS) - 1, top, lowest + width)
        else:
            lowest = tl.where(slot == 0, 0, weight_of(score_of(_bin_key(slot, BIN_BITS)), low, unit))
            highest = weight_of(score_of(_bin_key(slot + 1, BIN_BITS)), low, unit)
        sure = sure | (tl.cumsum(count * lowest, 0, reverse=True) >= rest)
        possible = possible | (tl.cumsum(count * highest, 0, reverse=True) >= rest)
        nothing = nothing | (rest <= 0)
    last, first = tl.max(tl.where(possible, slot, -1), 0), tl.max(tl.where(sure, slot, 0), 0)
    # From the smallest key of the first bin up to that of the bin after the last.
    bounds = tl.where(tl.arange(0, 2) == 0, first, last + 1)
    start = tl.zeros((2,), tl.int64) + (KEYS - tl.load(here + KEY_LACK))
    end = tl.zeros((2,), tl.int64) + (tl.load(here + KEY_MAX) + 1)
    if STRETCH:
        # The smallest keys that have the bins' weights: bisect the pool's keys for both at once.
        goal = tl.where((bounds >> BIN_BITS) != 0, LARGEST, bounds.to(tl.int64) << (one_bits - BIN_BITS))
        for _ in range(33):
            middle = (start + end) // 2
            enough = weight_of(score_of((middle - 2**31).to(tl.int32)), low, unit) >= goal
            open_yet = start < end
            start = tl.where(open_yet & (enough == 0), middle + 1, start)
            end = tl.where(open_yet & enough, middle, end)
    else:
        inner = _bin_key(bounds, BIN_BITS).to(tl.int64) + 2**31
        start = tl.where(bounds == 0, start, tl.where((bounds >> BIN_BITS) != 0, end, inner))
    tl.store(here + FROM + tl.arange(0, 2), start)
    tl.store(here + PAIRS, pairs)
    tl.store(here + REST, rest)
    outcome = tl.where(nothing, NOTHING, tl.where(last < 0, EVERYTHING, OPEN))
    tl.store(here + OUTCOME, outcome.to(tl.int64))


@QuickLaunch
@triton.jit
def list_kernel(
    scores, own, state, listed, fields, length, own_pools, chunk, parts, one_bits,
    HAS_TAU: tl.constexpr, STRETCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists the places of the pairs inside the bracket, and adds up the pairs above it."""
    pool, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first = part.to(tl.int64) * chunk
    here = state + pool.to(tl.int64) * fields
    low, unit, _ = pool_scale(here, one_bits, STRETCH)
    # The largest key, of NaN, is well below 2**31.
    from_key = (tl.load(here + FROM) - 2**31).to(tl.int32)
    to_key = (tl.load(here + TO) - 2**31).to(tl.int32)
    if tl.load(here + OUTCOME) == OPEN:
        above_weight = tl.zeros((BLOCK,), tl.int64)
        above_count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, chunk, BLOCK):
            inside = tl.arange(0, BLOCK) < tl.minimum(length - first - start, BLOCK).to(tl.int32)
            at = scores + (pool.to(tl.int64) * length + first + start)
            score = tl.load(at + tl.arange(0, BLOCK), mask=inside, other=0.0)
            own_at = own + ((pool % own_pools).to(tl.int64) * length + first + start)
            mine = tl.load(own_at + tl.arange(0, BLOCK), mask=inside, other=0) != 0
            key = key_of(score)
            competes = inside & (mine == 0) & (key >= from_key)
            above = competes & (key >= to_key)
            between = (competes & (key < to_key)).to(tl.int32)
            above_count += above.to(tl.int32)
            if HAS_TAU:
                above_weight += tl.where(above, weight_of(score, low, unit), 0)
            before = tl.cumsum(between, 0)
            found = tl.sum(between, 0)
            if found > 0:
                slot = tl.atomic_add(here + LISTED, found.to(tl.int64), sem="relaxed")
                to = listed + (pool.to(tl.int64) * length + slot - 1)
                place = (first + start).to(tl.int32) + tl.arange(0, BLOCK)
                tl.store(to + before, place, mask=between != 0)
        tl.atomic_add(here + ABOVE_COUNT, tl.sum(above_count, 0).to(tl.int64), sem="relaxed")
        if HAS_TAU:
            tl.atomic_add(here + ABOVE_WEIGHT, tl.sum(above_weight, 0), sem="relaxed")
