"""Paired runs -> one MP4: videos side by side, their differences to full attention's below, pair after pair.

F frames, H, W pixels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vmoba_flex.fidelity.comparison import Run

GAIN = 8
"""What differences are multiplied by, to be seen."""

_WIDEST = 640
_BAND = 48


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things are in a frame of the MP4, in pixels.

    Attributes:
        columns: videos side by side, full attention first.
        width: of one.
        height: of one.
        band: of the labels above them. Differences are below the videos.
        gain: of the differences.
    """

    columns: int
    width: int
    height: int
    band: int = _BAND
    gain: int = GAIN

    @classmethod
    def of(cls, pairs: Sequence[Sequence[Run]]) -> "Layout":
        """For pairs, whose videos may differ in size."""
        tall, wide = (max(run.denoise.shape[dim] for pair in pairs for run in pair) for dim in (1, 2))
        scale = min(1.0, _WIDEST / wide)
        return cls(len(pairs[0]), _even(wide * scale), _even(tall * scale))


def write_movie(pairs: Sequence[Sequence[Run]], path: Path, fps: int, step: Callable[[], object]) -> Layout:
    """Writes the MP4 (H.264), a frame at a time; calls ``step`` after each pair."""
    import av
    from av.video.frame import PictureType

    layout = Layout.of(pairs)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as writer:
        stream = writer.add_stream("libx264", rate=fps)
        stream.width, stream.height = layout.columns * layout.width, layout.band + 2 * layout.height
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18", "preset": "veryfast"}
        count = 0
        for pair in pairs:
            band = _labels(pair, layout)
            for i, image in enumerate(_images(pair, layout)):
                frame = av.VideoFrame.from_ndarray(np.concatenate([band, image]), format="rgb24")
                frame.pts, frame.time_base = count, Fraction(1, fps)
                if i == 0:
                    frame.pict_type = PictureType.I  # the page jumps to it
                writer.mux(stream.encode(frame))
                count += 1
            step()
        writer.mux(stream.encode())
    return layout


def difference(first: Tensor, second: Tensor) -> Tensor:
    """How far two uint8 images are, ``GAIN`` times, uint8."""
    return ((first.int() - second.int()).abs() * GAIN).clamp(max=255).to(torch.uint8)


def frames_in_step(pair: Sequence[Run]) -> Iterator[list[Tensor]]:
    """The same frame of each run, one after another: uint8 ``(H, W, 3)`` each."""
    for runs in zip(*(run.denoise.runs() for run in pair), strict=True):
        yield from map(list, zip(*runs, strict=True))


def _images(pair: Sequence[Run], layout: Layout) -> Iterator[np.ndarray]:
    """Videos above, differences below: uint8 ``(2 * height, columns * width, 3)``."""
    for frames in frames_in_step(pair):
        apart = [difference(frame, frames[0]) for frame in frames]
        rows = [torch.cat([_fitted(one, layout) for one in row], 1) for row in (frames, apart)]
        yield torch.cat(rows).numpy()


def _fitted(image: Tensor, layout: Layout) -> Tensor:
    """An image ``(H, W, 3)`` as large as fits in a panel, in its middle."""
    tall, wide, _ = image.shape
    scale = min(layout.height / tall, layout.width / wide)
    size = max(1, round(tall * scale)), max(1, round(wide * scale))
    if size != (tall, wide):
        image = F.interpolate(image.movedim(-1, 0)[None].float(), size, mode="area")[0].round().byte().movedim(0, -1)
    top, left = layout.height - size[0], layout.width - size[1]
    return F.pad(image, (0, 0, left // 2, left - left // 2, top // 2, top - top // 2))


def _labels(pair: Sequence[Run], layout: Layout) -> np.ndarray:
    """The names above the videos, and the prompt: uint8 ``(band, columns * width, 3)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.columns * layout.width / 100, layout.band / 100), dpi=100, facecolor="white")
    for column, run in enumerate(pair):
        near = "" if run.near is None else f"  {run.near.psnr:.1f} dB"
        figure.text((column + 0.03) / layout.columns, 0.58, run.name + near, size=9, weight="bold")
    figure.text(
        0.03 / layout.columns, 0.14, f"{pair[0].prompt[:120]}, seed {pair[0].seed}; below: difference x {GAIN}", size=7
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _even(size: float) -> int:
    return max(2, 2 * round(size / 2))
