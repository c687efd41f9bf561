"""The part of a call that this rank has, where ranks share the call."""

from typing import NamedTuple, Self

from torch import Tensor

from vmoba_flex.partition import BlockPartition


class Queries(NamedTuple):
    """A stretch of queries in raster order.

    Attributes:
        before: text queries before the video's.
        first: the first video query, counted from the video's first token.
        video: how many video queries.
        after: text queries after the video's.
    """

    before: int
    first: int
    video: int
    after: int

    @classmethod
    def of(cls, partition: BlockPartition) -> Self:
        """All queries of a partition."""
        return cls(partition.prefix, 0, partition.num_video_tokens, partition.suffix)

    @property
    def tokens(self) -> int:
        """Text and video queries together."""
        return self.before + self.video + self.after


class Part(NamedTuple):
    """The heads, or the queries, of a call that this rank has.

    Attributes:
        group: name of the process group whose ranks share the call.
        dim: the dim of a selection ``(B, H, S, N)`` that is split over the ranks: 1, heads, or 2, video queries.
        size: of this dim in the whole call.
        places: int64, the index in the whole call of each head or video query here.
        queries: the queries here.
    """

    group: str
    dim: int
    size: int
    places: Tensor
    queries: Queries
