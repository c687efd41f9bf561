"""Windows of the clips: random ones to train on, and fixed held-out ones that no training window comes near.

Both clips are split in time. Between a held-out stretch and training frames of the same clip lie eight unused frames;
in ``bikes`` the held-out stretch is also a shot of its own. No window spans a cut.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vmoba_flex.demo.model import to_model_range

LEVELS = 8
"""Noise levels of the held-out loss: the middles of this many equal parts of [0, 1]."""

# By this share consecutive steps cover the levels evenly, wherever they begin.
_GOLDEN = 0.6180339887498949


class Stretch(NamedTuple):
    """Frames ``first`` to ``end - 1`` of a clip."""

    clip: str
    first: int
    end: int


TRAINING = (
    Stretch("bigbuckbunny", 46, 132),
    Stretch("bikes", 30, 76),
    Stretch("bikes", 76, 137),
    Stretch("bikes", 137, 187),
)
# The first is what the demo's clip begins with (bench/quality/make_clip.py).
HELD_OUT = (Stretch("bigbuckbunny", 6, 38), Stretch("bikes", 195, 227))


class Sample(NamedTuple):
    """What one step sees: noisy = (1 - level) * video + level * noise.

    Attributes:
        noisy: float32 ``(1, 3, frames, height, width)``.
        level: float32 ``(1,)``.
        video: like noisy.
    """

    noisy: Tensor
    level: Tensor
    video: Tensor


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of one size from the clips.

    Attributes:
        clips: uint8 ``(frames, 3, height, width)`` by name, on the training device.
        frames: of a window; at most 32.
        height: rows of a window.
        width: columns of a window.
    """

    clips: dict[str, Tensor]
    frames: int
    height: int
    width: int

    @property
    def device(self) -> torch.device:
        """The device of the clips."""
        return next(iter(self.clips.values())).device

    def training(self, seed: int, step: int) -> Sample:
        """The sample of a step: a function of seed and step only, so that a run can go on anywhere."""
        random = np.random.default_rng((seed, step))
        starts = [stretch.end - stretch.first - self.frames + 1 for stretch in TRAINING]
        place = int(random.integers(sum(starts)))
        index = int(np.searchsorted(np.cumsum(starts), place, side="right"))
        stretch = TRAINING[index]
        first = stretch.first + place - sum(starts[:index])
        zoom = random.uniform(1, self._largest_zoom(stretch.clip))
        down, across = random.uniform(size=2)
        video = self._window(stretch.clip, first, zoom, down, across)
        if random.integers(2):
            video = video.flip(-1)
        # In double precision: a float32 product would lose the level's digits after a few thousand steps.
        level = _GOLDEN * (step + 7 * seed) % 1
        return self._noised(video, level, int(random.integers(2**62)))

    def held_out(self) -> list[tuple[str, Tensor]]:
        """The clip's name and the video of each held-out window: as large as fits, at the left and at the right."""
        return [
            (stretch.clip, self._window(stretch.clip, stretch.first, self._largest_zoom(stretch.clip), 0.5, across))
            for stretch in HELD_OUT
            for across in (0.0, 1.0)
        ]

    def held_out_samples(self, level: int | None = None) -> list[tuple[str, int, Sample]]:
        """Clip, index of the level, and sample, of each held-out window at each level or one; the noise is fixed."""
        return [
            (clip, index, self._noised(video, (index + 0.5) / LEVELS, 1000 * number + index))
            for number, (clip, video) in enumerate(self.held_out())
            for index in (range(LEVELS) if level is None else [level])
        ]

    def _largest_zoom(self, clip: str) -> float:
        _, _, rows, columns = self.clips[clip].shape
        return min(rows / self.height, columns / self.width)

    def _window(self, clip: str, first: int, zoom: float, down: float, across: float) -> Tensor:
        """A crop ``zoom`` times the window's size, scaled down to it; ``(1, 3, frames, height, width)``."""
        _, _, rows, columns = self.clips[clip].shape
        height, width = min(rows, round(zoom * self.height)), min(columns, round(zoom * self.width))
        top, left = round(down * (rows - height)), round(across * (columns - width))
        crop = self.clips[clip][first : first + self.frames, :, top : top + height, left : left + width].float() / 255
        scaled = F.interpolate(crop, (self.height, self.width), mode="bilinear", antialias=True, align_corners=False)
        return to_model_range(scaled).transpose(0, 1)[None]

    def _noised(self, video: Tensor, level: float, seed: int) -> Sample:
        generator = torch.Generator(self.device).manual_seed(seed)
        noise = torch.randn(video.shape, generator=generator, device=self.device)
        return Sample(video + level * (noise - video), torch.full((1,), level, device=self.device), video)
