"""Times and memory of calls on a device.

Time: the median over five batches of a batch's time per call. After warm-up, batches of n calls are queued one after
another, with a CUDA event between batches and no host synchronisation until the last. n comes from a first estimate and
makes a batch last about 30 ms: at least 3 calls, or 1 where a call takes 100 ms or more. Launches overlap with the
device's work as they do in a model; where a call's launches take longer than its kernels, the launches are what is
measured. Inputs are the same in each call; gradients are fresh, and nothing is accumulated. A working set that fits the
L2 cache stays in it.

Memory: the most that the caching allocator had given out during one call, above what it had given out before.
"""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

# On a CPU the timing is only tried out.
BATCHES = {"cuda": 5, "cpu": 1}
BATCH_MS = {"cuda": 30.0, "cpu": 0.0}


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median milliseconds of a call that has been made before."""
    call()
    estimate = batches(call, 1, 1, device)[0]
    calls = min(100, math.ceil(BATCH_MS[device] / max(estimate, 1e-3)))
    least = 3 if device == "cuda" and estimate < 100 else 1
    return median(batches(call, BATCHES[device], max(least, calls), device))


def batches(call: Callable[[], Any], count: int, calls: int, device: str) -> list[float]:
    """Milliseconds per call in each batch."""
    cuda = device == "cuda"
    marks: list[Any] = []

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    if cuda:
        torch.cuda.synchronize()
    mark()
    for _ in range(count):
        for _ in range(calls):
            call()
        mark()
    if cuda:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / calls for start, end in pairwise(marks)]
    return [1e3 * (end - start) / calls for start, end in pairwise(marks)]


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The most bytes allocated during the call, above those before it; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
