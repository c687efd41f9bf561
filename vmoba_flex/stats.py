"""A call's selection -> its statistics: densities, pairs and tiles of each sample and head."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from block_masks import Slots, group_tiles, slot_tile_map, valid_slots
from vmoba_flex.call import Call, Chosen
from vmoba_flex.groups import block_slots, key_groups, valid_keys
from vmoba_flex.mask import selection_tiles
from vmoba_flex.part import Part, Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold
from vmoba_flex.selection.kept import Selection
from vmoba_flex.selection.select import choose_blocks


class AttentionStats(NamedTuple):
    """What a call attended, per sample and head; tensors ``(B, H)`` on the inputs' device.

    Attributes:
        density: float32, ``pairs / (video queries * N)``; where the partition is causal, the share of the pairs that
            may be chosen.
        tile_density: float32, the share of 128 x 128 tiles, in block order, with at least one attended pair: what the
            dispatch ``"tiles"`` runs. For ``"shared"``, the share of its own tiles that it runs, where each block, and
            prefix and suffix together, fill whole tiles. Queries of some frames, and of each chunk of a causal
            partition, stay in raster order, and a chunk's tiles are those of the keys that it may attend.
        pairs: int64, chosen (query, block) pairs; for ``"shared"``, a tile's choices count once for each of its tokens.
        cut: int64, pairs that ``max_density`` left out: those that the same threshold chooses without it, minus
            ``pairs``. 0 for rules without ``max_density``, and where it is not counted: for ``"shared"``, and for a
            ``Selection``.
    """

    density: Tensor
    tile_density: Tensor
    pairs: Tensor
    cut: Tensor


class Attended(NamedTuple):
    """A call's output, and all that its stats are made from.

    Attributes:
        output: ``(B, H, S, value dim)``.
        query: as given.
        key: as given.
        call: what they attend.
        lse: ``(B, H, S)``, the natural log-sum-exp, where the call wants it.
        selection: bool ``(B, H, video queries, N)``, where each query chose for itself.
        tile_choice: bool ``(B, H, tiles, G)`` and the slots of the tiles, where the queries of a tile chose together.
            With neither, the call attended everything.
        part: the part of the call on this rank; None for all.
        pieces: what a causal call attended, chunk by chunk; it has the choices.
        chosen: what ran, and why.
    """

    output: Tensor
    query: Tensor
    key: Tensor
    call: Call
    lse: Tensor | None = None
    selection: Tensor | None = None
    tile_choice: tuple[Tensor, Slots] | None = None
    part: Part | None = None
    pieces: tuple["Attended", ...] = ()
    chosen: Chosen | None = None

    def stats(self) -> AttentionStats:
        """The stats of all heads. All ranks that share the call must call this."""
        if self.pieces:
            return _stats_of_pieces(self.pieces)
        call, partition = self.call, self.call.partition
        valid = valid_keys(partition, call.text_lengths)
        if self.selection is not None:
            stats = selection_stats(
                self.selection, self.query, self.key, partition, call.rule, valid, self.part, call.queries
            )
        elif self.tile_choice is not None:
            stats = shared_stats(*self.tile_choice, partition, valid, call.queries)
        else:
            stats = dense_stats(self.query, partition, call.queries)
        if self.part is None or self.part.dim != 1:
            return stats
        return AttentionStats(*(gather_part(x, self.part) for x in stats))

    def density(self) -> Tensor:
        """The mean density over samples, and heads and queries of this rank: a float32 scalar on the inputs' device."""
        return self.head_density().mean()

    def head_density(self) -> Tensor:
        """The mean density over samples of each head of this rank, float32 ``(H,)``."""
        if self.pieces:
            return _mean([x.head_density() for x in self.pieces], [x.every for x in self.pieces])
        if self.selection is not None:
            return self.selection.mean((0, 2, 3), dtype=torch.float32)
        if self.tile_choice is None:
            return torch.ones(self.query.shape[1], dtype=torch.float32, device=self.query.device)
        return _shared_pairs(*self.tile_choice, self.call.partition).mean(0, dtype=torch.float32) / self.every

    @property
    def every(self) -> int:
        """The (query, block) pairs of a head that may be chosen."""
        return _all_pairs(self.call.partition, self.call.queries)


