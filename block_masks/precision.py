"""In which dtype sums are taken."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype for sums over ``x``: float64 where ``x`` is, and float32 otherwise."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off on the device of ``x``, if it has any: it would round products to 16 bits."""
    device = x.device.type
    if device == "meta":  # which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
