"""In which dtype sums are taken."""

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype for sums over ``x``: float64 where ``x`` is, and float32 otherwise."""
    return torch.promote_types(x.dtype, torch.float32)
