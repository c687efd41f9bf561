"""Query, key and value -> full attention, by the kernel that torch takes."""

import torch.nn.functional as F
from torch import Tensor


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool, key_valid: Tensor | None = None
) -> Tensor:
    """``scaled_dot_product_attention``.

    The choice of a kernel is torch's: from cuDNN 9.15.1 on it takes cuDNN's on Hopper GPUs, which is the fastest there,
    and leaves older versions out, whose results had errors (pytorch#169849).

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        scale: ``1 / sqrt(D)`` if None.
        enable_gqa: whether key may have fewer heads.
        key_valid: bool ``(B, S)``: False at padding, which nobody attends; None without padding.
    """
    mask = None if key_valid is None else key_valid[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
