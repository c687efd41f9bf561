"""A model's class -> its adapter, of a model of diffusers or registered."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from vmoba_flex.models.adapter import Adapter, inside
from vmoba_flex.models.table import ADAPTERS, REFUSED

_ADAPTERS = dict(ADAPTERS)


def register_adapter(class_name: str, adapter: Adapter) -> None:
    """Makes ``apply_vmoba`` take a model of one's own.

    Args:
        class_name: of the model, or of a class that it derives from.
        adapter: for its layers.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if it is no name of a class, or the class has an adapter.
    """
    if not isinstance(class_name, str):
        raise TypeError(f"class_name must be a str, got {class_name!r}")
    if not class_name.isidentifier():
        raise ValueError(f"class_name must be the name of a class, got {class_name!r}")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
    if class_name in _ADAPTERS:
        raise ValueError(f"class_name must have no adapter yet, got {class_name!r}")
    _ADAPTERS[class_name] = adapter


def find_adapter(model: object) -> Adapter:
    """The adapter of a model's class, or of the nearest one that it derives from.

    Raises:
        TypeError: if none has one.
    """
    if (adapter := _known(model)) is not None:
        return adapter
    if reason := REFUSED.get(type(model).__name__):
        raise TypeError(f"pipe_or_model must not be a {type(model).__name__}: {reason}")
    raise TypeError(
        f"pipe_or_model must be one of {', '.join(sorted(_ADAPTERS))}, or of a class given to register_adapter, got "
        f"{type(model).__name__}"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, PEFT, DDP or FSDP wrappers; ``model`` itself if no class inside is known."""
    inner: nn.Module | None = model
    while inner is not None and _known(inner) is None:
        inner = inside(inner)
    return model if inner is None else inner


def _known(model: object) -> Adapter | None:
    return next((_ADAPTERS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _ADAPTERS), None)


def forward_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the model, by name."""
    return _signature(type(model)).bind(model, *args, **kwargs).arguments


def device_of(arguments: dict[str, Any]) -> torch.device:
    """The device of the first tensor among a forward's arguments, some of which are lists."""
    flat = (x for one in arguments.values() for x in (one if isinstance(one, list) else [one]))
    return next(x.device for x in flat if isinstance(x, torch.Tensor))


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)
