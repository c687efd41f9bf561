"""Moves tokens into slots and back in plain PyTorch; ``move_kernels`` is the same in Triton."""

import torch
from torch import Tensor


def take_slots(source: Tensor, index: Tensor, repeats: int = 1) -> Tensor:
    """Reorders the tokens of each head, and adds up ``repeats`` neighbouring heads.

    Args:
        source: ``(heads * repeats, length, D)``.
        index: int64 ``(places,)`` or, for as many heads each, ``(rows, places)``; -1 where the result is zero.
        repeats: neighbouring heads to add up, in float32 at least.

    Returns:
        ``(heads, places, D)``.
    """
    of_head = index.view(-1, index.shape[-1]).repeat_interleave(len(source) // (index.numel() // index.shape[-1]), 0)
    of_head = of_head[..., None]
    taken = source.gather(1, of_head.clamp(min=0).expand(-1, -1, source.shape[-1]))
    taken = torch.where(of_head >= 0, taken, 0)
    exact = torch.promote_types(source.dtype, torch.float32)
    return taken.unflatten(0, (-1, repeats)).sum(1, dtype=exact).to(source.dtype)
