"""Two videos -> how near they are: PSNR and SSIM of each frame.

F frames, H, W pixels.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

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
        frame_psnr: of each frame.
        frame_ssim: of each frame; empty if ``ssim`` is None.
    """

    psnr: float
    ssim: float | None
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
    ssim = sum(similarities) / len(similarities) if similarities else None
    return Nearness(_psnr(sum(errors) / len(errors)), ssim, tuple(map(_psnr, errors)), tuple(similarities))


def _psnr(error: float) -> float:
    return -10 * math.log10(max(error, 10 ** (-PEAK / 10)))
