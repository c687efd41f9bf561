"""Exact masked attention in plain PyTorch, where FlexAttention cannot run: see ``compiled.has_flex_kernel``."""

import functools
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from block_masks.launching.transforms import in_transform
from block_masks.precision import accumulator, without_autocast

# Scores held at a time, over samples, heads, queries of the chunk and keys: 256 MiB in float32.
_CHUNK_SCORES = 2**26


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    key_group: Tensor,
    scale: float | None,
    key_valid: Tensor | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each query over the keys of its selected groups, a chunk of queries at a time.

    Costs as much as full attention. Backward recomputes each chunk, so that memory grows linearly with the tokens.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selected: bool ``(B, H, S, G)``.
        key_group: int64 ``(S,)``.
        scale: ``1 / sqrt(D)`` if None.
        key_valid: bool ``(B, S)``: False at padding, which nobody attends; None without padding.
        lse: whether the log-sum-exp is wanted.

    Returns:
        ``(B, H, S, value dim)`` in query's dtype, and the natural log-sum-exp of each query's scores ``(B, H, S)`` if
        wanted; accumulated in float32, or float64 for float64 inputs.
    """
    batch, heads, tokens, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    rows = max(1, _CHUNK_SCORES // (batch * heads * tokens))
    # A checkpoint keeps inputs even where no gradient is wanted, which inference tensors refuse, and stops transforms.
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    attend = _masked_attention
    if needs_grad and not in_transform(query, key, value):
        attend = functools.partial(checkpoint, _masked_attention, use_reentrant=False)
    chunks = [
        attend(q, key, value, chosen, key_group, scale, key_valid, lse)
        for q, chosen in zip(query.split(rows, 2), selected.split(rows, 2), strict=True)
    ]
    outputs, sums = zip(*chunks, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2) if lse else None


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    key_group: Tensor,
    scale: float,
    key_valid: Tensor | None,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    exact = accumulator(query)
    with without_autocast(query):
        scores = (query.to(exact) @ key.to(exact).mT) * scale
        attended = selected[..., key_group]
        if key_valid is not None:
            attended = attended & key_valid[:, None, None]
        scores = scores.masked_fill(~attended, -torch.inf)
        output = (scores.softmax(-1) @ value.to(exact)).to(query.dtype)
        return output, scores.logsumexp(-1) if lse else None
