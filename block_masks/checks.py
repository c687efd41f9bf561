"""Checks of single values: a bad one raises ``TypeError`` or ``ValueError`` with its name, the rule and the value."""

import sys
from typing import Any, Literal

import torch
from torch import Tensor

_MAX_TILE = 2**16  # far more than any kernel takes; the last tile is padded to it
Kind = Literal["any", "bool", "uint8", "int32", "int64", "int", "float"]
_KINDS: dict[Kind, tuple[str, tuple[torch.dtype, ...]]] = {
    "any": ("a", ()),
    "bool": ("a bool", (torch.bool,)),
    "uint8": ("a uint8", (torch.uint8,)),
    "int32": ("an int32", (torch.int32,)),
    "int64": ("an int64", (torch.int64,)),
    "int": ("an int32 or int64", (torch.int32, torch.int64)),
    "float": (
        "a float16, bfloat16, float32 or float64",
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
}


def check_positive(name: str, value: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_tile_size(value: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is a number of tokens in a tile."""
    check_positive("tile_size", value)
    if value > _MAX_TILE:
        raise ValueError(f"tile_size must be at most {_MAX_TILE}, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_finite(name: str, value: Any, expected: str = "a number") -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if value != value or abs(value) > sys.float_info.max:  # an int may be too large for math.isnan
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_is(name: str, value: Any, cls: type, source: str = "") -> None:
    """Raises ``TypeError`` unless ``value`` is of a class; ``source``: what makes one."""
    if not isinstance(value, cls):
        raise TypeError(f"{name} must be {cls.__name__}{source and f', from {source}'}, got {type(value).__name__}")


def check_tensor(name: str, x: Any, kind: Kind = "any", dims: tuple[str, ...] = ()) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``x`` is a dense tensor of a kind.

    Args:
        name: of the argument.
        x: the value.
        kind: its dtype.
        dims: what each dim counts; any number of dims if empty.
    """
    words, dtypes = _KINDS[kind]
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be {words} tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        given = "a nested tensor" if x.is_nested else x.dtype if x.is_quantized else x.layout
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {given}")
    if dtypes and x.dtype not in dtypes:
        raise TypeError(f"{name} must be {words} tensor, got {x.dtype}")
    if dims and x.dim() != len(dims):
        plural = "s" if len(dims) > 1 else ""
        what = str(dims).replace("'", "")
        raise ValueError(f"{name} must have {len(dims)} dim{plural} {what}, got shape {tuple(x.shape)}")


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], what: str) -> None:
    """Raises ``ValueError`` unless ``x`` has a shape; ``what``: with what it goes then."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} to go with {what}, got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, like: Tensor, owner: str = "query's") -> None:
    """Raises ``ValueError`` unless ``x`` is on the device of another tensor, whose name ``owner`` is."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on {owner} device {like.device}, got {x.device}")
