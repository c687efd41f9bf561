"""Triton kernels that find the cut of long pools, exactly and without a sort; loaded on first use on a CUDA device.

A pool's pairs are binned by the top bits of their weights. Counts per bin, and the bins' bounds, bracket the bins in
which the cut must lie, mostly one of 128. The pairs of these are listed, and the cut is found among them digit by
digit in a pair's *rank*: its key, above its place counted from the end, so that ranks are distinct. A pool of which
all pairs fall into one bin is listed whole, which costs more time and changes no result.

All sums are of integers, so atomics do not make them depend on an order. Nothing is read by the host.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoba_flex.select_kernels import LARGEST, bits_of, key_of, rest_of, scale_of, score_of, weight_of

_PROGRAMS = 2112  # sixteen per multiprocessor of an H200
_BLOCK = 1024
_BINS = 128
# What the kernels tell each other about a pool, int64, zero at first. Keys are counted from -2**31 here; the smallest is
# kept as the most that any lacks to 2**32 - 1.
_KEY_MAX, _KEY_LACK, _TOTAL, _OWN_WEIGHT, _OWN_COUNT, _ABOVE_WEIGHT, _ABOVE_COUNT, _LISTED, _FROM, _TO = (
    tl.constexpr(i) for i in range(10)
)
_PAIRS, _REST, _OUTCOME, _DIGITS = (tl.constexpr(i) for i in range(10, 14))
# One record per digit from _DIGITS on: the lowest rank that the cut can have, the bits of rank still open, and what is
# left of the two targets.
_RECORD = tl.constexpr(4)
_OPEN, _EVERYTHING, _NOTHING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KEYS = tl.constexpr(2**32 - 1)


@triton.jit
def _range_kernel(scores, state, fields, length, chunk, parts, BLOCK: tl.constexpr):
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
        tl.atomic_max(here + _KEY_MAX, tl.max(most, 0).to(tl.int64) + 2**31, sem="relaxed")
        tl.atomic_max(here + _KEY_LACK, 2**31 - 1 - tl.min(least, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _pool_scale(here, one_bits):
    most = score_of((tl.load(here + _KEY_MAX) - 2**31).to(tl.int32))
    least = score_of((2**31 - 1 - tl.load(here + _KEY_LACK)).to(tl.int32))
    return scale_of(least, most, one_bits)


@triton.jit
def _bin_kernel(
    scores, own, state, counts, fields, length, own_pools, chunk, parts, one_bits,
    HAS_TAU: tl.constexpr, BIN_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the non-own pairs of each bin, and adds up weights and own pairs."""
    pool, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first = part.to(tl.int64) * chunk
    here = state + pool.to(tl.int64) * fields
    low, unit, _ = _pool_scale(here, one_bits)
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
        bin = tl.minimum(weight >> (one_bits - BIN_BITS), (1 << BIN_BITS) - 1).to(tl.int32)
        count += tl.histogram(tl.where(inside, bin, 0), 1 << BIN_BITS, mask=inside & (mine == 0))
        own_count += mine.to(tl.int32)
        if HAS_TAU:
            total += tl.where(inside, weight, 0)
            own_weight += tl.where(mine, weight, 0)
    bins = counts + pool.to(tl.int64) * (1 << BIN_BITS) + tl.arange(0, 1 << BIN_BITS)
    tl.atomic_add(bins, count, mask=count > 0, sem="relaxed")
    tl.atomic_add(here + _OWN_COUNT, tl.sum(own_count, 0).to(tl.int64), sem="relaxed")
    if HAS_TAU:
        tl.atomic_add(here + _TOTAL, tl.sum(total, 0), sem="relaxed")
        tl.atomic_add(here + _OWN_WEIGHT, tl.sum(own_weight, 0), sem="relaxed")


