"""Which tokens each rank holds."""

import dataclasses
import itertools
from collections.abc import Sequence

from block_masks.launching.constant import constant_when_compiled
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition

TEXT_SHARDS = ("consecutive", "split", "replicated")

# Consecutive tokens in raster order, prefix and suffix included: the first one, and how many.
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TokenShards:
    """How the tokens of a call are laid out over the ranks of its group, in raster order.

    Attributes:
        sizes: tokens that each rank holds: of all tokens if ``text`` is ``"consecutive"``, else of the video's. None
            splits them as ``torch.tensor_split`` does: evenly, the first ranks one more where it does not divide.
        text: where prefix and suffix are. ``"consecutive"``: prefix, video and suffix are split as one sequence.
            ``"split"``: each rank holds its ``tensor_split`` of the prefix, then its tokens of the video, then its
            ``tensor_split`` of the suffix. ``"replicated"``: each rank holds the whole prefix, then its tokens of the
            video, then the whole suffix.

    Raises:
        TypeError: if ``sizes`` is no tuple of ints.
        ValueError: if a size is below 0, or ``text`` is unknown.

    Example:
        >>> partition = BlockPartition((3, 4, 4), (1, 4, 4), suffix=5)
        >>> TokenShards().spans(partition, 2)
        (((0, 27),), ((27, 26),))
        >>> TokenShards(sizes=(16, 32), text="replicated").spans(partition, 2)
        (((0, 16), (48, 5)), ((16, 32), (48, 5)))
    """

    sizes: tuple[int, ...] | None = None
    text: str = "consecutive"

    def __post_init__(self) -> None:
        if self.text not in TEXT_SHARDS:
            raise ValueError(f"text must be one of {TEXT_SHARDS}, got {self.text!r}")
        if self.sizes is None:
            return
        if not isinstance(self.sizes, tuple | list):
            raise TypeError(f"sizes must be a tuple of ints or None, got {self.sizes!r}")
        for size in self.sizes:
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"sizes must hold ints, got {self.sizes!r}")
            if size < 0:
                raise ValueError(f"sizes must be at least 0 everywhere, got {self.sizes!r}")
        object.__setattr__(self, "sizes", tuple(self.sizes))

    def spans(self, partition: BlockPartition, ranks: int) -> tuple[tuple[Span, ...], ...]:
        """The spans of tokens that each rank holds, in the order in which it holds them.

        Raises:
            ValueError: if ``sizes`` does not fit the ranks or the tokens, or leaves a rank without tokens.
        """
        return _spans(partition.prefix, partition.num_video_tokens, partition.suffix, ranks, self.sizes, self.text)

    def own_spans(self, partition: BlockPartition, ranks: int) -> tuple[tuple[Span, ...], ...]:
        """The spans that only one rank holds: ``spans`` without replicated text."""
        text = "video" if self.text == "replicated" else self.text
        return _spans(partition.prefix, partition.num_video_tokens, partition.suffix, ranks, self.sizes, text)


def queries_of(spans: tuple[Span, ...], partition: BlockPartition) -> Queries:
    """The queries of a rank that holds these spans."""
    start, end = partition.prefix, partition.prefix + partition.num_video_tokens
    before, first, video, after = 0, 0, 0, 0
    for token, count in spans:
        before += max(0, min(token + count, start) - token)
        after += max(0, token + count - max(token, end))
        inside = min(token + count, end) - max(token, start)
        if inside > 0:
            first, video = max(token, start) - start, inside
    return Queries(before, first, video, after)


def lengths(spans: tuple[Span, ...]) -> list[int]:
    """Tokens in each span."""
    return [count for _, count in spans]


def split_evenly(start: int, count: int, parts: int) -> list[Span]:
    """``count`` tokens from ``start`` on in ``parts`` spans, as ``torch.tensor_split`` makes them."""
    return _split(start, [count // parts + (part < count % parts) for part in range(parts)])


# Depends on sizes only: a constant to torch.compile.
@constant_when_compiled
def _spans(
    prefix: int, video: int, suffix: int, ranks: int, sizes: tuple[int, ...] | None, text: str
) -> tuple[tuple[Span, ...], ...]:
    what, first, count = ("tokens", 0, prefix + video + suffix)
    if text != "consecutive":
        what, first, count = "video tokens", prefix, video
    if sizes is not None and (len(sizes) != ranks or sum(sizes) != count):
        raise ValueError(f"sizes must share out {count} {what} to {ranks} ranks, got {sizes}")
    parts = [split_evenly(first, count, ranks) if sizes is None else _split(first, sizes)]
    if text == "split":
        parts = [split_evenly(0, prefix, ranks), *parts, split_evenly(prefix + video, suffix, ranks)]
    elif text == "replicated" and all(size for _, size in parts[0]):
        parts = [[(0, prefix)] * ranks, *parts, [(prefix + video, suffix)] * ranks]
    spans = tuple(tuple(span for span in of_rank if span[1]) for of_rank in zip(*parts, strict=True))
    if () in spans:
        raise ValueError(f"each of {ranks} ranks must hold {what} of its own, got none for rank {spans.index(())}")
    return spans


# Also a constant to torch.compile.
@constant_when_compiled
def in_order(spans: tuple[tuple[Span, ...], ...]) -> tuple[tuple[int, int, int, int], ...]:
    """The spans of all ranks, earliest first: first token, rank, start among the rank's tokens, length."""
    ends = [list(itertools.accumulate(lengths(of_rank))) for of_rank in spans]
    found = [
        (start, rank, end - count, count)
        for rank, of_rank in enumerate(spans)
        for (start, count), end in zip(of_rank, ends[rank], strict=True)
    ]
    return tuple(sorted(found))


def _split(start: int, sizes: Sequence[int]) -> list[Span]:
    ends = [start + end for end in itertools.accumulate(sizes)]
    return [(end - size, size) for end, size in zip(ends, sizes, strict=True)]
