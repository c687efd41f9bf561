"""Exact masked attention in plain PyTorch, for training on a CPU, where FlexAttention has no backward."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from block_masks import CoarseKeys

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
    coarse: CoarseKeys | None = None,
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
        key_valid: bool ``(B, S)``: False at keys that nobody attends; all True if None.
        coarse: keys of the groups that a query did not choose, of ``B * key heads`` heads.
        lse: whether the log-sum-exp is wanted.

    Returns:
        ``(B, H, S, value dim)`` in query's dtype, and the natural log-sum-exp of each query's scores ``(B, H, S)`` if
        wanted, without a gradient; accumulated in float32, or float64 for float64 inputs.
    """
    batch, heads, tokens, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    keys, values = [key], [value]
    if coarse is not None:
        keys.append(coarse.key.unflatten(0, key.shape[:2]))
        values.append(coarse.value.unflatten(0, value.shape[:2]))
    key, value = (torch.cat(x, 2).repeat_interleave(heads // key.shape[1], dim=1) for x in (keys, values))
    bias = None if coarse is None else (coarse.bias, coarse.group)
    rows = max(1, _CHUNK_SCORES // (batch * heads * tokens))
    chunks = [
        checkpoint(
            _masked_attention, q, key, value, chosen, key_group, scale, key_valid, bias, lse, use_reentrant=False
        )
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
    coarse: tuple[Tensor, Tensor] | None,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(exact) @ key.to(exact).mT) * scale
        attended = selected[..., key_group]
        if key_valid is not None:
            attended = attended & key_valid[:, None, None]
        if coarse is not None:
            bias, group = coarse
            attended = torch.cat([attended, ~selected[..., group]], -1)
            scores = scores + F.pad(bias.to(exact), (scores.shape[-1] - len(bias), 0))
        scores = scores.masked_fill(~attended, -torch.inf)
        output = (scores.softmax(-1) @ value.to(exact)).to(query.dtype)
        return output, scores.detach().logsumexp(-1) if lse else None
