"""Attention over packed rows, and over tiles of slots, by FlashAttention-4, where ``flash_check.py`` lets it.

Its dq is summed by atomics: two runs may differ in the last bits.

Its private ``_flash_attn_fwd`` and ``_flash_attn_bwd`` are called here and nowhere else: the public function keeps the
output and log-sum-exp of each row for backward, which would run the rows again where the merged ones already do.
"""

import functools

import torch
from torch import Tensor

from block_masks.attention.flash_warning import ignore_its_warning
from block_masks.attention.row_kernels import delta
from block_masks.attention.row_steps import Merged
from block_masks.plans import move_kernels
from block_masks.plans.section import Section

__all__ = ["attend_tiles", "attend_tiles_backward", "backward", "delta", "forward"]


def forward(query: Tensor, keys: Tensor, values: Tensor, section: Section, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a section's rows over whole tiles; see ``row_steps.forward``.

    Padding slots take part; ``row_attention.py`` removes them again as it merges rows.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    ignore_its_warning()
    tile = section.plan.tile_size
    rows = move_kernels.take_rows(query.flatten(0, 1), section.row_query, section.row_pool)
    keys, values = (_of_section(x, len(query), section) for x in (keys, values))
    lists = (x[None, None].contiguous() for x in section.key_tile_lists(whole=True))
    output, lse, *_ = _flash_attn_fwd(
        *(x.reshape(1, -1, 1, x.shape[-1]) for x in (rows, keys, values)), softmax_scale=scale, return_lse=True,
        block_sparse_tensors=BlockSparseTensorsTorch(*lists, block_size=(tile, tile)),
    )  # fmt: skip
    return output[0, :, 0], lse[0, 0]


def backward(
    query: Tensor, keys: Tensor, values: Tensor, merged: Merged, grads: tuple[Tensor, Tensor], section: Section,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gradients through a section's rows; see ``row_steps.backward``."""
    from flash_attn.cute.interface import _flash_attn_bwd

    ignore_its_warning()
    # Its tiles reach past the end of a sequence, where zero times what they read must be zero: clear the next tile.
    take = functools.partial(
        move_kernels.take_rows, row_query=section.row_query, row_pool=section.row_pool, clear_next=True
    )
    rows, row_grads = (take(x.flatten(0, 1))[:, None] for x in (query, merged.grad))
    row_lse, row_delta = take(merged.lse.flatten(), fill=torch.inf), take(merged.delta.flatten())
    # Delta is known, so pass output = 0 and dlse = -delta: it computes delta as sum(grad * output) - dlse.
    outputs = values.new_zeros(1, 1, values.shape[-1]).expand(len(rows), -1, -1)
    keys, values = (_of_section(x, len(query), section) for x in (keys, values))
    # It writes only the slots of valid keys. Nothing reads the others.
    grad_rows, *_ = _flash_attn_bwd(
        rows, *(x.flatten(0, 1)[:, None] for x in (keys, values)), outputs, row_grads, row_lse[None],
        dlse=-row_delta[None], softmax_scale=scale, **_lengths(section),
        **{name: x[section.of_heads].flatten(0, 1)[:, None] for name, x in zip(("dk", "dv"), grads, strict=True)},
    )  # fmt: skip
    return grad_rows[:, 0]


def attend_tiles(
    query: Tensor, key: Tensor, value: Tensor, lists: list[Tensor], scale: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """See ``slot_steps.attend_tiles``."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    ignore_its_warning()
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

    ignore_its_warning()
    grad_query, grad_key, grad_value, *_ = _flash_attn_bwd(
        *(_aligned(x).transpose(1, 2) for x in (query, key, value, output, grad)), lse, softmax_scale=scale,
        block_sparse_tensors=BlockSparseTensorsTorch(*transposed, block_size=(tile_size, tile_size)),
    )  # fmt: skip
    grad_query, grad_key, grad_value = (x.transpose(1, 2).contiguous() for x in (grad_query, grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _of_section(x: Tensor, heads: int, section: Section) -> Tensor:
    """Keys or values ``(heads, slots, D)`` of each query head of a section; ``heads``: query heads in all."""
    x = _aligned(x)
    if len(x) == heads:
        return x[section.of_heads]
    return x.repeat_interleave(heads // len(x), 0)[section.of_heads].contiguous()


def _aligned(x: Tensor) -> Tensor:
    """A tensor that starts at a multiple of 16 bytes, as its kernels expect; keys in place may come from anywhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _lengths(section: Section) -> dict[str, object]:
    """A section's pools as sequences: their rows, padding included, and their slots, of which the first are valid."""
    plan, slots, pools = section.plan, section.slots, section.of_pools
    ends = plan.first_tile[pools] + plan.tiles[pools]
    slot_ends = torch.cat([slots.first_slot[1:], slots.first_slot.new_full((1,), len(slots.slot_key))])
    head = torch.arange(section.heads, dtype=torch.int32, device=ends.device)[:, None]
    slot_ends = (slot_ends + head * len(slots.slot_key)).flatten()
    return {
        "cu_seqlens_q": torch.cat([torch.zeros_like(ends[:1]), ends * plan.tile_size]),
        "cu_seqlens_k": torch.cat([torch.zeros_like(slot_ends[:1]), slot_ends]),
        "seqused_k": section.pool_lengths[pools],
        "max_seqlen_q": -(-plan.query_rows.shape[-1] // plan.tile_size) * plan.tile_size,
        "max_seqlen_k": max(slots.group_sizes),
    }
