"""Times and memory of calls on a device.

Time: after warm-up, five batches of n calls are queued one behind another with a CUDA event between batches and no host
synchronisation until the last. n comes from a first estimate and makes a batch last about 30 ms: at least 3 calls, or 1
where a call takes 100 ms and more. The result is the median over the batches of the batch's time per call. Launches
overlap with the device's work as they do in a model; where a call's launches take longer than its kernels, their time
is what is measured. Inputs are the same in each call and gradients fresh: nothing is accumulated. A working set that
fits the L2 cache is found there.

Memory: the most that the caching allocator had given out during one call, above what was given out before.
"""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

# On a CPU times are only tried out.
BATCHES = {"cuda": 5, "cpu": 1}
BATCH_MS = {"cuda": 30.0, "cpu": 0.0}


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median time of a call that has been made before."""
    call()
    estimate = batches(call, 1, 1, device)[0]
    calls = min(100, math.ceil(BATCH_MS[device] / max(estimate, 1e-3)))
    least = 3 if device == "cuda" and estimate < 100 else 1
    return median(batches(call, BATCHES[device], max(least, calls), device))


def batches(call: Callable[[], Any], count: int, calls: int, device: str) -> list[float]:
    """Time per call in each batch."""
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
