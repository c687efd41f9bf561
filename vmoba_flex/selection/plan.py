"""What a call derives from a selection before it attends, kept for later calls.

B batch, H heads, S tokens, N blocks, G groups.
"""

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from block_masks import RowPlan, SlotLists, Slots, key_lists, plan_rows, slot_lists
from block_masks.attention.grouped import rooms_of
from vmoba_flex.groups import block_slots, with_text
from vmoba_flex.part import Part, Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.selection.bounds import Bounds

_LOG = logging.getLogger(__name__)


class Plan(NamedTuple):
    """Where tokens and rows lie, and which tiles attend which.

    Attributes:
        slots: of the keys.
        rows: of ``dispatch="packed"``.
        tiles: of ``dispatch="shared"`` on FlexAttention's kernels.
        lists: of ``dispatch="shared"`` on FlashAttention-4.
        of_tiles: bool ``(B, H, tiles, G)``, what each tile of ``"shared"`` attends, prefix and suffix included.
    """

    slots: Slots
    rows: RowPlan | None = None
    tiles: SlotLists | None = None
    lists: tuple[Tensor, Tensor] | None = None
    of_tiles: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        of_rows = [] if self.rows is None else self.rows.tensors
        of_tiles = [] if self.tiles is None else [self.tiles.words, *self.tiles.lists]
        of_tiles += [] if self.of_tiles is None else [self.of_tiles]
        return sum(x.nbytes for x in (*self.slots.flat[0], *of_rows, *of_tiles, *(self.lists or ())))


def plan_packed(selected: Tensor, partition: BlockPartition, bounds: Bounds, max_rows: int, backend: str) -> Plan:
    """The plan of what each token chose.

    Args:
        selected: bool ``(B, H, video tokens, N)``.
        partition: the blocks.
        bounds: of what was chosen, of the rows too.
        max_rows: how many rows may be worked on together.
        backend: ``"triton"`` or ``"flash"``.
    """
    _check_whole(partition)
    slots = block_slots(partition, selected.device)
    chosen = with_text(selected, partition).flatten(0, 1)
    assert bounds.rows is not None
    room, _ = rooms_of(bounds.rows, selected.shape[1], max_rows, slots.tile_size, backend)
    rows = plan_rows(chosen, room.row_tiles, room.heads, slots.tile_size)
    if bounds.blocks is None or partition.prefix + partition.suffix:  # which attend everything
        return Plan(slots, rows)
    return Plan(slots, rows.trimmed(bounds.blocks))


def plan_shared(of_tiles: Tensor, partition: BlockPartition, backend: str) -> Plan:
    """The plan of what each tile chose, bool ``(B, H, tiles, G)``, for a backend."""
    _check_whole(partition)
    slots = block_slots(partition, of_tiles.device)
    if backend == "flash":
        return Plan(slots, lists=key_lists(of_tiles, slots), of_tiles=of_tiles)
    return Plan(slots, tiles=slot_lists(of_tiles, slots), of_tiles=of_tiles)


def plan_of_call(
    plan: Plan | None, text_lengths: Tensor | None, part: Part | None, queries: Queries | None = None
) -> Plan | None:
    """The plan, if it is one of a call with these."""
    if plan is None or (text_lengths is None and part is None and queries is None):
        return plan
    if not torch.compiler.is_compiling():
        log_planned_again("it was made for all queries, without text lengths and for one device")
    return None


def _check_whole(partition: BlockPartition) -> None:
    if partition.causal_frames is not None:
        raise ValueError(
            "partition must have no causal_frames for a plan, since its chunks are attended one by one, got "
            f"{partition.causal_frames}"
        )


@functools.cache
def log_planned_again(reason: str) -> None:
    """Logs each reason once."""
    _LOG.warning("a call does not use the plan of its selection: %s", reason)
