"""Attention over packed rows, and over tiles of slots, by FlashAttention-4, where ``flash_check.py`` lets it.

Its dq is summed by atomics: two runs may differ in the last bits.

Its private ``_flash_attn_fwd`` and ``_flash_attn_bwd`` are called here and nowhere else: the public function keeps the
output and log-sum-exp of each row for backward, which would run the rows again where the merged ones already do.
"""

# pyright: reportMissingImports=false
import functools

import torch
from torch import Tensor

from block_masks.masks.row_mask import key_tile_lists
from block_masks.plans import move_kernels
from block_masks.plans.rows import RowPlan
from block_masks.plans.slots import Slots


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: RowPlan,
    slots: Slots,
    pool_lengths: Tensor,
    section: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a section's rows over whole tiles; see ``row_steps.forward``.

    Slots that only fill a tile take part: see ``slot_attention.py``, and ``packed.py`` for what takes them out again.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    rows = move_kernels.take_rows(query.flatten(0, 1), plan.row_query[section], plan.row_pool[section])
    keys, values = (_of_section(x, query, plan, section) for x in (keys, values))
    lists = (x[None, None].contiguous() for x in key_tile_lists(plan, slots, pool_lengths, section, whole=True))
    output, lse, *_ = _flash_attn_fwd(
        *(x.reshape(1, -1, 1, x.shape[-1]) for x in (rows, keys, values)),
        softmax_scale=scale, return_lse=True,
        block_sparse_tensors=BlockSparseTensorsTorch(*lists, block_size=(plan.tile_size, plan.tile_size)),
    )  # fmt: skip
    return output[0, :, 0], lse[0, 0]


def backward(
    query: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, keys: Tensor, values: Tensor,
    grad_keys: Tensor, grad_values: Tensor, plan: RowPlan, slots: Slots, pool_lengths: Tensor, section: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gradients through a section's rows; see ``row_steps.backward``."""
    from flash_attn.cute.interface import _flash_attn_bwd

    row_query, row_pool = plan.row_query[section], plan.row_pool[section]
    # Its tiles reach past the end of a sequence: zero times what stands there, queries or keys, must be zero.
    take = functools.partial(move_kernels.take_rows, row_query=row_query, row_pool=row_pool, clear_next=True)
    rows, grads = (take(x.flatten(0, 1))[:, None] for x in (query, grad))
    row_lse, row_delta = take(lse.flatten(), fill=torch.inf), take(delta.flatten())
    # It subtracts the gradient of the log-sum-exp from the sum of grad * output. The whole of that is known here, so
    # that the rows' outputs need not be gathered: a row of zeros stands for them all.
    outputs = values.new_zeros(1, 1, values.shape[-1]).expand(len(rows), -1, -1)
    keys, values = (_of_section(x, query, plan, section) for x in (keys, values))
    heads = len(keys)
    part = slice(section * heads, (section + 1) * heads)
    # It writes to the slots of the keys that take part alone: what stands in the others is read by nobody.
    grad_rows, *_ = _flash_attn_bwd(
        rows, *(x.flatten(0, 1)[:, None] for x in (keys, values)), outputs, grads, row_lse[None],
        dlse=-row_delta[None], softmax_scale=scale, **_lengths(plan, slots, pool_lengths, section),
        **{name: x[part].flatten(0, 1)[:, None] for name, x in (("dk", grad_keys), ("dv", grad_values))},
    )  # fmt: skip
    return grad_rows[:, 0]


def attend_tiles(
    query: Tensor, key: Tensor, value: Tensor, lists: list[Tensor], scale: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """See ``slot_steps.attend_tiles``."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    output = query.new_empty(*query.shape[:3], value.shape[-1])
    _, lse, *_ = _flash_attn_fwd(
        *(_aligned(x).transpose(1, 2) for x in (query, key, value)), softmax_scale=scale, return_lse=True,
        block_sparse_tensors=BlockSparseTensorsTorch(*lists, block_size=(tile_size, tile_size)),
        out=output.transpose(1, 2),
    )  # fmt: skip
    return output, lse


def attend_tiles_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    transposed: list[Tensor], scale: float, tile_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``slot_steps.attend_tiles_backward``."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_bwd

    grad_query, grad_key, grad_value, *_ = _flash_attn_bwd(
        *(_aligned(x).transpose(1, 2) for x in (query, key, value, output, grad)), lse, softmax_scale=scale,
        block_sparse_tensors=BlockSparseTensorsTorch(*transposed, block_size=(tile_size, tile_size)),
    )  # fmt: skip
    grad_query, grad_key, grad_value = (x.transpose(1, 2).contiguous() for x in (grad_query, grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _of_section(x: Tensor, query: Tensor, plan: RowPlan, section: int) -> Tensor:
    """Keys or values ``(heads, slots, D)`` of each query head of a section."""
    x = _aligned(x)
    heads = len(query) // len(plan.row_pool)
    part = slice(section * heads, (section + 1) * heads)
    if len(x) == len(query):
        return x[part]
    return x.repeat_interleave(len(query) // len(x), 0)[part].contiguous()


def _aligned(x: Tensor) -> Tensor:
    """A tensor that starts at a multiple of 16 bytes, as its kernels expect; keys in place may come from anywhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _lengths(plan: RowPlan, slots: Slots, pool_lengths: Tensor, section: int) -> dict[str, object]:
    """A section's pools as sequences: their rows, padding included, and their slots, with the keys that take part."""
    groups, sections = len(slots.group_lengths), len(plan.row_pool)
    heads = len(plan.query_count) // sections
    part = slice(section * heads * groups, (section + 1) * heads * groups)
    ends = plan.first_tile[part] + plan.tiles[part]
    slot_ends = torch.cat([slots.first_slot[1:], slots.first_slot.new_full((1,), len(slots.slot_key))])
    head = torch.arange(heads, dtype=torch.int32, device=ends.device)[:, None]
    slot_ends = (slot_ends + head * len(slots.slot_key)).flatten()
    return {
        "cu_seqlens_q": torch.cat([torch.zeros_like(ends[:1]), ends * plan.tile_size]),
        "cu_seqlens_k": torch.cat([torch.zeros_like(slot_ends[:1]), slot_ends]),
        "seqused_k": pool_lengths[part],
        "max_seqlen_q": -(-plan.query_rows.shape[-1] // plan.tile_size) * plan.tile_size,
        "max_seqlen_k": max(slots.group_sizes),
    }
