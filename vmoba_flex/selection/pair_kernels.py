"""A score -> its key and weight, and a pool's sums -> its target: Triton functions that the selection's kernels share.

A score's *key* is an int32 from its bits that orders like the score. NaNs have the highest key; both zeros have the
same one.
"""

import struct

import triton
import triton.language as tl

LARGEST = tl.constexpr(2**63 - 1)


@triton.jit
def key_of(score):
    """A score's bits as an int32 that orders like the score."""
    bits = tl.where(score != score, 0x7FC00000, score.to(tl.int32, bitcast=True))
    bits = tl.where(score == 0, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(key):
    """The score with this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(least, most, one_bits, STRETCH: tl.constexpr):
    """A pool's score of weight 0, its weight per unit of score, and whether it is finite; both are 0 if it is not."""
    # Literals would be float32.
    finite = (tl.abs(least) < float("inf")) & (tl.abs(most) < float("inf"))
    low = tl.where(finite, least, 0.0).to(tl.float64)
    spread = tl.where(finite, most, 0.0).to(tl.float64) - low
    one = (tl.full((), 1, tl.int64) << one_bits).to(tl.float64)
    if not STRETCH:
        low, spread = low * 0, spread * 0  # a spread this small counts as 1
    unit = one / tl.where(spread <= tl.full((), 1e-6, tl.float64), tl.full((), 1, tl.float64), spread)
    return low, tl.where(finite, unit, tl.full((), 0, tl.float64)), finite


@triton.jit
def weight_of(score, low, unit):
    """Fixed-point weight, as in ``weights.scaled_weights``; it does not fall as the key rises."""
    return tl.where(unit == 0, 0, ((score.to(tl.float64) - low) * unit).to(tl.int64))


@triton.jit
def rest_of(total, own, tau_bits, one_bits, finite):
    """What a pool's non-own pairs must reach. ``tau_bits`` are tau's, since Triton would pass a float as float32."""
    one = (tl.full((), 1, tl.int64) << one_bits).to(tl.float64)
    share = tl.cast(tau_bits, tl.int64).to(tl.float64, bitcast=True)
    reach = tl.ceil(share * (total.to(tl.float64) + one * tl.full((), 1e-6, tl.float64))).to(tl.int64)
    return tl.where(finite, reach - own, LARGEST)


def bits_of(tau: float | None) -> int:
    """The bits of ``tau`` in float64, as an int."""
    return struct.unpack("<q", struct.pack("<d", tau or 0.0))[0]
