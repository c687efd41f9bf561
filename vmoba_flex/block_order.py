"""Axes of a grid -> where tokens lie in block order, and back: two permutations in closed form.

They need no sort and no cache per device. ``realize`` keeps index arithmetic away from Inductor, whose index algebra
fails on quotients of quotients, and whose CPU loops over a quotient of arange end too early (torch 2.13).
"""

import torch
from torch import Tensor

from block_masks import realize
from vmoba_flex.axis import Axis

Axes = tuple[Axis, Axis, Axis]


def block_position(axes: Axes, prefix: int, tokens: int, device: torch.device) -> Tensor:
    """Position in block order of each token in raster order, int64 ``(tokens,)``.

    Args:
        axes: frames, height and width.
        prefix: tokens before the video's; these and the ones after it stay where they are.
        tokens: all of them.
        device: of the result.
    """
    height, width = axes[1].size, axes[2].size
    token = realize(torch.arange(tokens, device=device) - prefix)
    places = token // (height * width), token // width % height, token % width
    first_t, first_y, first_x = (axis.first_of(place) for axis, place in zip(axes, places, strict=True))
    nt, ny, nx = (axis.tokens_from(first) for axis, first in zip(axes, (first_t, first_y, first_x), strict=True))
    before = first_t * height * width + nt * (first_y * width + ny * first_x)
    t, y, x = places
    return _keep_text(axes, prefix, token, before + ((t - first_t) * ny + y - first_y) * nx + x - first_x)


def raster_index(axes: Axes, prefix: int, tokens: int, device: torch.device) -> Tensor:
    """Raster index of each token in block order: the inverse."""
    of_t, of_y, of_x = axes
    height, width = of_y.size, of_x.size
    token = realize(torch.arange(tokens, device=device) - prefix)
    # Remove whole slabs, then whole rows of blocks in the slab, then whole blocks in that row.
    if of_t.period:
        first_t = of_t.first_of(realize(token // (height * width)))
    else:
        first_t = token // (of_t.block * height * width) * of_t.block
    rest, nt = token - first_t * height * width, of_t.tokens_from(first_t)
    first_y = rest // (nt * of_y.block * width) * of_y.block
    rest, ny = rest - nt * first_y * width, of_y.tokens_from(first_y)
    first_x = rest // (nt * ny * of_x.block) * of_x.block
    rest, nx = rest - nt * ny * first_x, of_x.tokens_from(first_x)
    t, y, x = first_t + rest // (ny * nx), first_y + rest // nx % ny, first_x + rest % nx
    return _keep_text(axes, prefix, token, (t * height + y) * width + x)


def _keep_text(axes: Axes, prefix: int, token: Tensor, moved: Tensor) -> Tensor:
    """Moves the video tokens and leaves prefix and suffix; ``token`` counts from the first video token."""
    is_video = (token >= 0) & (token < axes[0].size * axes[1].size * axes[2].size)
    return realize(torch.where(is_video, moved, token) + prefix)
