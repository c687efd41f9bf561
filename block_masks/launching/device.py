"""Runs an op on the device of its tensors."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_device(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes the first argument's device current: Triton launches on the current device, not on the tensors'."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return run
