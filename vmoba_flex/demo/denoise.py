"""Adds noise to a video, removes it again by a model, and measures how near two videos are."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vmoba_flex.demo.model import VideoTransformer, to_model_range, to_pixels

LEVEL, STEPS = 0.7, 4
"""The noise level that the demo starts from, and the number of steps down to zero."""


def add_noise(frames: Tensor, level: float, generator: torch.Generator | None = None) -> Tensor:
    """Frames (F, 3, H, W) in [0, 1] as a noisy video (1, 3, F, H, W) for the model; noise of seed 0 by default."""
    video = to_model_range(frames).transpose(0, 1)[None]
    noise = torch.randn(video.shape, generator=generator or torch.Generator().manual_seed(0))
    return video + level * (noise - video)


@torch.no_grad()
def denoise(model: VideoTransformer, noisy: Tensor, step: Callable[[str], None]) -> Tensor:
    """Follows the flow from `LEVEL` to zero by Euler's method.

    Args:
        model: predicts the video from a noisy one.
        noisy: (1, 3, F, H, W), of level `LEVEL`.
        step: called before each step, with its name.

    Returns:
        float (F, 3, H, W) in [0, 1].
    """
    for number in range(STEPS):
        step(f"step {number + 1}")
        level, after = (LEVEL * (1 - done / STEPS) for done in (number, number + 1))
        velocity = (noisy - model(noisy, torch.tensor([level]))) / level
        noisy = noisy + (after - level) * velocity
    return frames_of(noisy)


def frames_of(video: Tensor) -> Tensor:
    """A video (1, 3, F, H, W) of the model as frames (F, 3, H, W) in [0, 1]."""
    return to_pixels(video)[0].transpose(0, 1)


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio of two videos in [0, 1], in dB: higher is nearer."""
    return -10 * math.log10(max((first - second).square().mean().item(), 1e-10))
