"""The part of a call that lies here, where the rest of it lies on other ranks."""

from typing import NamedTuple, Self

from torch import Tensor

from vmoba_flex.partition import BlockPartition


class Queries(NamedTuple):
    """Which queries there are, in raster order.

    Attributes:
        before: text queries before the video's.
        first: the first of the video's, counted from the video's first token.
        video: how many of the video's.
        behind: text queries behind them.
    """

    before: int
    first: int
    video: int
    behind: int

    @classmethod
    def of(cls, partition: BlockPartition) -> Self:
        """All queries."""
        return cls(partition.prefix, 0, partition.num_video_tokens, partition.suffix)

    @property
    def tokens(self) -> int:
        """Text and video queries together."""
        return self.before + self.video + self.behind


class Part(NamedTuple):
    """The heads, or the video queries, that lie here.

    Attributes:
        group: name of the process group whose ranks hold the others.
        dim: what is shared out: 1, heads, or 2, queries, of a selection ``(B, H, S, N)``.
        size: of this dim in the whole call.
        places: int64, where each head or video query that lies here stands among all.
        queries: that lie here.
    """

    group: str
    dim: int
    size: int
    places: Tensor
    queries: Queries
