"""One denoise of a pipeline, under full attention or a config: its frames, times, memory and layers."""

import contextlib
import dataclasses
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.checks import check_count
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.frames import frames_of
from vmoba_flex.fidelity.layers import Densities, LayerSteps
from vmoba_flex.models import apply_vmoba
from vmoba_flex.models.handle import VMoBAHandle, models_of
from vmoba_flex.models.steps import counted_step

Prompt = str | Mapping[str, Any]
"""A text, or arguments of a pipeline's call, such as ``{"prompt": ..., "image": ...}``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Denoise:
    """What a denoise gave.

    Attributes:
        frames: uint8 ``(F, H, W, 3)`` on the CPU.
        seconds: of the whole call, with text encoder and decoder.
        step_seconds: of each denoising step; empty where the pipeline tells no steps.
        peak_bytes: most memory that torch held on the accelerator; None without one.
        layers: what each layer attended; empty under full attention.
    """

    frames: Tensor
    seconds: float
    step_seconds: tuple[float, ...]
    peak_bytes: int | None
    layers: tuple[LayerSteps, ...]


@torch.no_grad()
def run_denoise(
    pipe: Any,
    config: VMoBAConfig | None,
    prompt: Prompt,
    seed: int,
    call: Mapping[str, Any] | None = None,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Denoise:
    """Denoises once. The same prompt, seed and call start from the same noise under each config.

    Args:
        pipe: a pipeline that ``apply_vmoba`` takes, without VMoBA applied; it is left so.
        config: what its layers do; None for full attention.
        prompt: a text, or arguments of the call.
        seed: of the noise, which is drawn on the CPU.
        call: further arguments of the pipeline's call.
        progress: called after each step.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if VMoBA is applied already, does not fit the pipeline, or the pipeline returns no pixels.
    """
    check_count("seed", seed)
    arguments = arguments_of(pipe, prompt, call or {})
    arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    check_not_applied(pipe)
    with contextlib.nullcontext() if config is None else apply_vmoba(pipe, config) as handle:
        densities = None if handle is None else Densities(pipe, handle)
        clock = _Clock(pipe, densities, progress)
        with clock.on(), contextlib.nullcontext() if densities is None else densities.on():
            if "callback_on_step_end" in parameters_of(pipe):
                given: Any = arguments.get("callback_on_step_end")
                if hasattr(given, "tensor_inputs"):  # what diffusers asks of its own callbacks, and not of ours
                    arguments.setdefault("callback_on_step_end_tensor_inputs", given.tensor_inputs)
                of_handle = None if handle is None else handle.on_step_end
                arguments["callback_on_step_end"] = clock.callback(given, of_handle)
            _start_memory()
            start = _now()
            output = pipe(**arguments)
            seconds = _now() - start
        frames = frames_of(output)
        layers = () if densities is None else densities.layers()
        return Denoise(frames, seconds, clock.seconds(), _peak_memory(), layers)


def arguments_of(pipe: Any, prompt: Prompt, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, which returns pixels unless ``call`` has another ``output_type``.

    Raises:
        TypeError: if ``prompt`` or ``call`` has a wrong type.
        ValueError: if both have the same argument, or one has the generator.
    """
    if not isinstance(prompt, str | Mapping):
        raise TypeError(f"prompt must be a text or a mapping of arguments, got {prompt!r:.80}")
    if not isinstance(call, Mapping):
        raise TypeError(f"call must be a mapping of arguments, got {call!r:.80}")
    of_prompt = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
    if twice := (of_prompt.keys() & call.keys()) | ({"generator"} & (of_prompt.keys() | call.keys())):
        raise ValueError(f"call must have no argument that prompts or seeds set, got {', '.join(sorted(twice))}")
    if call.get("output_type") == "latent":
        raise ValueError("call must have an output_type of pixels, such as 'np', got 'latent'")
    default = {"output_type": "np"} if "output_type" in parameters_of(pipe) else {}
    return default | of_prompt | dict(call)


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def check_not_applied(pipe: Any) -> None:
    """Raises ``ValueError`` if VMoBA is applied to the pipeline."""
    try:
        VMoBAHandle.of(pipe)
    except ValueError:
        return
    raise ValueError("pipe must not have VMoBA applied, got one that has: call remove() on its handle first")


class _Clock:
    """The time of each step: from the first forward of a step to that of the next, or to the callback.

    Where the pipeline has no callback, its scheduler says when a step begins.
    """

    def __init__(self, pipe: Any, densities: Densities | None, progress: Callable[[], object]) -> None:
        self._pipe, self._densities, self._progress = pipe, densities, progress
        self._marks: list[float] = []
        self._by_callback, self._step, self._end = False, 0, 0.0

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Notes times while it lasts."""
        models = models_of(self._pipe).values()
        hooks = [model.register_forward_pre_hook(self._begin) for model in models]
        hooks += [model.register_forward_hook(self._finish) for model in models]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def callback(self, *others: Callable[..., dict[str, Any]] | None) -> Callable[..., dict[str, Any]]:
        """A ``callback_on_step_end`` that notes the time and calls the others."""
        self._by_callback = True

        def at_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._mark()
            for other in others:
                tensors = tensors if other is None else other(pipe, step, timestep, tensors)
            return tensors

        return at_end

    def seconds(self) -> tuple[float, ...]:
        """Of each step."""
        marks = self._marks
        if not self._by_callback and marks:
            self._progress()
            marks = [*marks, self._end]
        return tuple(after - before for before, after in itertools.pairwise(marks))

    def _begin(self, *_: Any) -> None:
        if not self._marks:
            self._marks.append(_now())
        elif not self._by_callback and (step := counted_step(self._pipe)) is not None and step[0] != self._step:
            self._mark()
            self._step = step[0]

    def _finish(self, *_: Any) -> None:
        if not self._by_callback:
            self._end = _now()

    def _mark(self) -> None:
        self._marks.append(_now())
        if self._densities is not None:
            self._densities.step += 1
        self._progress()


def _now() -> float:
    """Seconds, once the accelerator has done its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _start_memory() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()


def _peak_memory() -> int | None:
    return torch.accelerator.max_memory_allocated() or None if torch.accelerator.is_available() else None
