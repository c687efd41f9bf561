"""Drawing functions of the picture. Places are in inches from the top left corner."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """New axes at a place in inches."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def text(figure: "Figure", left: float, top: float, words: str, *, size: float = 11, **style: Any) -> None:
    """Text at a place in inches."""
    across, down = figure.get_size_inches()
    figure.text(left / across, 1 - top / down, words, fontsize=size, **style)


def stroke(width: float) -> list[Any]:
    """A black rim, so that white lines and letters are readable on any frame."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="black")]


def label(target: "Axes", x: float, y: float, words: str, size: float, **style: Any) -> None:
    """White text with a black rim, in token units."""
    target.text(x, y, words, color="white", fontsize=size, path_effects=stroke(2), **style)


def outline(
    target: "Axes", corner: tuple[int, int], size: tuple[int, int], colour: str, width: float, inset: float = 0.0
) -> None:
    """A cell's border in token units, drawn `inset` tokens inside it: neighbours' lines then do not overlap."""
    from matplotlib.patches import Rectangle

    (x, y), (w, h) = corner, size
    place = (x + inset, y + inset)
    rim = stroke(width + 1.5) if inset else None
    target.add_patch(Rectangle(place, w - 2 * inset, h - 2 * inset, fill=False, ec=colour, lw=width, path_effects=rim))


def show(target: "Axes", image: np.ndarray, grid: tuple[int, int, int]) -> None:
    """Put an image (H, W, 3) on axes in token units."""
    _, height, width = grid
    target.imshow(image, extent=(0, width, height, 0))


def palette(blocks: int) -> np.ndarray:
    """A colour per block, (blocks, 3), whose lightness grows with the block id."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.05, 0.95, blocks))[:, :3]


def plain(frame: Tensor) -> np.ndarray:
    """The frame (3, H, W) itself, as (H, W, 3)."""
    return frame.permute(1, 2, 0).numpy()


def glowing(frame: Tensor, share: Tensor) -> np.ndarray:
    """A dim grey frame on which attention glows; share (h, w) is relative to the largest."""
    from matplotlib import colormaps

    # The square root makes weak attention visible; most of it is weak.
    glow = _per_pixel(share.sqrt().numpy(), frame)
    colour = colormaps["inferno"](0.25 + 0.7 * glow)[..., :3]
    opacity = np.sqrt(glow)[..., None]
    return (1 - opacity) * 0.4 * _grey(frame) + opacity * colour


def tinted(frame: Tensor, ids: Tensor, blocks: int) -> np.ndarray:
    """A grey frame in the colours of its blocks (h, w)."""
    return _per_pixel(palette(blocks)[ids.numpy()], frame) * (0.45 + 0.55 * _grey(frame))


def dimmed(frame: Tensor, keep: Tensor) -> np.ndarray:
    """The frame where keep (h, w) is true, dark grey elsewhere."""
    return np.where(_per_pixel(keep.numpy(), frame)[..., None], frame.permute(1, 2, 0).numpy(), 0.3 * _grey(frame))


def coarse(frame: Tensor, keep: Tensor, colours: Tensor) -> np.ndarray:
    """The frame where keep (h, w) is true, the darkened colours (h, w, 3) of its tokens elsewhere."""
    kept = _per_pixel(keep.numpy(), frame)[..., None]
    return np.where(kept, frame.permute(1, 2, 0).numpy(), 0.7 * _per_pixel(colours.numpy(), frame))


def _grey(frame: Tensor) -> np.ndarray:
    return frame.mean(0).numpy()[..., None]


def _per_pixel(tokens: np.ndarray, frame: Tensor) -> np.ndarray:
    """Repeat a value per token (h, w, ...) over the pixels of a frame."""
    rows, columns = frame.shape[1] // tokens.shape[0], frame.shape[2] // tokens.shape[1]
    return tokens.repeat(rows, axis=0).repeat(columns, axis=1)