def gather_part(x: Tensor, part: Part) -> Tensor:
    """The whole of a tensor that is split over ranks along ``part.dim``; all ranks call this."""
    from vmoba_flex.collectives import all_reduce

    shape = [part.size if dim == part.dim else size for dim, size in enumerate(x.shape)]
    return all_reduce(x.new_zeros(shape).index_copy(part.dim, part.places, x), "sum", part.group)


def selection_stats(
    selection: Tensor,
    query: Tensor,
    key: Tensor,
    partition: BlockPartition,
    rule: Rule | Selection,
    key_valid: Tensor | None = None,
    part: Part | None = None,
    queries: Queries | None = None,
) -> AttentionStats:
    """Stats of a selection ``(B, H, video queries, N)`` that ``rule`` made from query and key, or that was kept."""
    wanted = selection
    if isinstance(rule, Threshold) and rule.max_density is not None:
        wanted = choose_blocks(query, key, partition, dataclasses.replace(rule, max_density=None), part, queries)
    if part is not None and part.dim == 2:
        selection, wanted = (gather_part(x.byte(), part).bool() for x in (selection, wanted))
    pairs = selection.sum((-2, -1))
    cut = wanted.sum((-2, -1)) - pairs
    if queries is None:
        tiles = selection_tiles(selection, partition, "block", key_valid=key_valid).some
    else:  # of some frames, which stay in raster order
        selected, groups = key_groups(selection, partition, queries)
        tiles = group_tiles(selected, partition.to_block_order(groups, dim=0), key_valid=key_valid).some
    return AttentionStats(_share(pairs, selection[0, 0].numel()), tiles.float().mean((-2, -1)), pairs, cut)


def shared_stats(
    selected: Tensor,
    slots: Slots,
    partition: BlockPartition,
    key_valid: Tensor | None = None,
    queries: Queries | None = None,
) -> AttentionStats:
    """Stats of what each tile of ``slots`` attends, bool ``(B, H, tiles, G)``."""
    pairs = _shared_pairs(selected, slots, partition)
    of_keys = slots if queries is None else block_slots(partition, selected.device, slots.tile_size)
    tiles = slot_tile_map(selected, of_keys, valid_slots(of_keys, key_valid), len(slots.slot_key)).some
    return AttentionStats(
        _share(pairs, _all_pairs(partition, queries)), tiles.float().mean((-2, -1)), pairs, torch.zeros_like(pairs)
    )


def dense_stats(query: Tensor, partition: BlockPartition, queries: Queries | None = None) -> AttentionStats:
    """Stats of full attention."""
    ones = torch.ones(query.shape[:2], dtype=torch.float32, device=query.device)
    pairs = torch.full_like(ones, _all_pairs(partition, queries), dtype=torch.int64)
    return AttentionStats(ones, ones.clone(), pairs, torch.zeros_like(pairs))


def _shared_pairs(selected: Tensor, slots: Slots, partition: BlockPartition) -> Tensor:
    is_video = slots.tile_group < partition.num_blocks
    return (selected[..., : partition.num_blocks].sum(-1) * (slots.tile_keys * is_video)).sum(-1)


def _share(pairs: Tensor, every: int) -> Tensor:
    """Pairs of all, float32 whatever the default dtype; the quotient is rounded once."""
    return (pairs.double() / every).float()


def _all_pairs(partition: BlockPartition, queries: Queries | None = None) -> int:
    return (partition.num_video_tokens if queries is None else queries.video) * partition.num_blocks


def _stats_of_pieces(pieces: tuple[Attended, ...]) -> AttentionStats:
    """The stats of a causal call; a chunk's tiles count as many as it has queries times keys."""
    every = [piece.stats() for piece in pieces]
    pairs, cut = (torch.stack([getattr(stats, name) for stats in every]).sum(0) for name in ("pairs", "cut"))
    weights = [piece.query.shape[2] * piece.key.shape[2] for piece in pieces]
    tiles = _mean([stats.tile_density for stats in every], weights)
    return AttentionStats(_share(pairs, sum([piece.every for piece in pieces])), tiles, pairs, cut)


def _mean(x: list[Tensor], weights: list[int]) -> Tensor:
    """The weighted mean, float32."""
    weighted = [each.double() * weight for each, weight in zip(x, weights, strict=True)]
    return (torch.stack(weighted).sum(0) / sum(weights)).float()
