"""The model that ships, as a pipeline like those of diffusers: ``apply_vmoba`` takes it, and a call denoises a clip.

B batch, H heads, S tokens, D head dim; F frames, height and width in pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoba_flex.demo import checkpoint
from vmoba_flex.demo.clip import BUNNY, read_clip
from vmoba_flex.demo.denoise import add_noise, frames_of
from vmoba_flex.demo.model import Grid, VideoTransformer
from vmoba_flex.models import Adapter, VMoBAProcessor, register_adapter
from vmoba_flex.user_error import UserError


class DemoPipeline:
    """Denoises a video clip, from any noise level, by the model that ships.

    Attributes:
        transformer: the model.
        scheduler: counts its steps.
    """

    def __init__(self) -> None:
        model, attention, _ = checkpoint.load()
        self.transformer = DemoTransformer(model, attention)
        self.scheduler = FlowSteps()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str = "bunny",
        *,
        first_frame: int = 0,
        num_frames: int = 32,
        height: int = 144,
        width: int = 256,
        level: float = 0.9,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> tuple[Tensor]:
        """The clip with noise added and removed again, by Euler's method.

        Args:
            prompt: the clip: a video file, or ``"bunny"``, which ships; the model was not trained on its first frames.
            first_frame: of the clip.
            num_frames: a multiple of 4.
            height: a multiple of 8; frames are scaled to cover it and cropped.
            width: a multiple of 8.
            level: of the noise, in (0, 1].
            num_inference_steps: from ``level`` to zero.
            generator: of the noise; seed 0 by default.
            callback_on_step_end: called after each step, as by diffusers.

        Returns:
            The frames, float ``(1, F, 3, height, width)`` in [0, 1].

        Raises:
            ValueError: if a size or the level is out of range, or the clip cannot be read.
        """
        for name, size, unit in zip(
            ("num_frames", "height", "width"), (num_frames, height, width), (4, 8, 8), strict=True
        ):
            if size < unit or size % unit:
                raise ValueError(f"{name} must be a multiple of {unit}, got {size}")
        if not 0 < level <= 1:
            raise ValueError(f"level must lie in (0, 1], got {level}")
        path = BUNNY if prompt == "bunny" else Path(prompt)
        if not path.is_file():
            raise UserError(f"prompt must be 'bunny' or a video file for the model that ships, got {prompt!r}")
        clip = read_clip(path, first_frame + num_frames, height, width)[first_frame:]
        video = add_noise(clip, level, generator)
        self.scheduler.set_timesteps(num_inference_steps, level)
        for i, now in enumerate(self.scheduler.timesteps):
            video = self.scheduler.step(self.transformer(video, now[None]), video)
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, now, {})
        return (frames_of(video)[None],)


class FlowSteps:
    """Euler's method on a rectified flow, from a noise level to zero, with the counts of diffusers' schedulers."""

    order = 1

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)
        self.step_index: int | None = None
        self.num_inference_steps: int | None = None

    def set_timesteps(self, count: int, level: float) -> None:
        """Starts a run of ``count`` steps."""
        self.timesteps = level * (1 - torch.arange(count) / count)
        self.step_index, self.num_inference_steps = 0, count

    def step(self, predicted: Tensor, noisy: Tensor) -> Tensor:
        """The video at the next level, from the model's prediction of the clean one."""
        assert self.step_index is not None  # set_timesteps comes first
        now = self.timesteps[self.step_index]
        self.step_index += 1
        after = self.timesteps[self.step_index] if self.step_index < len(self.timesteps) else now.new_zeros(())
        return predicted + after / now * (noisy - predicted)


class FullAttention:
    """Attends everything: the stock processor of a layer."""

    def __call__(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        """``(B, H, S, D)`` of query, key and value of that shape."""
        return F.scaled_dot_product_attention(query, key, value)


class DemoProcessor(VMoBAProcessor):
    """A layer of the model with VMoBA."""

    def __call__(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same as ``FullAttention``, of what the plan says."""
        if self.runs_stock():
            return self.stock(layer, query, key, value, grid)
        return self.attend(query, key, value).unflatten(2, (query.shape[1], -1)).transpose(1, 2)


class _Attention(nn.Module):
    """A layer's attention, by its processor."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = FullAttention()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        return self.processor(self, query, key, value, grid)


class DemoTransformer(VideoTransformer):
    """The model that ships, whose layers have processors: full attention, until ``apply_vmoba`` replaces them."""

    def __init__(self, model: VideoTransformer, attention: Any) -> None:
        with torch.device("meta"):
            super().__init__(model.shape, attention)
        self.load_state_dict(model.state_dict(), assign=True)
        self.requires_grad_(False)
        for block in self.blocks:
            block.attention = _Attention()


def _grid(model: VideoTransformer, arguments: dict[str, Any]) -> Grid:
    t, y, x = (size // part for size, part in zip(arguments["noisy"].shape[2:], model.shape.patch, strict=True))
    return t, y, x


register_adapter(
    "DemoTransformer", Adapter(("blocks.*.attention",), _grid, processor=DemoProcessor, stock=("FullAttention",))
)
