"""A latent video grid and a block shape -> block ids and token orders."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from block_masks import realize
from block_masks.launching.constant import constant_size
from vmoba_flex.axis import Axis, axes_of
from vmoba_flex.block_order import block_position, raster_index
from vmoba_flex.checks import check_count, check_int, check_positive, check_sizes
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
        causal_frames: frames of a chunk, where the video is causal in chunks; None if it is not. A video query then
            attends its own chunk and those before it only, and prefix and suffix attend prefix and suffix only: nothing
            depends on a later chunk. A block ends with its chunk: ``block`` is at most ``causal_frames`` long, and the
            last block of each chunk is shorter where ``block`` does not divide it.

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
    causal_frames: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # Lists are welcome (a config read from JSON has them), but a frozen object must be hashable.
        object.__setattr__(self, "grid", check_sizes("grid", self.grid))
        object.__setattr__(self, "block", check_sizes("block", self.block))
        for name in ("prefix", "suffix"):
            check_count(name, getattr(self, name))
        if any(b > g for b, g in zip(self.block, self.grid, strict=True)):
            raise ValueError(f"block must not be larger than grid {self.grid}, got {self.block}")
        if self.causal_frames is not None:
            check_positive("causal_frames", self.causal_frames)
            # Cut here, and not with the others by ``axes``: then a chunk holds whole blocks.
            object.__setattr__(self, "block", (min(self.block[0], self.causal_frames), *self.block[1:]))

    @classmethod
    def of_flat(cls, flat: list[int]) -> Self:
        """The partition with these ``flat`` sizes."""
        t, y, x, bt, bh, bw, prefix, suffix, *chunk = flat
        causal_frames = chunk[0] if chunk else None
        return cls((t, y, x), (bt, bh, bw), prefix=prefix, suffix=suffix, causal_frames=causal_frames)

    @property
    def flat(self) -> list[int]:
        """Grid, block, prefix, suffix and, if there are any, causal frames, as the schema of a custom op takes them."""
        chunk = [] if self.causal_frames is None else [self.causal_frames]
        return [*self.grid, *self.block, self.prefix, self.suffix, *chunk]

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """Frames, height and width, in blocks."""
        return axes_of(self.flat)

    def up_to(self, frames: int) -> Self:
        """The partition of the first ``frames`` frames: the same blocks, as far as they go.

        Raises:
            TypeError: if ``frames`` is no int.
            ValueError: if it is not in 1..T, or less than a block's.
        """
        check_positive("frames", frames)
        if frames > self.grid[0]:
            raise ValueError(f"frames must lie in 1..grid[0] = 1..{self.grid[0]}, got {frames}")
        return dataclasses.replace(self, grid=(frames, *self.grid[1:]))

    def constant(self) -> Self:
        """The same partition, whose sizes are constants of compiled graphs: there is one graph for each partition.

        ``torch.compile`` makes the sizes of an object symbolic once they change. Counts of blocks and rows, which
        follow from them by divisions and roundings, must be plain numbers.
        """
        if not torch.compiler.is_compiling():
            return self
        return self.of_flat([constant_size(size) for size in self.flat])

    @classmethod
    def temporal(
        cls, grid: tuple[int, int, int], frames: int, *, prefix: int = 0, suffix: int = 0,
        causal_frames: int | None = None,
    ) -> Self:  # fmt: skip
        """The 1D partition: slabs of ``frames`` whole frames."""
        _, height, width = check_sizes("grid", grid)
        (frames,) = check_sizes("frames", (frames,), length=1)
        return cls(grid, (frames, height, width), prefix=prefix, suffix=suffix, causal_frames=causal_frames)

    @classmethod
    def spatial(
        cls, grid: tuple[int, int, int], window: tuple[int, int], *, prefix: int = 0, suffix: int = 0,
        causal_frames: int | None = None,
    ) -> Self:  # fmt: skip
        """The 2D partition: windows of ``(bh, bw)`` tokens through all frames."""
        frames, _, _ = check_sizes("grid", grid)
        height, width = check_sizes("window", window, length=2)
        return cls(grid, (frames, height, width), prefix=prefix, suffix=suffix, causal_frames=causal_frames)

    @classmethod
    def spatiotemporal(
        cls, grid: tuple[int, int, int], cube: tuple[int, int, int], *, prefix: int = 0, suffix: int = 0,
        causal_frames: int | None = None,
    ) -> Self:  # fmt: skip
        """The 3D partition: cubes of ``(bt, bh, bw)`` tokens."""
        bt, bh, bw = check_sizes("cube", cube)
        return cls(grid, (bt, bh, bw), prefix=prefix, suffix=suffix, causal_frames=causal_frames)

    @property
    def cells(self) -> tuple[int, int, int]:
        """Blocks along frames, height and width."""
        t, y, x = self.axes
        return t.blocks, y.blocks, x.blocks

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
        (of_t, of_y, of_x), (_, height, width) = self.axes, self.grid
        token = realize(torch.arange(self.num_video_tokens, device=device))
        t, y, x = token // (height * width), token // width % height, token % width
        return (of_t.block_of(t) * of_y.blocks + of_y.block_of(y)) * of_x.blocks + of_x.block_of(x)

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
        t, y, x = (_sizes_of(axis, device) for axis in self.axes)
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
        raster, position = self._orders(x.device)
        return reorder(x, raster, position, dim)

    def to_raster_order(self, x: Tensor, dim: int = -2) -> Tensor:
        """The exact inverse of ``to_block_order``."""
        self.check_tokens("x", x, dim)
        raster, position = self._orders(x.device)
        return reorder(x, position, raster, dim)

    def _orders(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The raster index of each token in block order, and the inverse."""
        where = self.axes, self.prefix, self.num_tokens, device
        return raster_index(*where), block_position(*where)

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


def _sizes_of(axis: Axis, device: torch.device | str | None) -> Tensor:
    """Tokens of each block along an axis, int64."""
    block = realize(torch.arange(axis.blocks, device=device))
    if not axis.period:
        return torch.clamp(axis.size - block * axis.block, max=axis.block)
    per_period = -(-axis.period // axis.block)
    return axis.tokens_from(block // per_period * axis.period + block % per_period * axis.block)
