"""Listed pairs of long pools -> each pool's cutoff, digit by digit, for ``long_pool_kernels``."""

import triton
import triton.language as tl

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.selection.bracket_kernels import (
    ABOVE_COUNT,
    ABOVE_WEIGHT,
    DIGITS,
    EVERYTHING,
    FROM,
    KEYS,
    LISTED,
    NOTHING,
    OPEN,
    OUTCOME,
    PAIRS,
    RECORD,
    REST,
    TO,
    pool_scale,
)
from vmoba_flex.selection.pair_kernels import key_of, weight_of


@triton.jit
def _before_first_digit(here, place_bits, HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr):
    """The record before the first digit: the cutoff is one of the listed pairs, or known already."""
    outcome = tl.load(here + OUTCOME)
    lowest = tl.load(here + FROM)
    keys = tl.load(here + TO) - 1 - lowest
    bits = tl.full((), 0, tl.int32)
    while (keys >> bits) > 0:
        bits += 1
    lowest = tl.where(outcome == EVERYTHING, 0, tl.where(outcome == NOTHING, KEYS, lowest))
    pairs = tl.load(here + PAIRS)
    rest = tl.load(here + REST)
    if HAS_CAP:
        pairs -= tl.load(here + ABOVE_COUNT)
    if HAS_TAU:
        rest -= tl.load(here + ABOVE_WEIGHT)
    return lowest << place_bits, tl.where(outcome == OPEN, bits + place_bits, 0).to(tl.int64), pairs, rest


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
        weight = tl.zeros((1 << BITS,), tl.int64)
        above, above_weight = weight, weight
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
        # No digit reaches a target, which only the first digit can show: everything is taken.
        lowest = tl.where(last < 0, 0, lowest + (last.to(tl.int64) << shift))
        # A digit of one pair: the cutoff is that pair, and its lower digits do not matter.
        single = tl.sum(tl.where(digit == last, count, 0), 0) <= 1
        bits = tl.where(single | (last < 0), 0, shift)
    return lowest, bits, pairs, rest


@QuickLaunch
@triton.jit(do_not_specialize=["step"])
def digit_kernel(
    scores, state, listed, counts, weights, fields, length, parts, place_bits, one_bits, step, pools,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, STRETCH: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds a digit of the cutoff's rank from its sums, and sums the pairs that share it by their next digit.

    Every program of a pool finds the same digit, which takes less time than a launch. Three sets of sums take turns:
    one is read, one added to, one zeroed for the next step.
    """
    pool, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    here = state + pool.to(tl.int64) * fields
    record = here + DIGITS + step * RECORD
    sums = pool.to(tl.int64) * (1 << BITS)
    turn = (tl.full((), 1, tl.int64) << BITS) * pools
    if FIRST:
        lowest, bits, pairs, rest = _before_first_digit(here, place_bits, HAS_CAP, HAS_TAU)
    else:
        old = sums + turn * ((step + 2) % 3)
        lowest, bits, pairs, rest = _after_digit(record - RECORD, counts + old, weights + old, HAS_CAP, HAS_TAU, BITS)
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
        low, unit, _ = pool_scale(here, one_bits, STRETCH)
        number = tl.load(here + LISTED)
        shift = tl.maximum(bits - BITS, 0)
        last_place = (tl.full((), 1, tl.int64) << place_bits) - 1
        now = sums + turn * (step % 3)
        for start in range(part * BLOCK, number, parts * BLOCK):
            at = start + tl.arange(0, BLOCK).to(tl.int64)
            place = tl.load(listed + pool.to(tl.int64) * length + at, mask=at < number, other=0).to(tl.int64)
            score = tl.load(scores + pool.to(tl.int64) * length + place, mask=at < number, other=0.0)
            rank = ((key_of(score).to(tl.int64) + 2**31) << place_bits) | (last_place - place)
            competes = (at < number) & (rank >= lowest) & (((rank - lowest) >> bits) == 0)
            digit = tl.where(competes, (rank - lowest) >> shift, 0).to(tl.int32)
            tl.atomic_add(counts + now + digit, tl.full((BLOCK,), 1, tl.int32), mask=competes, sem="relaxed")
            if HAS_TAU:
                tl.atomic_add(weights + now + digit, weight_of(score, low, unit), mask=competes, sem="relaxed")
