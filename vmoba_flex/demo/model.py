"""A small video diffusion transformer: rectified flow on space-time patches of pixels."""

import dataclasses
import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoba_flex import VMoBAAttention, VMoBAConfig

Grid = tuple[int, int, int]

# Pixels are shifted and scaled to about zero mean and unit spread, the noise's own.
_PIXEL_MEAN, _PIXEL_SPREAD = 0.5, 0.25
_LEVEL_FEATURES = 256


def to_model_range(frames: Tensor) -> Tensor:
    """Pixels in [0, 1] as the model sees them."""
    return (frames - _PIXEL_MEAN) / _PIXEL_SPREAD


def to_pixels(video: Tensor) -> Tensor:
    """The inverse of `to_model_range`, clamped to [0, 1]."""
    return (video * _PIXEL_SPREAD + _PIXEL_MEAN).clamp(0, 1)


def to_patches(video: Tensor, patch: Grid) -> Tensor:
    """A video (B, 3, F, H, W) as tokens (B, F/pt * H/ph * W/pw, 3 * pt * ph * pw) in raster order.

    Args:
        video: frames, rows and columns are multiples of the patch's.
        patch: frames, rows and columns of pixels in a token.
    """
    pt, ph, pw = patch
    cells = video.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_patches(tokens: Tensor, patch: Grid, grid: Grid) -> Tensor:
    """The inverse of `to_patches`; `grid` is the size in tokens (frames, height, width)."""
    cells = tokens.unflatten(1, grid).unflatten(4, (3, *patch))
    return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def rotary_angles(grid: Grid, head_dim: int, base: float = 100.0, device: torch.device | None = None) -> Tensor:
    """Rotation angle of each token and channel pair; the pairs are split over time, height and width.

    Args:
        grid: latent video size (frames, height, width).
        head_dim: channels of a head, even; height and width get a third of the pairs each, time the rest.
        base: the longest wavelength, in tokens over 2 pi.
        device: where the angles are made. A copy to it could not be part of a CUDA graph.

    Returns:
        float32 (tokens, head_dim / 2), tokens in raster order.
    """
    pairs = head_dim // 2
    per_axis = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    steps = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    positions = torch.meshgrid(*steps, indexing="ij")
    angles = []
    for position, count in zip(positions, per_axis, strict=True):
        frequencies = base ** -(torch.arange(count, dtype=torch.float32, device=device) / max(count, 1))
        angles.append(position.reshape(-1, 1) * frequencies)
    return torch.cat(angles, dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x (..., tokens, head_dim) by angles (tokens, head_dim / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a `VideoTransformer`.

    Attributes:
        patch: frames, rows, columns of pixels in a token.
        dim: channels of a token.
        depth: layers.
        heads: attention heads, a divisor of `dim`.
    """

    patch: Grid
    dim: int
    depth: int
    heads: int

    @classmethod
    def of(cls, fields: dict[str, object]) -> Self:
        """The shape of `dataclasses.asdict`, after a trip through JSON, which has no tuples."""
        pt, ph, pw = fields["patch"]  # pyright: ignore[reportGeneralTypeIssues]
        return cls(**{**fields, "patch": (pt, ph, pw)})  # pyright: ignore[reportArgumentType]


class Block(nn.Module):
    """Self-attention and a perceptron, both modulated by the noise level.

    `project` runs before the attention and `finish` after it: they can be compiled without it, once for all layers.
    """

    def __init__(self, shape: Shape, layer: int, attention: VMoBAConfig) -> None:
        super().__init__()
        dim, head_dim = shape.dim, shape.dim // shape.heads
        self.heads = shape.heads
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.attention = VMoBAAttention(attention, layer, shape.depth)
        self.out = nn.Linear(dim, dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def project(self, x: Tensor, level: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (B, heads, tokens, head_dim) of tokens (B, tokens, dim)."""
        shift, scale, *_ = self._modulations(level)
        query, key, value = self.qkv(_modulate(x, shift, scale)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query = rotate(self.query_norm(query.float()), angles).to(value.dtype)
        key = rotate(self.key_norm(key.float()), angles).to(value.dtype)
        return query, key, value.contiguous()

    def finish(self, x: Tensor, attended: Tensor, level: Tensor) -> Tensor:
        """Tokens (B, tokens, dim) after the attention's output (B, heads, tokens, head_dim) and the perceptron."""
        _, _, gate, shift, scale, perceptron_gate = self._modulations(level)
        x = x + gate * self.out(attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.expand(_modulate(x, shift, scale)), approximate="tanh")
        return x + perceptron_gate * self.contract(hidden)

    def forward(self, x: Tensor, level: Tensor, angles: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, tokens, dim), float32, in raster order of `grid`."""
        return self.finish(x, self.attention(*self.project(x, level, angles), grid), level)

    def _modulations(self, level: Tensor) -> list[Tensor]:
        """Shifts, scales and gates, six tensors (B, 1, dim), from the level's (B, 6, dim)."""
        return list((level.float() + self.modulation)[:, :, None].unbind(1))


class VideoTransformer(nn.Module):
    """Predicts the video from a noisy video `(1 - level) * video + level * noise`, and so the velocity of the flow.

    The velocity of a rectified flow is `noise - video = (noisy - video) / level`. The video is predicted, and not the
    velocity, because a token has fewer channels than its patch: a video can pass through them, noise cannot.

    Tokens are patches of pixels. Query and key are normalised and rotated by a 3D rotary embedding. The noise level
    acts through adaptive layer norms whose gates start at zero.

    Args:
        shape: sizes of the model.
        attention: what its layers attend. It has no parameters: the same weights run with any attention.
    """

    def __init__(self, shape: Shape, attention: VMoBAConfig) -> None:
        super().__init__()
        channels = 3 * math.prod(shape.patch)
        self.shape = shape
        self.embed = nn.Linear(channels, shape.dim)
        self.level_in = nn.Linear(_LEVEL_FEATURES, shape.dim)
        self.level_out = nn.Linear(shape.dim, shape.dim)
        self.modulate = nn.Linear(shape.dim, 6 * shape.dim)
        self.blocks = nn.ModuleList(Block(shape, layer, attention) for layer in range(shape.depth))
        self.last_modulation = nn.Linear(shape.dim, 2 * shape.dim)
        self.unembed = nn.Linear(shape.dim, channels)
        for linear in (self.modulate, self.last_modulation, self.unembed):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def set_attention(self, attention: VMoBAConfig) -> None:
        """Runs the same weights with another attention."""
        for layer, block in enumerate(self.blocks):
            block.attention = VMoBAAttention(attention, layer, self.shape.depth)

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        """Videos from noisy videos (B, 3, F, H, W) of levels (B,) in [0, 1], both as `to_model_range` makes them."""
        tokens = to_patches(noisy, self.shape.patch)
        t, y, x = (size // part for size, part in zip(noisy.shape[2:], self.shape.patch, strict=True))
        angles = rotary_angles((t, y, x), self.shape.dim // self.shape.heads, device=noisy.device)
        embedded = F.silu(self.level_out(F.silu(self.level_in(_level_features(level)))))
        modulation = self.modulate(embedded).unflatten(-1, (6, -1))
        hidden = self.embed(tokens).float()
        for block in self.blocks:
            hidden = block(hidden, modulation, angles, (t, y, x))
        shift, scale = self.last_modulation(embedded).float()[:, None].chunk(2, dim=-1)
        return from_patches(self.unembed(_modulate(hidden, shift, scale)).float(), self.shape.patch, (t, y, x))


def _level_features(level: Tensor) -> Tensor:
    """Cosines and sines of the level, (B, features)."""
    half = _LEVEL_FEATURES // 2
    frequencies = 1000 * 10_000.0 ** -(torch.arange(half, dtype=torch.float32, device=level.device) / half)
    angles = level.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
