"""What a pipeline returns -> the frames of its video, as they are shown: 8 bits a channel.

F frames, H, W pixels.
"""

from typing import Any

import torch
from torch import Tensor


def frames_of(output: Any) -> Tensor:
    """The frames of a pipeline's first video or image, uint8 ``(F, H, W, 3)`` on the CPU.

    Args:
        output: what the pipeline returned: an object with ``frames`` or ``images``, or a tuple that begins with them:
            a batch of videos or of images. Values lie in [0, 1] if floating, and in 0..255 if uint8.

    Raises:
        ValueError: if there is no such video.
    """
    found: Any = output
    if isinstance(output, tuple):
        found = output[0] if output else None
    else:
        found = next((getattr(output, name) for name in ("frames", "images") if hasattr(output, name)), output)
    if isinstance(found, list | tuple):
        first = found[0] if found else None
        images = [_tensor(one) for one in (first if isinstance(first, list | tuple) else [first])]
        tensors = [one for one in images if one is not None]
        frames = _stacked(tensors) if tensors else None
    else:
        frames = _tensor(found)
        frames = frames[0] if frames is not None and frames.dim() > 3 else frames
    frames = None if frames is None else _channels_last(frames[None] if frames.dim() == 3 else frames)
    if frames is None:
        shape = getattr(found, "shape", None)
        what = type(found).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
        raise ValueError(f"a pipeline must return videos (B, F, H, W, 3) or images (B, H, W, 3) of pixels, got {what}")
    if frames.is_floating_point():
        frames = frames.float().nan_to_num().clamp(0, 1).mul(255).round()
    return frames.to(torch.uint8).cpu().contiguous()


def _stacked(images: list[Tensor]) -> Tensor:
    """One video, or the images of one."""
    return images[0] if len(images) == 1 else torch.stack(images)


def _tensor(one: Any) -> Tensor | None:
    """A tensor, an array or a PIL image as a tensor; None if it is none of these."""
    if isinstance(one, Tensor):
        return one.detach()
    if not hasattr(one, "__array_interface__"):
        return None
    import numpy as np

    return torch.from_numpy(np.array(one))


def _channels_last(frames: Tensor) -> Tensor | None:
    if frames.dim() != 4 or not frames.numel():
        return None
    if frames.shape[-1] == 3:
        return frames
    return frames.movedim(1, -1) if frames.shape[1] == 3 else None