@triton.jit(do_not_specialize=["max_pairs", "tau_bits"])
def _bracket_kernel(
    state, counts, fields, max_pairs, tau_bits, one_bits,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, BIN_BITS: tl.constexpr,
):  # fmt: skip
    """The targets of a pool's non-own pairs, what is known of the cut, and the keys among which it lies."""
    here = state + tl.program_id(0).to(tl.int64) * fields
    low, unit, finite = _pool_scale(here, one_bits)
    bin = tl.arange(0, 1 << BIN_BITS)
    count = tl.load(counts + tl.program_id(0).to(tl.int64) * (1 << BIN_BITS) + bin).to(tl.int64)
    pairs = tl.full((), 0, tl.int64)
    rest = pairs
    sure = bin < 0
    possible = bin < 0
    nothing = pairs < 0
    if HAS_CAP:
        pairs = max_pairs - tl.load(here + _OWN_COUNT)
        sure = tl.cumsum(count, 0, reverse=True) >= pairs
        possible = sure
        nothing = pairs <= 0
    if HAS_TAU:
        own_weight = tl.load(here + _OWN_WEIGHT)
        rest = rest_of(tl.load(here + _TOTAL), own_weight, tau_bits, one_bits, finite)
        lowest = bin.to(tl.int64) << (one_bits - BIN_BITS)
        # The largest weight may be one, rounded up.
        top = (tl.full((), 1, tl.int64) << one_bits) + (tl.full((), 1, tl.int64) << (one_bits // 2))
        width = tl.full((), 1, tl.int64) << (one_bits - BIN_BITS)
        highest = tl.where(bin == (1 << BIN_BITS) - 1, top, lowest + width)
        sure = sure | (tl.cumsum(count * lowest, 0, reverse=True) >= rest)
        possible = possible | (tl.cumsum(count * highest, 0, reverse=True) >= rest)
        nothing = nothing | (rest <= 0)
    last, first = tl.max(tl.where(possible, bin, -1), 0), tl.max(tl.where(sure, bin, 0), 0)
    from_weight = first.to(tl.int64) << (one_bits - BIN_BITS)
    to_weight = tl.where(last == (1 << BIN_BITS) - 1, LARGEST, (last + 1).to(tl.int64) << (one_bits - BIN_BITS))

    # The smallest keys with these weights, by bisection of the pool's keys, both at once.
    goal = tl.where(tl.arange(0, 2) == 0, from_weight, to_weight)
    start = tl.zeros((2,), tl.int64) + (_KEYS - tl.load(here + _KEY_LACK))
    end = tl.zeros((2,), tl.int64) + (tl.load(here + _KEY_MAX) + 1)
    for _ in range(33):
        middle = (start + end) // 2
        enough = weight_of(score_of((middle - 2**31).to(tl.int32)), low, unit) >= goal
        open_yet = start < end
        start = tl.where(open_yet & (enough == 0), middle + 1, start)
        end = tl.where(open_yet & enough, middle, end)
    tl.store(here + _FROM + tl.arange(0, 2), start)
    tl.store(here + _PAIRS, pairs)
    tl.store(here + _REST, rest)
    outcome = tl.where(nothing, _NOTHING, tl.where(last < 0, _EVERYTHING, _OPEN))
    tl.store(here + _OUTCOME, outcome.to(tl.int64))


@triton.jit
def _list_kernel(
    scores, own, state, listed, fields, length, own_pools, chunk, parts, one_bits,
    HAS_TAU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists the places of the pairs among which the cut lies, and adds up the pairs above these."""
    pool, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first = part.to(tl.int64) * chunk
    here = state + pool.to(tl.int64) * fields
    low, unit, _ = _pool_scale(here, one_bits)
    # A pool's keys end well below 2**31, that of NaN being the largest.
    from_key = (tl.load(here + _FROM) - 2**31).to(tl.int32)
    to_key = (tl.load(here + _TO) - 2**31).to(tl.int32)
    if tl.load(here + _OUTCOME) == _OPEN:
        above_weight = tl.zeros((BLOCK,), tl.int64)
        above_count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, chunk, BLOCK):
            inside = tl.arange(0, BLOCK) < tl.minimum(length - first - start, BLOCK).to(tl.int32)
            at = scores + (pool.to(tl.int64) * length + first + start)
            score = tl.load(at + tl.arange(0, BLOCK), mask=inside, other=0.0)
            own_at = own + ((pool % own_pools).to(tl.int64) * length + first + start)
            mine = tl.load(own_at + tl.arange(0, BLOCK), mask=inside, other=0) != 0
            key = key_of(score)
            live = inside & (mine == 0) & (key >= from_key)
            above = live & (key >= to_key)
            between = (live & (key < to_key)).to(tl.int32)
            above_count += above.to(tl.int32)
            if HAS_TAU:
                above_weight += tl.where(above, weight_of(score, low, unit), 0)
            before = tl.cumsum(between, 0)
            found = tl.sum(between, 0)
            if found > 0:
                slot = tl.atomic_add(here + _LISTED, found.to(tl.int64), sem="relaxed")
                to = listed + (pool.to(tl.int64) * length + slot - 1)
                place = (first + start).to(tl.int32) + tl.arange(0, BLOCK)
                tl.store(to + before, place, mask=between != 0)
        tl.atomic_add(here + _ABOVE_COUNT, tl.sum(above_count, 0).to(tl.int64), sem="relaxed")
        if HAS_TAU:
            tl.atomic_add(here + _ABOVE_WEIGHT, tl.sum(above_weight, 0), sem="relaxed")


@triton.jit
def _before_first_digit(here, place_bits, HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr):
    """The record before any digit is known: the cut is among the listed pairs, or known."""
    outcome = tl.load(here + _OUTCOME)
    lowest = tl.load(here + _FROM)
    keys = tl.load(here + _TO) - 1 - lowest
    bits = tl.full((), 0, tl.int32)
    while (keys >> bits) > 0:
        bits += 1
    lowest = tl.where(outcome == _EVERYTHING, 0, tl.where(outcome == _NOTHING, _KEYS, lowest))
    pairs = tl.load(here + _PAIRS)
    rest = tl.load(here + _REST)
    if HAS_CAP:
        pairs -= tl.load(here + _ABOVE_COUNT)
    if HAS_TAU:
        rest -= tl.load(here + _ABOVE_WEIGHT)
    return lowest << place_bits, tl.where(outcome == _OPEN, bits + place_bits, 0).to(tl.int64), pairs, rest


@triton.jit
def _after_digit(
    record, counts, weights, HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """The record after the digit of which these are the counts and weights."""
    lowest, bits = tl.load(record), tl.load(record + 1)
    pairs, rest = tl.load(record + 2), tl.load(record + 3)
    if bits > 0:
        shift = tl.maximum(bits - BITS, 0)
        digit = tl.arange(0, 1 << BITS)
        count = tl.load(counts + digit).to(tl.int64)
        reached = digit < 0
        if HAS_CAP:
            above = tl.cumsum(count, 0, reverse=True)
            reached = reached | (above >= pairs)
        if HAS_TAU:
            weight = tl.load(weights + digit)
            above_weight = tl.cumsum(weight, 0, reverse=True)
            reached = reached | (above_weight >= rest)
        last = tl.max(tl.where(reached, digit, -1), 0)
        if HAS_CAP:
            pairs -= tl.sum(tl.where(digit == last, above - count, 0), 0)
        if HAS_TAU:
            rest -= tl.sum(tl.where(digit == last, above_weight - weight, 0), 0)
        # Never reached, which the first digit alone can show: everything is taken.
        lowest = tl.where(last < 0, 0, lowest + (last.to(tl.int64) << shift))
        # A digit of one pair: the cut is that pair, and its lower digits do not matter.
        alone = tl.sum(tl.where(digit == last, count, 0), 0) <= 1
        bits = tl.where(alone | (last < 0), 0, shift)
    return lowest, bits, pairs, rest


@triton.jit(do_not_specialize=["step"])
def _digit_kernel(
    scores, state, listed, counts, weights, fields, length, parts, place_bits, one_bits, step, pools,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds a digit of the cut's rank from its sums, and adds up the listed pairs that share it by their next digit.

    Every program of a pool finds the digit anew, which takes less time than a launch. Three sets of sums take turns:
    one is read, one added to, one zeroed for the next step.
    """
    pool, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    here = state + pool.to(tl.int64) * fields
    record = here + _DIGITS + step * _RECORD
    sums = pool.to(tl.int64) * (1 << BITS)
    turn = (tl.full((), 1, tl.int64) << BITS) * pools
    if FIRST:
        lowest, bits, pairs, rest = _before_first_digit(here, place_bits, HAS_CAP, HAS_TAU)
    else:
        old = sums + turn * ((step + 2) % 3)
        lowest, bits, pairs, rest = _after_digit(record - _RECORD, counts + old, weights + old, HAS_CAP, HAS_TAU, BITS)
    if part == 0:
        digit = tl.arange(0, 1 << BITS)
        next_sums = sums + turn * ((step + 1) % 3)
        tl.store(counts + next_sums + digit, tl.zeros((1 << BITS,), tl.int32))
        if HAS_TAU:
            tl.store(weights + next_sums + digit, tl.zeros((1 << BITS,), tl.int64))
        tl.store(record, lowest)
        tl.store(record + 1, bits)
        tl.store(record + 2, pairs)
        tl.store(record + 3, rest)
    if bits > 0:
        low, unit, _ = _pool_scale(here, one_bits)
        number = tl.load(here + _LISTED)
        shift = tl.maximum(bits - BITS, 0)
        last_place = (tl.full((), 1, tl.int64) << place_bits) - 1
        now = sums + turn * (step % 3)
        for start in range(part * BLOCK, number, parts * BLOCK):
            at = start + tl.arange(0, BLOCK).to(tl.int64)
            place = tl.load(listed + pool.to(tl.int64) * length + at, mask=at < number, other=0).to(tl.int64)
            score = tl.load(scores + pool.to(tl.int64) * length + place, mask=at < number, other=0.0)
            rank = ((key_of(score).to(tl.int64) + 2**31) << place_bits) | (last_place - place)
            live = (at < number) & (rank >= lowest) & (((rank - lowest) >> bits) == 0)
            digit = tl.where(live, (rank - lowest) >> shift, 0).to(tl.int32)
            tl.atomic_add(counts + now + digit, tl.full((BLOCK,), 1, tl.int32), mask=live, sem="relaxed")
            if HAS_TAU:
                tl.atomic_add(weights + now + digit, weight_of(score, low, unit), mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["step"])
def _take_kernel(scores, own, state, taken, fields, step, length, own_pools, place_bits, blocks, BLOCK: tl.constexpr):
    """Takes own pairs, and all from the cut on."""
    pool = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    cut = tl.load(state + pool * fields + _DIGITS + step * _RECORD)
    cut_key = ((cut >> place_bits) - 2**31).to(tl.int32)
    last_place = (tl.full((), 1, tl.int64) << place_bits) - 1
    # The place of the cut, counted from this block's first.
    cut_place = last_place - (cut & last_place) - first
    cut_place = tl.minimum(tl.maximum(cut_place, -1), BLOCK).to(tl.int32)
    here = tl.arange(0, BLOCK)
    inside = here < tl.minimum(length - first, BLOCK).to(tl.int32)
    key = key_of(tl.load(scores + (pool * length + first) + here, mask=inside, other=0.0))
    mine = tl.load(own + ((pool % own_pools) * length + first) + here, mask=inside, other=0) != 0
    chosen = mine | (key > cut_key) | ((key == cut_key) & (here <= cut_place))
    tl.store(taken + (pool * length + first) + here, chosen, mask=inside)


def take_long(scores: Tensor, own: Tensor, max_pairs: int | None, tau: float | None, one_bits: int) -> Tensor:
    """Takes pairs in pools of any length.

    Args:
        scores: float32 ``(pools, entries)``, contiguous.
        own: bool ``(own pools, entries)``, contiguous; pool p has row ``p % own pools``.
        max_pairs: pairs that a pool keeps, own ones included; None for no cap.
        tau: share of the pool's weight to reach; None for no target.
        one_bits: fraction bits of the fixed-point weights.

    Returns:
        bool ``(pools, entries)``.
    """
    (pools, length), own_pools, device = scores.shape, len(own), scores.device
    parts = max(1, min(triton.cdiv(length, _BLOCK), _PROGRAMS // pools))
    chunk = triton.cdiv(triton.cdiv(length, parts), _BLOCK) * _BLOCK
    parts = triton.cdiv(length, chunk)
    list_parts = max(1, min(triton.cdiv(length, 4096), 264 // pools))
    bits = 11 if pools <= 64 else 8  # a set of sums per pool: keep them small where there are many
    place_bits = (length - 1).bit_length()
    steps = triton.cdiv(32 + place_bits, bits)
    fields = _DIGITS.value + (steps + 1) * _RECORD.value
    flags = {"HAS_CAP": max_pairs is not None, "HAS_TAU": tau is not None}
    targets = (max_pairs or 0, bits_of(tau), one_bits)
    bin_bits = _BINS.bit_length() - 1

    state = torch.zeros(pools * fields, dtype=torch.int64, device=device)
    counts = torch.zeros(pools * (_BINS + (3 << bits)), dtype=torch.int32, device=device)
    weights = torch.zeros(pools * (3 << bits) if tau is not None else 1, dtype=torch.int64, device=device)
    listed = torch.empty(pools * length, dtype=torch.int32, device=device)
    taken = torch.empty(pools, length, dtype=torch.bool, device=device)
    digit_counts = counts[pools * _BINS :]
    grid = (pools * parts,)
    _range_kernel[grid](scores, state, fields, length, chunk, parts, BLOCK=_BLOCK)
    _bin_kernel[grid](
        scores, own, state, counts, fields, length, own_pools, chunk, parts, one_bits,
        HAS_TAU=tau is not None, BIN_BITS=bin_bits, BLOCK=_BLOCK,
    )  # fmt: skip
    _bracket_kernel[pools,](state, counts, fields, *targets, BIN_BITS=bin_bits, **flags)
    _list_kernel[grid](
        scores, own, state, listed, fields, length, own_pools, chunk, parts, one_bits,
        HAS_TAU=tau is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    for step in range(steps + 1):
        _digit_kernel[pools * list_parts,](
            scores, state, listed, digit_counts, weights, fields, length, list_parts, place_bits, one_bits, step, pools,
            FIRST=step == 0, BITS=bits, BLOCK=1024, **flags,
        )  # fmt: skip
    blocks = triton.cdiv(length, _BLOCK)
    _take_kernel[pools * blocks,](
        scores, own, state, taken, fields, steps, length, own_pools, place_bits, blocks, BLOCK=_BLOCK
    )
    return taken
