"""Full attention by the fastest kernel that torch brings."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On Hopper GPUs cuDNN's kernel takes half the time of the one that torch would prefer (bench/results/).
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Operations below which the host takes longer to prefer a kernel than the GPU would gain by it.
_FEW_OPERATIONS = 5e10


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool, key_valid: Tensor | None = None
) -> Tensor:
    """``scaled_dot_product_attention``, by cuDNN where it can run and is worth asking for.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        scale: ``1 / sqrt(D)`` if None.
        enable_gqa: whether key may have fewer heads.
        key_valid: bool ``(B, S)``: False at keys that nobody attends; all True if None.
    """
    mask = None if key_valid is None else key_valid[:, None, None]
    if not query.is_cuda or 4 * query.numel() * query.shape[2] < _FEW_OPERATIONS:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
