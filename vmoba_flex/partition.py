"""A latent video grid and a block shape -> block ids and token orders."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from block_masks import realize
from block_masks.launching.constant import constant_size
from vmoba_flex.checks import check_count, check_int, check_sizes
from vmoba_flex.reorder import reorder


@dataclasses.dataclass(frozen=True)
class BlockPartition:
    """A latent video grid, divided into key blocks (arXiv 2506.23858, Sec. 3).

    Block ``(t // bt, y // bh, x // bw)`` holds token ``(t, y, x)``; block ids count these cells in raster order. Cells
    at the far edges are smaller where the block shape does not divide the grid. ``temporal``, ``spatial`` and
    ``spatiotemporal`` make the paper's 1D, 2D and 3D partitions.

    Attributes:
        grid: latent video size ``(frames, height, width)`` in tokens; tokens are row-major, frames outermost.
        block: block shape ``(bt, bh, bw)`` in tokens.
        prefix: tokens before the video's (text in joint attention): they attend all, and all attend them.
        suffix: tokens after the video's: the same holds for them.

    Raises:
        TypeError: if a size is not an int.
        ValueError: if a size is out of range, or the block is larger than the grid.

    Example:
        >>> partition = BlockPartition.spatial((21, 30, 52), (5, 13))
        >>> partition.num_blocks, partition.num_tokens
        (24, 32760)
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    prefix: int = dataclasses.field(default=0, kw_only=True)
    suffix: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        # Lists are welcome (a config read from JSON has them), but a frozen object must be hashable.
        object.__setattr__(self, "grid", check_sizes("grid", self.grid))
        object.__setattr__(self, "block", check_sizes("block", self.block))
        for name in ("prefix", "suffix"):
            check_count(name, getattr(self, name))
        if any(b > g for b, g in zip(self.block, self.grid, strict=True)):
            raise ValueError(f"block must not be larger than grid {self.grid}, got {self.block}")

    @classmethod
    def of_flat(cls, flat: list[int]) -> Self:
        """The partition with these ``flat`` sizes."""
        t, y, x, bt, bh, bw, prefix, suffix = flat
        return cls((t, y, x), (bt, bh, bw), prefix=prefix, suffix=suffix)

    @property
    def flat(self) -> list[int]:
        """Grid, block, prefix and suffix, as the schema of a custom op takes them."""
        return [*self.grid, *self.block, self.prefix, self.suffix]

    def constant(self) -> Self:
        """The same partition, whose sizes are constants of compiled graphs: there is one graph for each partition.

        ``torch.compile`` makes the sizes of an object symbolic once they change. Counts of blocks and rows, which
        follow from them by divisions and roundings, must be plain numbers.
        """
        if not torch.compiler.is_compiling():
            return self
        return self.of_flat([constant_size(size) for size in self.flat])

    @classmethod
    def temporal(cls, grid: tuple[int, int, int], frames: int, *, prefix: int = 0, suffix: int = 0) -> Self:
        """The 1D partition: slabs of ``frames`` whole frames."""
        _, height, width = check_sizes("grid", grid)
        (frames,) = check_sizes("frames", (frames,), length=1)
        return cls(grid, (frames, height, width), prefix=prefix, suffix=suffix)

    @classmethod
    def spatial(cls, grid: tuple[int, int, int], window: tuple[int, int], *, prefix: int = 0, suffix: int = 0) -> Self:
        """The 2D partition: windows of ``(bh, bw)`` tokens through all frames."""
        frames, _, _ = check_sizes("grid", grid)
        height, width = check_sizes("window", window, length=2)
        return cls(grid, (frames, height, width), prefix=prefix, suffix=suffix)

    @classmethod
    def spatiotemporal(
        cls, grid: tuple[int, int, int], cube: tuple[int, int, int], *, prefix: int = 0, suffix: int = 0
    ) -> Self:
        """The 3D partition: cubes of ``(bt, bh, bw)`` tokens."""
        bt, bh, bw = check_sizes("cube", cube)
        return cls(grid, (bt, bh, bw), prefix=prefix, suffix=suffix)

    @property
    def cells(self) -> tuple[int, int, int]:
        """Blocks along frames, height and width."""
        return _ceil_div(self.grid, self.block)

    @property
    def num_blocks(self) -> int:
        """N, the number of key blocks."""
        return math.prod(self.cells)

    @property
    def num_video_tokens(self) -> int:
        """Tokens of the grid, without prefix and suffix."""
        return math.prod(self.grid)

    @property
    def num_tokens(self) -> int:
        """S, all tokens: prefix, video and suffix."""
        return self.prefix + self.num_video_tokens + self.suffix

    def block_ids(self, device: torch.device | str | None = None) -> Tensor:
        """Block id of each video token in raster order, int64 ``(video tokens,)``."""
        _, height, width = self.grid
        _, cells_y, cells_x = self.cells
        bt, bh, bw = self.block
        token = realize(torch.arange(self.num_video_tokens, device=device))
        t, y, x = token // (height * width), token // width % height, token % width
        return (t // bt * cells_y + y // bh) * cells_x + x // bw

    def blocks_of(self, *, frames: Iterable[int] | None = None, tokens: Iterable[int] | None = None) -> tuple[int, ...]:
        """Ids of the blocks that hold any of these frames or video tokens, in order: what a rule takes as ``always``.

        Args:
            frames: indices of latent frames, in 0..T - 1.
            tokens: raster indices of video tokens, without the prefix, in 0..``num_video_tokens`` - 1.

        Raises:
            TypeError: if an index is no int.
            ValueError: if both or neither are given, or an index is out of range.

        Example:
            >>> BlockPartition.spatiotemporal((4, 8, 8), (2, 4, 4)).blocks_of(frames=[0])
            (0, 1, 2, 3)
        """
        if (frames is None) == (tokens is None):
            raise ValueError(f"exactly one of frames and tokens must be given, got {frames!r} and {tokens!r}")
        name, chosen, rows = "tokens", tokens, self.num_video_tokens
        if frames is not None:
            name, chosen, rows = "frames", frames, self.grid[0]
        if not isinstance(chosen, Iterable):
            raise TypeError(f"{name} must hold ints, got {chosen!r}")
        blocks: list[list[int]] = self.block_ids("cpu").view(rows, -1).tolist()
        found: set[int] = set()
        for index in chosen:
            check_count(name, index, rows, "number of " + name)
            found.update(blocks[index])
        return tuple(sorted(found))

    def block_sizes(self, device: torch.device | str | None = None) -> Tensor:
        """Video tokens in each block, int64 ``(N,)``."""
        # Without realize, Inductor turns this into a minimum of index expressions, which torch 2.11 may not compile.
        t, y, x = (
            torch.clamp(g - realize(torch.arange(c, device=device)) * b, max=b)
            for g, b, c in zip(self.grid, self.block, self.cells, strict=True)
        )
        return (t[:, None, None] * y[:, None] * x).flatten()

    def to_block_order(self, x: Tensor, dim: int = -2) -> Tensor:
        """Sorts tokens by block id, stably; prefix and suffix stay where they are. Differentiable.

        Args:
            x: any dtype; ``x.shape[dim]`` is ``num_tokens``, in raster order.
            dim: the token dim.

        Raises:
            TypeError: if ``x`` is no dense tensor, or ``dim`` no int.
            ValueError: if ``dim`` is no dim of ``x``, or ``x.shape[dim]`` is not ``num_tokens``.
        """
        self.check_tokens("x", x, dim)
        return reorder(x, self._raster_index(x.device), self._block_position(x.device), dim)

    def to_raster_order(self, x: Tensor, dim: int = -2) -> Tensor:
        """The exact inverse of ``to_block_order``."""
        self.check_tokens("x", x, dim)
        return reorder(x, self._block_position(x.device), self._raster_index(x.device), dim)

    def check_tokens(self, name: str, x: Tensor, dim: int) -> None:
        """Raises ``TypeError`` or ``ValueError`` unless ``x`` is a tensor and ``x.shape[dim]`` is ``num_tokens``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested tensor' if x.is_nested else x.layout}")
        check_int("dim", dim)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must be a dim of {name}, which has shape {tuple(x.shape)}, got {dim}")
        if x.shape[dim] != self.num_tokens:
            raise ValueError(
                f"{name} must have grid + prefix + suffix = {'x'.join(map(str, self.grid))} + {self.prefix} + "
                f"{self.suffix} = {self.num_tokens} tokens in dim {dim}, got {x.shape[dim]} (shape {tuple(x.shape)})"
            )

    # The two permutations in closed form need no sort and no cache per device. realize() keeps index arithmetic away
    # from Inductor, whose index algebra fails on quotients of quotients, and whose CPU loops over a quotient of arange
    # end too early (torch 2.13).

    def _block_position(self, device: torch.device) -> Tensor:
        """Position in block order of each token in raster order."""
        (frames, height, width), (bt, bh, bw) = self.grid, self.block
        token = realize(torch.arange(self.num_tokens, device=device) - self.prefix)
        t, y, x = token // (height * width), token // width % height, token % width
        first_t, first_y, first_x = t // bt * bt, y // bh * bh, x // bw * bw
        nt, ny, nx = (frames - first_t).clamp(max=bt), (height - first_y).clamp(max=bh), (width - first_x).clamp(max=bw)
        before = first_t * height * width + nt * (first_y * width + ny * first_x)
        return self._keep_text(token, before + ((t - first_t) * ny + y - first_y) * nx + x - first_x)

    def _raster_index(self, device: torch.device) -> Tensor:
        """Raster index of each token in block order."""
        (frames, height, width), (bt, bh, bw) = self.grid, self.block
        token = realize(torch.arange(self.num_tokens, device=device) - self.prefix)
        # Remove whole slabs, then whole rows of blocks in the slab, then whole blocks in that row.
        first_t = token // (bt * height * width) * bt
        rest, nt = token - first_t * height * width, (frames - first_t).clamp(min=1, max=bt)
        first_y = rest // (nt * bh * width) * bh
        rest, ny = rest - nt * first_y * width, (height - first_y).clamp(min=1, max=bh)
        first_x = rest // (nt * ny * bw) * bw
        rest, nx = rest - nt * ny * first_x, (width - first_x).clamp(min=1, max=bw)
        t, y, x = first_t + rest // (ny * nx), first_y + rest // nx % ny, first_x + rest % nx
        return self._keep_text(token, (t * height + y) * width + x)

    def _keep_text(self, token: Tensor, moved: Tensor) -> Tensor:
        """Moves the video tokens and leaves prefix and suffix; ``token`` counts from the first video token."""
        is_video = (token >= 0) & (token < self.num_video_tokens)
        return realize(torch.where(is_video, moved, token) + self.prefix)


def _ceil_div(sizes: tuple[int, int, int], parts: tuple[int, int, int]) -> tuple[int, int, int]:
    t, y, x = (-(-size // part) for size, part in zip(sizes, parts, strict=True))
    return t, y, x
