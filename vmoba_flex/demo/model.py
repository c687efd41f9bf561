"""The attention inputs of one video transformer block: patch embedding, query-key norm, 3D rotary embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = (4, 16, 16)
"""Frames, rows, columns of pixels in a token: what a 4 x 8 x 8 VAE followed by 1 x 2 x 2 patches covers."""


def rotary_angles(grid: tuple[int, int, int], head_dim: int, base: float = 10_000.0) -> Tensor:
    """Rotation angle of each token and channel pair, the pairs being split over time, height and width.

    Args:
        grid: latent video size (frames, height, width).
        head_dim: channels of a head, even; height and width get a third of the pairs each, time the rest.
        base: the longest wavelength, in tokens over 2 pi.

    Returns:
        float32 (tokens, head_dim / 2), tokens in raster order.
    """
    pairs = head_dim // 2
    per_axis = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    positions = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    angles = []
    for position, count in zip(positions, per_axis, strict=True):
        frequencies = base ** -(torch.arange(count, dtype=torch.float32) / max(count, 1))
        angles.append(position.reshape(-1, 1) * frequencies)
    return torch.cat(angles, dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x (..., tokens, head_dim) by angles (tokens, head_dim / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class VideoProjection(nn.Module):
    """The part of a video transformer block that makes self-attention's query, key and value out of frames.

    The weights are random, from `seed`, but not without meaning: patches are embedded by smooth random filters, and the
    key projection is the query projection plus a little noise, so a query likes patches that look like it and are near.
    Trained weights of the same layout can be loaded with `load_state_dict`.
    """

    def __init__(self, *, dim: int = 256, heads: int = 4, head_dim: int = 64, gain: float = 2.5, seed: int = 0) -> None:
        """Random weights.

        Args:
            dim: channels of a token.
            heads: attention heads.
            head_dim: channels of a head, even.
            gain: initial weight of the query norm; it sets how sharp attention is.
            seed: of the random weights; the global random state is left alone.
        """
        super().__init__()
        self.heads = heads
        # The layers draw weights of their own, which are replaced.
        with torch.random.fork_rng(devices=[]):
            self.patch_embedding = nn.Conv3d(3, dim, PATCH, stride=PATCH)
            self.query = nn.Linear(dim, heads * head_dim, bias=False)
            self.key = nn.Linear(dim, heads * head_dim, bias=False)
            self.value = nn.Linear(dim, heads * head_dim, bias=False)
            self.query_norm = nn.RMSNorm(head_dim)
            self.key_norm = nn.RMSNorm(head_dim)
        self._init_weights(gain, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init_weights(self, gain: float, generator: torch.Generator) -> None:
        dim, inner = self.query.in_features, self.query.out_features

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        # Mostly a patch's colour, a little of its shape: fine texture such as grass would drown what the patch shows.
        filters = random(dim, 3, 1, 1, 1) + 0.5 * random(dim, 3, 2, 2, 2)
        self.patch_embedding.weight.copy_(F.interpolate(filters, size=PATCH) / (PATCH[0] * PATCH[1] * PATCH[2]))
        # Without a bias the norm would blow the near-zero embedding of a grey patch up to noise.
        assert self.patch_embedding.bias is not None  # __init__ asks for it
        self.patch_embedding.bias.copy_(random(dim))
        shared = random(inner, dim)
        self.query.weight.copy_(shared / dim**0.5)
        self.key.weight.copy_((shared + 0.3 * random(inner, dim)) / dim**0.5)
        self.value.weight.copy_(random(inner, dim) / dim**0.5)
        self.query_norm.weight.fill_(gain)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (1, heads, tokens, head_dim), of frames (F, 3, H, W) in [0, 1]."""
        mean, std = frames.mean((0, 2, 3), keepdim=True), frames.std((0, 2, 3), keepdim=True)
        video = ((frames - mean) / std.clamp_min(1e-3)).transpose(0, 1).unsqueeze(0)
        latent = self.patch_embedding(video)
        angles = rotary_angles(tuple(latent.shape[2:]), self.query_norm.normalized_shape[0]).to(latent)
        tokens = latent.flatten(2).transpose(1, 2)
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return rotate(self.query_norm(query), angles), rotate(self.key_norm(key), angles), value.contiguous()
