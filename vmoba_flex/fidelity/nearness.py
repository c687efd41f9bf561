"""Two videos -> how near they are: PSNR and SSIM of each frame, and LPIPS where it is installed.

F frames, H, W pixels.
"""

import dataclasses
import functools
import importlib.util
import logging
import math
from collections.abc import Iterable
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.user_error import one_line

_LOG = logging.getLogger(__name__)

PEAK = 100.0
"""PSNR of equal videos in dB, which would be infinite."""

_EDGE = 5
_WINDOW = 2 * _EDGE + 1


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How near a video is to another, over 8-bit RGB frames.

    Attributes:
        psnr: peak signal-to-noise ratio in dB, of the error of all frames together; at most ``PEAK``.
        ssim: structural similarity (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5), mean over the frames;
            None below 11 pixels a side.
        lpips: learned perceptual distance (Zhang et al. 2018, AlexNet), mean over the frames, lower is nearer;
            None where the package ``lpips`` is not installed.
        frame_psnr: of each frame.
        frame_ssim: of each frame; empty if ``ssim`` is None.
    """

    psnr: float
    ssim: float | None
    lpips: float | None
    frame_psnr: tuple[float, ...]
    frame_ssim: tuple[float, ...]


@torch.no_grad()
def nearness(first: Iterable[Tensor], second: Iterable[Tensor]) -> Nearness:
    """How near two videos are.

    Args:
        first: runs of its frames, each uint8 ``(frames, H, W, 3)``: the video is in memory one run at a time.
        second: of the other video, in runs of the same sizes.

    Raises:
        ValueError: if the videos differ in size.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    errors: list[float] = []
    similarities: list[float] = []
    distances: list[float] = []
    learned = _learned()
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"videos must have one size, got frames of {tuple(one.shape)} and {tuple(other.shape)}")
        for pair in zip(one, other, strict=True):
            a, b = (frame.to(device).movedim(-1, 0)[None].float() / 255 for frame in pair)
            errors.append((a - b).square().mean(dtype=torch.float32).item())
            if min(a.shape[-2:]) >= _WINDOW:
                options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
                _, at_pixels = structural_similarity_index_measure(a, b, **options)
                # Of windows that lie inside the frame: the library also has some that reach over its edge.
                similarities.append(at_pixels[..., _EDGE:-_EDGE, _EDGE:-_EDGE].mean().item())
            if learned is not None:
                distances.append(learned.to(device)(a, b, normalize=True).item())
    psnr, ssim, lpips = _psnr(mean(errors)), _mean(similarities), _mean(distances)
    return Nearness(psnr, ssim, lpips, tuple(map(_psnr, errors)), tuple(similarities))


@functools.cache
def _learned() -> Any:
    """The model of LPIPS; None where it is not installed, or its weights cannot be loaded, which is logged."""
    if importlib.util.find_spec("lpips") is None:
        return None
    try:
        return importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # of torchvision, of the network: whatever it is, the other figures stand
        _LOG.warning("no LPIPS: %s", one_line(error))
        return None


def _mean(values: list[float]) -> float | None:
    return mean(values) if values else None


def _psnr(error: float) -> float:
    return -10 * math.log10(max(error, 10 ** (-PEAK / 10)))
