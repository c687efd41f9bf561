"""Tensors that follow from a partition alone, kept from one call to the next."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_T = TypeVar("_T")

# Partitions are as many as the resolutions and block shapes in use.
_MOST = 64


def kept(function: Callable[..., _T]) -> Callable[..., _T]:
    """Keeps what a function of ``(hashable, device, ...)`` made on a GPU, where each small kernel costs a launch.

    Nobody may write to what it returns. Each stream has its own, so that none reads what another has yet to write. Made
    anew each time inside ``torch.compile``, which sees the steps; while a CUDA graph is captured, to whose memory and
    replays it belongs; and for tensors that hold no numbers.
    """
    known: OrderedDict[Any, _T] = OrderedDict()

    @functools.wraps(function)
    def get(first: Any, device: torch.device, *rest: Any) -> _T:
        if torch.compiler.is_compiling() or device.type != "cuda" or is_in_torch_dispatch_mode():
            return function(first, device, *rest)
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return function(first, device, *rest)
            place = first, torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, rest
        made = known.get(place)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = known[place] = function(first, device, *rest)
            if len(known) > _MOST:
                known.popitem(last=False)
        return made

    return get
