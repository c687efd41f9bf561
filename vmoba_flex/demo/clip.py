"""Reads a video file into frames."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vmoba_flex.user_error import UserError

if TYPE_CHECKING:
    from av import VideoFrame

BUNNY = Path(__file__).with_name("bunny.mp4")
"""The clip that ships with the demo; CREDITS.md names its source."""


def read_clip(path: str | Path, frames: int, height: int, width: int) -> Tensor:
    """The video's first frames, scaled to cover `height` x `width` and cropped at the centre.

    Args:
        path: a video file that FFmpeg can read.
        frames: how many frames to return; the video must have at least as many.
        height: pixels of the result.
        width: pixels of the result.

    Returns:
        float32 (frames, 3, height, width) in [0, 1].

    Raises:
        UserError: if the file is missing, is not a video, or is too short.
    """
    from av.error import FFmpegError

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no video file at {path}: check the path")
    try:
        images = [_cover(frame, height, width) for frame in itertools.islice(_decode(path), frames)]
    except (FFmpegError, OSError) as error:
        raise UserError(f"cannot read {path} as a video ({error.strerror}): give another file") from error
    if len(images) < frames:
        raise UserError(f"{path} has {len(images)} frames, but this grid needs {frames}: give a longer video")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def _decode(path: Path) -> Iterator["VideoFrame"]:
    import av

    with av.open(str(path)) as reader:
        if not reader.streams.video:
            raise UserError(f"{path} holds no video: give another file")
        reader.streams.video[0].thread_type = "AUTO"
        yield from reader.decode(video=0)


def _cover(frame: "VideoFrame", height: int, width: int) -> np.ndarray:
    """The frame, scaled until it covers height x width and cropped at the centre: uint8 (height, width, 3)."""
    scale = max(height / frame.height, width / frame.width)
    tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    image = frame.to_ndarray(height=tall, width=wide, format="rgb24", interpolation="AREA")
    top, left = (tall - height) // 2, (wide - width) // 2
    return image[top : top + height, left : left + width]
