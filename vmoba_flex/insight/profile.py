"""A GPU's own machine, from calls timed at many sizes and densities: what ``"auto"`` then decides by."""

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vmoba_flex.call import Dispatch
from vmoba_flex.dispatch.machine import HOPPER, VARIABLE, Machine
from vmoba_flex.dispatch.machine_file import write
from vmoba_flex.insight.crossover import Timing, break_even, crossover
from vmoba_flex.rules import TopK
from vmoba_flex.user_error import UserError

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.0625, 0.125, 0.25, 0.5)
DISPATCHES: tuple[Dispatch, ...] = ("packed", "shared", "tiles")


@dataclasses.dataclass(frozen=True)
class Crossover:
    """From where on a dispatch beats full attention.

    Attributes:
        dispatch: ``"packed"``, ``"shared"`` or ``"tiles"``.
        density: share of the blocks that each query attends.
        backward: whether gradients are computed as well.
        tokens: from which it wins, interpolated; None if it loses at the most timed.
    """

    dispatch: str
    density: float
    backward: bool
    tokens: float | None


def profile(
    *,
    tokens: Sequence[int] = TOKENS,
    densities: Sequence[float] = DENSITIES,
    heads: int = 12,
    head_dim: int = 128,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int, Timing], None] = lambda done, of, timing: None,
) -> tuple[Machine, list[Crossover]]:
    """Times all dispatches next to full attention, and finds the machine that these times are of.

    Args:
        tokens: wanted tokens of each video, at least two numbers.
        densities: shares of the blocks that each query attends, at least two.
        heads: of one sample.
        head_dim: of query, key and value.
        device: to run on.
        dtype: of query, key and value.
        progress: called with how many calls have been timed, of how many, and the last.

    Returns:
        The machine, and the crossovers of each dispatch, density, and forward or forward + backward.

    Raises:
        ValueError: if there are fewer than two numbers of tokens or two densities, or one does not fit.
    """
    for name, values in (("tokens", tokens), ("densities", densities)):
        if len(set(values)) < 2:
            raise ValueError(f"{name} must be at least two different numbers, got {list(values)}")
    of, done = 2 * len(tokens) * len(densities) * len(DISPATCHES), itertools.count(1)
    timings, crossovers = {}, []
    for dispatch, density in itertools.product(DISPATCHES, densities):
        found = crossover(
            tokens, TopK(density=density), heads=heads, head_dim=head_dim, dispatch=dispatch, device=device,
            dtype=dtype, progress=lambda timing: progress(next(done), of, timing),
        )  # fmt: skip
        timings[dispatch, density] = found
        for backward in (False, True):
            some = [timing for timing in found if timing.backward == backward]
            crossovers.append(Crossover(dispatch, density, backward, break_even(some)))
    packed = [timing for (dispatch, _), found in timings.items() if dispatch == "packed" for timing in found]
    return machine_from(packed, heads, head_dim), crossovers


def machine_from(packed: Sequence[Timing], heads: int, head_dim: int) -> Machine:
    """The machine that ``"packed"`` and full attention were timed on.

    Rates come from the most tokens, where the GPU is the limit, and launches from the fewest. What it does not time, a
    tail and FlashAttention-4, is an H200's.

    Args:
        packed: at least two densities and two numbers of tokens, forward and forward + backward.
        heads: of all samples.
        head_dim: of query, key and value.
    """
    most, fewest = (pick(timing.tokens for timing in packed) for pick in (max, min))
    large = [timing for timing in packed if timing.tokens == most]
    dense = [statistics.median(one.dense for one in large if one.backward == each) for each in (False, True)]
    points = [(one.density, one.sparse / dense[one.backward]) for one in large]
    slope, constant = statistics.linear_regression(*zip(*points, strict=True))
    launches = [
        min(one.sparse for one in packed if one.tokens == fewest and one.backward == each) for each in (False, True)
    ]
    # Timing noise may put a line through the origin, or level.
    share = (max(constant, 0.01), max(slope, 0.01))
    return dataclasses.replace(
        HOPPER,
        dense_rate=4 * heads * most**2 * head_dim / dense[0],
        backward=dense[1] / dense[0],
        packed_share=share,
        launches=(launches[0], launches[1]),
    )


def write_profile(path: Path, heads: int, head_dim: int, **options: Any) -> list[str]:
    """Writes the machine of the current GPU to a file, and says on stderr how far it is.

    Args:
        path: of the file.
        heads: of one sample.
        head_dim: of query, key and value.
        **options: of ``profile``.

    Returns:
        The crossovers and where the file is, in lines.

    Raises:
        UserError: if the file cannot be written.
    """

    def progress(done: int, of: int, timing: Timing) -> None:
        what = "forward + backward" if timing.backward else "forward"
        words = f"{timing.tokens:,} tokens, density {timing.density:.2g}, {what}: {1e3 * timing.sparse:,.1f} ms"
        sys.stderr.write(f"profile {done} of {of}: {words}\n")

    machine, crossovers = profile(heads=heads, head_dim=head_dim, progress=progress, **options)
    facts = {
        "machine": dataclasses.asdict(machine),
        "units": {"dense_rate": "operations / s", "launches": "s", "flash_from": "s", "crossovers": "tokens"},
        "heads": heads,
        "head_dim": head_dim,
        "crossovers": [dataclasses.asdict(one) for one in crossovers],
    }
    try:
        write(path, facts)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name a file by --profile") from error
    lines = ["wins over full attention from so many tokens on, forward / forward + backward:"]
    for forward, both in zip(crossovers[::2], crossovers[1::2], strict=True):
        shown = " / ".join("never" if one.tokens is None else f"{one.tokens:,.0f}" for one in (forward, both))
        lines.append(f"  {forward.dispatch}, density {forward.density:g}: {shown}")
    return [*lines, f"Profile: {path}. dispatch='auto' reads it from its own folder, or where {VARIABLE} names it."]
