"""What a GPU and its host do in a second, measured in a few hundred milliseconds."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from vmoba_flex.dispatch.dense import dense_attention

_HEADS, _TOKENS, _DIM = 8, 8192, 128  # enough work for each multiprocessor, and 0.4 to 4 ms on GPUs of these years
_CALLS, _LAUNCHES = 5, 200


def probe(device: torch.device) -> tuple[float, float]:
    """Operations per second of full attention in bfloat16, and the seconds in which the host launches one operation.

    Medians of five. It waits for the GPU, in a thread of its own, which has no autocast, checkpoint or default device.

    Raises:
        RuntimeError: if the GPU cannot: its memory is full, say.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_probe, device).result()


@torch.inference_mode()
def _probe(device: torch.device) -> tuple[float, float]:
    torch.cuda.set_device(device)
    x = torch.randn(1, _HEADS, _TOKENS, _DIM, dtype=torch.bfloat16, device=device)
    small = torch.zeros(1, device=device)

    def attend() -> None:
        dense_attention(x, x, x, None, False)
        torch.cuda.synchronize(device)

    def launch() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1)

    attention = _median(attend, lambda: None)
    launches = _median(launch, lambda: torch.cuda.synchronize(device))
    return 4 * _HEADS * _TOKENS**2 * _DIM / attention, launches / _LAUNCHES


def _median(call: Callable[[], None], wait: Callable[[], None]) -> float:
    """Seconds of a call, the median of some after one that is not counted; ``wait`` comes after each, uncounted."""
    times = []
    for _ in range(_CALLS + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        wait()
    return statistics.median(times[1:])
