"""What sparse steps take over from dense ones: the blocks that hold the mass of full attention."""

import dataclasses
import functools
from typing import Literal, get_args

from vmoba_flex.checks import check_choice, check_positive
from vmoba_flex.dense_schedule import DenseSteps, is_dense_step

Place = Literal["device", "cpu"]
_PLACES: tuple[Place, ...] = get_args(Place)


@dataclasses.dataclass(frozen=True)
class Remember:
    """Layers choose once, from the exact masses of full attention, and keep the choice for the steps that follow.

    Block means only estimate the masses of full attention. A dense step knows them, and they change slowly enough to
    serve the steps that follow (docs/quality.md). The last dense step before sparse ones takes each sparse layer's
    masses, applies the layer's rule to them (``gate="exact"``), and keeps what it chose as bits; where rules change by
    steps, for each rule that follows. Sparse steps attend what is kept. A sparse step with nothing kept chooses by its
    rule's own gate, and logs so once; with ``refresh`` it chooses from its own exact masses, and keeps that.

    A layer keeps choices for each pass of a step: passes are told apart by the names that pipelines give them with
    ``cache_context`` (such as ``"cond"`` and ``"uncond"``), and by their order. Choices are dropped where grid, text,
    batch, heads, dtype, device or rule differ, and at the end of a run.

    Attributes:
        refresh: sparse steps from one choice to the next: each ``refresh``-th sparse step chooses anew, from its own
            exact masses, and then attends sparsely; without dense first steps the first step is one of them. It costs
            about a dense step. None to keep the dense step's choice to the end.
        on: where choices are kept: on the device that they are used on, or on the CPU, copied there and back.
        max_bytes: the most that the choices of one model take; further layers choose by their rule's own gate.

    Raises:
        TypeError: if a value has a wrong type.
        ValueError: if a value is out of range.
    """

    refresh: int | None = None
    on: Place = "device"
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.refresh is not None:
            check_positive("refresh", self.refresh)
        check_choice("on", self.on, _PLACES)
        check_positive("max_bytes", self.max_bytes)


CHOOSES_ONCE = Remember(refresh=1000)
"""For a run, or a second model of one, without a dense step of its own: only the first sparse step chooses, because no
run has more steps."""


@functools.lru_cache(maxsize=4096)  # the same for all layers of a step
def steps_served(refresh: int | None, dense_steps: DenseSteps, step: int | None, num_steps: int | None) -> range:
    """The steps that attend what ``step`` chooses from exact masses, itself among them if it is sparse.

    Args:
        refresh: as in ``Remember``.
        dense_steps: as ``dense_schedule.checked_steps`` returns it.
        step: from 0.
        num_steps: denoising steps in all.

    Returns:
        Sparse steps; empty for a step that keeps nothing.

    Raises:
        ValueError: if ``step`` or ``num_steps`` is None.
    """
    if step is None or num_steps is None:
        raise ValueError(f"step and num_steps must be given where remember is, got {step} and {num_steps}")

    def is_dense(at: int) -> bool:
        return at >= num_steps or is_dense_step(dense_steps, at, num_steps)

    first_sparse = next(at for at in range(num_steps + 1) if at == num_steps or not is_dense(at))

    def is_refresh(at: int) -> bool:
        return refresh is not None and (at - first_sparse) % refresh == 0 and (at > first_sparse or not first_sparse)

    if is_dense(step):
        start = step + 1
    elif is_refresh(step):
        start = step
    else:
        return range(0)
    if is_dense(start):
        return range(0)
    return range(start, next(at for at in range(start + 1, num_steps + 1) if is_dense(at) or is_refresh(at)))
