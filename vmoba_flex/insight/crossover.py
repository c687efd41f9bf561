"""Where sparse attention starts to win on this machine."""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.attention import vmoba_attention
from vmoba_flex.call import Dispatch
from vmoba_flex.checks import check_positive, is_int
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.inputs import check_is_device, check_rule
from vmoba_flex.rules import Rule
from vmoba_flex.tail import Tail

_FRAMES = 8
_REPEATS = 5
_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times at one number of tokens.

    Attributes:
        tokens: of the video.
        backward: whether gradients are computed as well.
        dense: seconds of full attention, by torch's fastest kernel.
        sparse: seconds of sparse attention, which includes choosing the blocks.
        density: share of the pairs that sparse attention chose.
    """

    tokens: int
    backward: bool
    dense: float
    sparse: float
    density: float


def crossover(
    tokens: Sequence[int],
    rule: Rule,
    *,
    heads: int = 12,
    head_dim: int = 128,
    dispatch: Dispatch = "packed",
    tail: Tail | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Timing], None] = lambda _: None,
) -> list[Timing]:
    """Times full and sparse attention, forward and forward + backward, on random query, key and value.

    Each video has 8 square frames, the nearest to the wanted number of tokens, in about 48 windows. A time is the
    median of 5 calls from Python, or of those that fit in 5 seconds, after one that is not counted.

    Args:
        tokens: wanted tokens of each video, at least 512.
        rule: ``TopK`` or ``Threshold``.
        heads: of one sample.
        head_dim: of query, key and value.
        dispatch: of sparse attention.
        tail: of sparse attention.
        device: to run on.
        dtype: of query, key and value.
        progress: called with each timing as it is known.

    Returns:
        Forward and forward + backward for each number of tokens.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if ``tokens`` are none, or one is below 512.
    """
    if not isinstance(tokens, list | tuple) or not all(map(is_int, tokens)):
        raise TypeError(f"tokens must be a list of ints, got {tokens!r}")
    check_rule(rule)
    check_is_device("device", device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if not callable(progress):
        raise TypeError(f"progress must be a function, got {progress!r}")
    if not tokens or min(tokens) < 512:
        raise ValueError(f"tokens must be at least one number of 512 or more, got {list(tokens)}")
    check_positive("heads", heads)
    check_positive("head_dim", head_dim)
    timings = []
    for count, backward in itertools.product(tokens, (False, True)):
        partition = VMoBAConfig.paper("training").partition("spatial", grid_of(count))
        shape, generator = (1, heads, partition.num_tokens, head_dim), torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        leaves = [x.requires_grad_(backward) for x in (q, k, v)]
        attend = functools.partial(vmoba_attention, q, k, v, partition, rule)
        _, stats = attend(dispatch=dispatch, return_stats=True)
        calls = functools.partial(attend, dispatch="dense"), functools.partial(attend, dispatch=dispatch, tail=tail)
        dense, sparse = (_seconds(call, leaves, backward) for call in calls)
        timings.append(Timing(partition.num_tokens, backward, dense, sparse, stats.density.mean().item()))
        progress(timings[-1])
    return timings


def grid_of(tokens: int) -> tuple[int, int, int]:
    """The grid that ``crossover`` times for a wanted number of tokens."""
    side = round(math.sqrt(tokens / _FRAMES))
    return _FRAMES, side, side


def break_even(timings: Sequence[Timing]) -> float | None:
    """The number of tokens from which sparse attention wins, up to the largest timed; None if it loses there.

    Between two timings the ratio is interpolated as a power of the number of tokens.

    Args:
        timings: of forward only, or of forward + backward only.
    """
    ordered = sorted(timings, key=lambda timing: timing.tokens)
    ratios = [math.log(timing.sparse / timing.dense) for timing in ordered]
    losing = [i for i, ratio in enumerate(ratios) if ratio >= 0]
    if not losing:
        return float(ordered[0].tokens)
    last = losing[-1]
    if last == len(ordered) - 1:
        return None
    share = ratios[last] / (ratios[last] - ratios[last + 1])
    below, above = (math.log(ordered[i].tokens) for i in (last, last + 1))
    return math.exp(below + share * (above - below))


def _seconds(call: Callable[[], Any], tensors: list[Tensor], backward: bool) -> float:
    upstream = torch.randn_like(tensors[0])
    times = []
    while len(times) < 2 or (len(times) <= _REPEATS and sum(times) < _SECONDS):
        _wait(tensors[0])
        start = time.perf_counter()
        output = call()
        if backward:
            torch.autograd.grad(output, tensors, upstream)
        _wait(tensors[0])
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
