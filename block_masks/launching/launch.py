"""Launches Triton kernels with little work for the host; loaded on first use on a CUDA device."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Triton for AMD compiles other loads where no offset in a buffer passes 32 bits.
_SEES_BUFFERS = torch.version.hip is not None


class QuickLaunch:
    """A kernel that is launched as it is under ``triton.jit`` only, but with less work for the host.

    Triton finds a kernel's compiled form anew at each launch, which takes the host longer than the launch itself. Here
    it is found once for each kind of arguments.

    Args:
        kernel: a function under ``triton.jit``. Its ``tl.constexpr`` arguments follow the others, and are passed
            by name; the first argument is a tensor.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        # The compiled kernel and its constants, by all that Triton compiles another one for.
        self.compiled: dict[tuple[object, ...], tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The launch on this grid."""
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        form = (args[0].device, *map(_kind, args), *constants.items())
        known = self.compiled.get(form)
        if known is not None:
            compiled, values = known
            compiled[(*grid, 1, 1)[:3]](*args, *values)
            return
        compiled = self.kernel[grid](*args, **constants)
        if compiled is not None:  # as it is by Triton's interpreter
            values = [constants[name] for name in self.kernel.arg_names[len(args) :]]
            self.compiled[form] = compiled, values


def _kind(x: Any) -> object:
    """What Triton looks at: types, and of pointers and integers, whether 16 divides them, and whether they are 1."""
    if isinstance(x, Tensor):
        small = not _SEES_BUFFERS or x.untyped_storage().nbytes() < 2**31
        return x.dtype, x.data_ptr() % 16 == 0, small
    if type(x) is int:
        return x == 1, x % 16 == 0, -(2**31) <= x < 2**31, x < 2**63
    return type(x)
