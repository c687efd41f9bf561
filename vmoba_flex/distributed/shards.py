"""Which tokens each rank holds."""

import dataclasses
import itertools
from collections.abc import Sequence

from vmoba_flex.constant import constant_when_compiled
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition

TEXT_SHARDS = ("consecutive", "split", "replicated")

# The first token of a run of consecutive tokens, in raster order with prefix and suffix, and how many they are.
Run = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TokenShards:
    """How the tokens of a call are laid out over the ranks of its group, in raster order.

    Attributes:
        sizes: how many tokens each rank holds, of all of them or, where ``text`` says so, of the video's. None for
            what ``torch.tensor_split`` makes: as even as can be, the first ranks one more.
        text: where prefix and suffix are. ``"consecutive"``: they are cut with the video, as one sequence. ``"split"``:
            each rank holds its ``tensor_split`` of the prefix, then its tokens of the video, then its ``tensor_split``
            of the suffix. ``"replicated"``: each rank holds the whole prefix, then its tokens of the video, then the
            whole suffix.

    Raises:
        TypeError: if ``sizes`` is no tuple of ints.
        ValueError: if a size is below 0, or ``text`` is unknown.

    Example:
        >>> partition = BlockPartition((3, 4, 4), (1, 4, 4), suffix=5)
        >>> TokenShards().runs(partition, 2)
        (((0, 27),), ((27, 26),))
        >>> TokenShards(sizes=(16, 32), text="replicated").runs(partition, 2)
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

    def runs(self, partition: BlockPartition, ranks: int) -> tuple[tuple[Run, ...], ...]:
        """The runs of tokens that each rank holds, one behind another.

        Raises:
            ValueError: if ``sizes`` does not fit the ranks or the tokens, or leaves a rank without tokens.
        """
        return _runs(partition.prefix, partition.num_video_tokens, partition.suffix, ranks, self.sizes, self.text)

    def own_runs(self, partition: BlockPartition, ranks: int) -> tuple[tuple[Run, ...], ...]:
        """Of these, the runs that no other rank has: without replicated text."""
        text = "video" if self.text == "replicated" else self.text
        return _runs(partition.prefix, partition.num_video_tokens, partition.suffix, ranks, self.sizes, text)


def queries_of(runs: tuple[Run, ...], partition: BlockPartition) -> Queries:
    """The queries of a rank with these runs."""
    start, end = partition.prefix, partition.prefix + partition.num_video_tokens
    before, first, video, behind = 0, 0, 0, 0
    for run, count in runs:
        before += max(0, min(run + count, start) - run)
        behind += max(0, run + count - max(run, end))
        inside = min(run + count, end) - max(run, start)
        if inside > 0:
            first, video = max(run, start) - start, inside
    return Queries(before, first, video, behind)


def lengths(runs: tuple[Run, ...]) -> list[int]:
    """Tokens in each run."""
    return [count for _, count in runs]


def cut_evenly(start: int, count: int, parts: int) -> list[Run]:
    """Runs of ``count`` tokens from ``start`` on, as ``torch.tensor_split`` makes them."""
    return _cut(start, [count // parts + (part < count % parts) for part in range(parts)])


# Sizes and nothing else: a constant to torch.compile.
@constant_when_compiled
def _runs(
    prefix: int, video: int, suffix: int, ranks: int, sizes: tuple[int, ...] | None, text: str
) -> tuple[tuple[Run, ...], ...]:
    what, first, count = ("tokens", 0, prefix + video + suffix)
    if text != "consecutive":
        what, first, count = "video tokens", prefix, video
    if sizes is not None and (len(sizes) != ranks or sum(sizes) != count):
        raise ValueError(f"sizes must share out {count} {what} to {ranks} ranks, got {sizes}")
    parts = [cut_evenly(first, count, ranks) if sizes is None else _cut(first, sizes)]
    if text == "split":
        parts = [cut_evenly(0, prefix, ranks), *parts, cut_evenly(prefix + video, suffix, ranks)]
    elif text == "replicated" and all(size for _, size in parts[0]):
        parts = [[(0, prefix)] * ranks, *parts, [(prefix + video, suffix)] * ranks]
    runs = tuple(tuple(run for run in of_rank if run[1]) for of_rank in zip(*parts, strict=True))
    if () in runs:
        raise ValueError(f"each of {ranks} ranks must hold {what} of its own, got none for rank {runs.index(())}")
    return runs


# A constant to torch.compile, too.
@constant_when_compiled
def in_order(runs: tuple[tuple[Run, ...], ...]) -> tuple[tuple[int, int, int, int], ...]:
    """The runs of all ranks, the earliest first: first token, rank, where the run starts in what it holds, length."""
    ends = [list(itertools.accumulate(lengths(of_rank))) for of_rank in runs]
    found = [
        (start, rank, end - count, count)
        for rank, of_rank in enumerate(runs)
        for (start, count), end in zip(of_rank, ends[rank], strict=True)
    ]
    return tuple(sorted(found))


def _cut(start: int, sizes: Sequence[int]) -> list[Run]:
    ends = [start + end for end in itertools.accumulate(sizes)]
    return [(end - size, size) for end, size in zip(ends, sizes, strict=True)]
