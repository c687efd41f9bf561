"""Whether torch's own transforms must see through a call: ops with a backward of their own hide derivatives from them.

The backward of such an op is an op too. It gives first derivatives by ``backward`` and ``torch.autograd.grad``. For
everything else the callers of ops take the same steps in plain PyTorch.
"""

import functools
import logging

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from block_masks.launching.constant import constant_when_compiled

_LOG = logging.getLogger(__name__)


def in_transform(*tensors: Tensor | None) -> bool:
    """Whether ``torch.func`` transforms the running code, or one of the tensors is a dual number.

    Logs once that the call is then slow.
    """
    found = transformed(*tensors)
    if found and not torch.compiler.is_compiling():
        log_plain("torch.func or forward-mode derivatives")
    return found


def transformed(*tensors: Tensor | None) -> bool:
    """``in_transform``, without the log."""
    return _in_torch_func() or (not torch.compiler.is_compiling() and any(map(_is_dual, tensors)))


def can_read(x: Tensor) -> bool:
    """Whether a check may look at the values of a tensor: on a CPU, outside of graphs and transforms."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling() and not _in_torch_func()


@functools.cache
def log_plain(reason: str) -> None:
    """Logs each reason once."""
    _LOG.warning("attention runs in plain PyTorch, at the cost of full attention: %s", reason)


def _is_dual(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point() and unpack_dual(x).tangent is not None


# torch has no public name for this. A test holds it to all transforms.
@constant_when_compiled
def _in_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
