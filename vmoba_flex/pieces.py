"""A causal partition -> its pieces: the queries of each chunk, and the part of the video that they may attend.

What a causal call attends is what its pieces attend, each in a call of its own in which no later chunk takes part.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmoba_flex.checks import is_int
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition


class Piece(NamedTuple):
    """Queries of one chunk, and the video up to the chunk's end.

    Attributes:
        partition: of the video up to the chunk's end, with prefix and suffix: their keys, but not their queries.
        queries: of the chunk, without prefix and suffix.
    """

    partition: BlockPartition
    queries: Queries

    def keys(self, x: Tensor) -> Tensor:
        """Those of a longer video that the queries may attend: of ``(B, heads, S, D)``, the tokens of the partition."""
        end = self.partition.prefix + self.partition.num_video_tokens
        if not self.partition.suffix:
            return x[:, :, :end]
        if self.partition.num_tokens == x.shape[2]:
            return x
        return torch.cat([x[:, :, :end], x[:, :, -self.partition.suffix :]], 2)


def pieces_of(partition: BlockPartition, queries: Queries) -> list[Piece]:
    """The pieces of a causal partition, first chunk first; no text queries are in any of them.

    Args:
        partition: with ``causal_frames``.
        queries: a stretch of whole frames, with or without text.
    """
    (frames, height, width), chunk = partition.grid, partition.causal_frames
    assert chunk is not None
    first, end = queries.first // (height * width), (queries.first + queries.video) // (height * width)
    pieces = []
    for start in range(first // chunk * chunk, end, chunk):
        stretch = range(max(first, start), min(end, start + chunk))
        tokens = stretch.start * height * width, len(stretch) * height * width
        pieces.append(Piece(partition.up_to(min(start + chunk, frames)), Queries(0, *tokens, 0)))
    return pieces


def reach(partition: BlockPartition, device: torch.device) -> Tensor:
    """Which blocks each video query of a causal partition may attend: bool ``(video tokens, N)``."""
    block = torch.arange(partition.num_blocks, device=device)
    rows = [
        (block < past.num_blocks).expand(here.video, -1) for past, here in pieces_of(partition, Queries.of(partition))
    ]
    return torch.cat(rows)


def queries_of_frames(frames: Any, partition: BlockPartition) -> Queries:
    """The video queries of frames ``first..end - 1``, as ``query_frames`` of a call gives them.

    Raises:
        TypeError: unless ``frames`` is two ints.
        ValueError: unless ``0 <= first < end <= T``.
    """
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition must be a BlockPartition, got {type(partition).__name__}")
    count, *sides = partition.grid
    if not isinstance(frames, tuple | list) or len(frames) != 2 or not all(map(is_int, frames)):
        raise TypeError(f"query_frames must be two ints (first, end) or None, got {frames!r}")
    first, end = frames
    if not 0 <= first < end <= count:
        raise ValueError(
            f"query_frames must be (first, end) with 0 <= first < end <= {count} frames of the grid, as in "
            f"range(first, end), got {tuple(frames)}"
        )
    tokens = sides[0] * sides[1]
    return Queries(0, first * tokens, (end - first) * tokens, 0)
