"""What calls run in graphs with gradients, noted as the graphs are made: nothing of Python runs with them later.

Notes go by what such graphs hold as constants anyway. So no graph is made for them, and where graphs differ in more,
such as the batch, there is a note of each.
"""

from block_masks.launching.constant import constant_when_compiled
from vmoba_flex.call import Chosen
from vmoba_flex.partition import BlockPartition

Size = tuple[int, int, int]

_notes: dict[tuple[Size, Size], dict[Chosen, None]] = {}


def note(partition: BlockPartition, chosen: Chosen) -> None:
    """Notes what a call of a graph that is being made will run."""
    constant = partition.constant()
    _note(constant.grid, constant.block, chosen.dispatch, chosen.backend, chosen.why)


def noted(grid: Size, block: Size) -> list[Chosen]:
    """All that graphs of blocks on a grid run, in this process."""
    return list(_notes.get((grid, block), ()))


@constant_when_compiled
def _note(grid: Size, block: Size, *chosen: str) -> None:
    _notes.setdefault((grid, block), {})[Chosen(*chosen)] = None  # pyright: ignore[reportArgumentType]
