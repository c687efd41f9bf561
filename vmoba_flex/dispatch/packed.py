"""A selection -> attention with a row for each pair: the cost is the density, even if neighbouring queries disagree."""

import torch
from torch import Tensor

from block_masks import attend_packed
from vmoba_flex.call import Call, ChosenBackend
from vmoba_flex.cell_slots import slots_and_cells
from vmoba_flex.groups import block_slots, valid_group_lengths, with_text
from vmoba_flex.part import Part, Queries
from vmoba_flex.selection.bounds import row_bound
from vmoba_flex.selection.kept import Selection
from vmoba_flex.selection.plan import plan_of_call


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    call: Call,
    backend: ChosenBackend,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with a row per (query, chosen block), a few heads at a time; see ``block_masks.attend_packed``.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video queries, N)``, made by the call's rule.
        call: what they attend. Its rule bounds the rows; for a ``Threshold`` without ``max_density``, which does not,
            one number is read from the device. At least one head is worked on at a time.
        backend: ``"eager"``, ``"triton"`` or ``"flash"``.
        part: the part of the call on this rank; None for all.

    Returns:
        The output ``(B, H, queries, value dim)`` and the log-sum-exp ``(B, H, queries)``.

    Raises:
        ValueError: inside ``torch.compile``, if the rule does not bound the rows.
    """
    partition = call.partition
    queries = part.queries if part is not None else call.queries or Queries.of(partition)
    heads = query.shape[1]
    all_heads = part.size if part is not None and part.dim == 1 else heads
    plan = None
    if isinstance(call.rule, Selection):
        bound = call.rule.bounds.rows_of(heads)
        plan = plan_of_call(call.rule.plan, call.text_lengths, part, call.queries)
    else:
        competing = None if part is not None else queries.video
        bound = row_bound(partition, call.rule, all_heads, heads, queries, competing)
    if bound is None and torch.compiler.is_compiling():
        raise ValueError(
            "rule must bound its pairs for dispatch='packed' inside torch.compile: give Threshold a max_density, "
            "or use TopK; a selection that such a rule made has a bound if it was made outside"
        )
    lengths = None if call.text_lengths is None else valid_group_lengths(partition, call.text_lengths)
    slots, coarse = block_slots(partition, query.device) if plan is None else plan.slots, None
    if call.tail is not None:
        key, value, coarse = slots_and_cells(key, value, partition, call.tail, slots)
        slots = slots.placed
    return attend_packed(
        query, key, value, with_text(selection, partition, queries), slots,
        scale=call.scale, backend=backend, bound=bound, max_row_bytes=call.max_row_bytes, group_lengths=lengths,
        coarse=coarse, plan=None if plan is None else plan.rows,
    )  # fmt: skip
