"""Query, key, a partition and a rule -> a BlockMask for FlexAttention."""

from typing import Literal, get_args

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks import TileMap, group_mask, group_tiles
from vmoba_flex.checks import check_choice, check_positive
from vmoba_flex.groups import key_groups, valid_keys
from vmoba_flex.inputs import check_query_key, check_text_lengths, under_autocast
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.bits import CHOICES, Choice, of_tokens
from vmoba_flex.selection.kept import Selection, one_of
from vmoba_flex.selection.select import choose_blocks
from vmoba_flex.selection.tiles import choose_by_tiles

TokenOrder = Literal["raster", "block"]
_TOKEN_ORDERS: tuple[TokenOrder, ...] = get_args(TokenOrder)


def vmoba_mask(
    query: Tensor,
    key: Tensor,
    partition: BlockPartition,
    rule: Rule | None,
    *,
    token_order: TokenOrder = "raster",
    choice: Choice = "token",
    tile_size: int = 128,
    text_lengths: Tensor | None = None,
    selection: Selection | None = None,
) -> BlockMask:
    """Chooses blocks and returns the choice as a per-head ``BlockMask`` for ``flex_attention``.

    Nothing is read back to the host and no S x S tensor is made. Inside ``torch.compile`` it becomes part of the graph.

    Args:
        query: ``(B, H, S, D)`` in ``token_order``, prefix and suffix included; floating point. Under autocast both
            tensors are cast first, as in ``vmoba_attention``.
        key: ``(B, key heads, S, D)``; pass ``enable_gqa=True`` to ``flex_attention`` where it has fewer heads.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``; or None, with a ``selection``.
        token_order: the order of the tokens in query, key and value, and so in the mask: ``"raster"`` or ``"block"``
            (see ``BlockPartition.to_block_order``). Block order leaves fewer tiles to run.
        choice: ``"token"``: each query chooses, as in the paper, and FlexAttention runs each tile that at
            least one of its queries wants. ``"tile"``: up to 128 neighbouring queries of a block share one choice, an
            approximation (see the dispatch ``"shared"``); in block order the share of tiles that run is then the
            density, or a little more where a block is no multiple of 128 tokens.
        tile_size: FlexAttention's ``BLOCK_SIZE``, for queries and keys. Compiled kernels on Hopper GPUs need a multiple
            of 128.
        text_lengths: as in ``vmoba_attention``.
        selection: what was chosen before, with this ``choice``, instead of a rule.

    Returns:
        A ``BlockMask`` of shape ``(B, H, S, S)``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the selection has 2**31 entries or more.

    Example:
        >>> import torch
        >>> from torch.nn.attention.flex_attention import flex_attention
        >>> from vmoba_flex import BlockPartition, TopK, vmoba_mask
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> partition = BlockPartition.spatial((4, 8, 8), (4, 4))
        >>> flex_attention(q, k, v, block_mask=vmoba_mask(q, k, partition, TopK(2))).shape
        torch.Size([1, 2, 256, 16])
    """
    check_mask_options(token_order, choice, tile_size)
    given = one_of(rule, selection)
    query, key = under_autocast(query, key)
    partition = check_query_key(query, key, partition, rule)
    check_text_lengths(text_lengths, query, partition)
    if token_order == "block" and selection is None:
        query, key = partition.to_raster_order(query), partition.to_raster_order(key)
    return selection_mask(chosen(query, key, partition, given, choice), partition, token_order, tile_size, text_lengths)


def chosen(query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule | Selection, choice: Choice) -> Tensor:
    """What each video token attends, bool ``(B, H, video tokens, N)`` in raster order.

    Args:
        query: ``(B, H, S, D)`` in raster order; in any for what was chosen before.
        key: like ``query``.
        partition: the blocks.
        rule: chooses them; or what was chosen before.
        choice: what chooses.

    Raises:
        ValueError: if what was chosen before is of another call.
    """
    if isinstance(rule, Selection):
        rule.check(query, partition, choice, f"choice={choice!r}")
        return rule.selected()
    if choice == "token":
        return choose_blocks(query, key, partition, rule)
    return of_tokens(choose_by_tiles(query, key, partition, rule), partition)


def selection_mask(
    selection: Tensor,
    partition: BlockPartition,
    token_order: TokenOrder,
    tile_size: int = 128,
    text_lengths: Tensor | None = None,
) -> BlockMask:
    """Turns a selection ``(B, H, video tokens, N)`` in raster order into a mask for tokens in ``token_order``."""
    # The same in both orders: prefix and suffix do not move, and all video keys are valid.
    valid = valid_keys(partition, text_lengths)
    return group_mask(*ordered_groups(selection, partition, token_order), tile_size=tile_size, key_valid=valid)


def selection_tiles(
    selection: Tensor,
    partition: BlockPartition,
    token_order: TokenOrder,
    tile_size: int = 128,
    key_valid: Tensor | None = None,
) -> TileMap:
    """The tiles of that mask, without the mask; ``key_valid``: bool ``(B, S)``, False at padding."""
    return group_tiles(*ordered_groups(selection, partition, token_order), tile_size, key_valid)


def check_mask_options(token_order: str, choice: str, tile_size: int) -> None:
    """Checks what ``vmoba_mask`` and ``vmoba_inputs`` take alike."""
    check_choice("token_order", token_order, _TOKEN_ORDERS)
    check_choice("choice", choice, CHOICES)
    check_positive("tile_size", tile_size)


def ordered_groups(selection: Tensor, partition: BlockPartition, token_order: TokenOrder) -> tuple[Tensor, Tensor]:
    """``key_groups`` of a selection in raster order, both results in ``token_order``."""
    selection, groups = key_groups(selection, partition)
    if token_order == "block":
        return partition.to_block_order(selection), partition.to_block_order(groups, dim=0)
    return selection, groups
