"""VMoBA with a tail as inputs of ``flex_attention``: cells are more keys, seen where their block was not chosen."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks import group_mask, realize
from vmoba_flex.cells import coarse_keys
from vmoba_flex.groups import valid_keys
from vmoba_flex.inputs import check_query_key, check_tail, check_text_lengths, check_value, under_autocast
from vmoba_flex.mask import TokenOrder, check_mask_options, chosen, ordered_groups
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import reach
from vmoba_flex.rules import Rule
from vmoba_flex.selection.bits import Choice
from vmoba_flex.selection.kept import Selection, one_of
from vmoba_flex.tail import Tail

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class FlexInputs(NamedTuple):
    """What ``flex_attention`` takes next to query.

    Attributes:
        key: ``(B, key heads, S + C, D)``: the keys, then the mean of each of C cells.
        value: ``(B, key heads, S + C, value dim)``.
        block_mask: of shape ``(B, H, S, S + C)``.
        score_mod: adds the log of a cell's tokens to its scores.
    """

    key: Tensor
    value: Tensor
    block_mask: BlockMask
    score_mod: ScoreMod


def vmoba_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule | None,
    *,
    tail: Tail,
    token_order: TokenOrder = "raster",
    choice: Choice = "token",
    tile_size: int = 128,
    text_lengths: Tensor | None = None,
    selection: Selection | None = None,
) -> FlexInputs:
    """Chooses blocks, and returns what ``flex_attention`` needs to attend them and the cells of all others.

    Nothing is read back to the host and no S x S tensor is made. Inside ``torch.compile`` it becomes part of the graph.
    Gradients flow through the means to every key and value.

    Args:
        query: ``(B, H, S, D)`` in ``token_order``, prefix and suffix included; floating point. Under autocast all three
            tensors are cast first, as in ``vmoba_attention``, and so are the results.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``; or None, with a ``selection``.
        tail: the cells.
        token_order: as in ``vmoba_mask``.
        choice: as in ``vmoba_mask``.
        tile_size: as in ``vmoba_mask``.
        text_lengths: as in ``vmoba_attention``.
        selection: as in ``vmoba_mask``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or a cell is larger than a block.

    Example:
        >>> import torch
        >>> from torch.nn.attention.flex_attention import flex_attention
        >>> from vmoba_flex import BlockPartition, Tail, TopK, vmoba_inputs
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> partition = BlockPartition.spatial((4, 8, 8), (4, 4))
        >>> key, value, mask, score_mod = vmoba_inputs(q, k, v, partition, TopK(1), tail=Tail((2, 2, 2)))
        >>> flex_attention(q, key, value, block_mask=mask, score_mod=score_mod).shape
        torch.Size([1, 2, 256, 16])
    """
    check_mask_options(token_order, choice, tile_size)
    given = one_of(rule, selection)
    query, key, value = under_autocast(query, key, value)
    partition = check_query_key(query, key, partition, rule)
    check_value(value, query, key)
    check_text_lengths(text_lengths, query, partition)
    check_tail(tail, partition)
    q, k, v = (x if token_order == "raster" else partition.to_raster_order(x) for x in (query, key, value))
    coarse = coarse_keys(k, v, partition, tail)
    selected, groups = ordered_groups(chosen(q, k, partition, given, choice), partition, token_order)
    # The cells of a block are one more group, which a query attends where it did not choose the block.
    others = ~selected[..., : partition.num_blocks]
    if partition.causal_frames is not None:
        allowed = ordered_groups(reach(partition, others.device)[None, None], partition, token_order)[0]
        others = others & allowed[..., : partition.num_blocks]
    key_group = torch.cat([groups, coarse.group + selected.shape[-1]])
    valid = valid_keys(partition, text_lengths)
    if valid is not None:
        valid = F.pad(valid, (0, len(coarse.group)), value=True)
    mask = group_mask(torch.cat([selected, others], -1), key_group, tile_size=tile_size, key_valid=valid)
    bias = realize(F.pad(coarse.bias, (partition.num_tokens, 0)))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + bias[kv_idx]

    key, value = (
        torch.cat([x, means.unflatten(0, x.shape[:2])], 2) for x, means in ((key, coarse.key), (value, coarse.value))
    )
    return FlexInputs(key, value, mask, score_mod)
