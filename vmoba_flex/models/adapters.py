"""How a model takes VMoBA: the adapter of its class, of a family of diffusers or registered."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vmoba_flex.models.families import (
    CogVideoXProcessor,
    Grid,
    HunyuanVideo15Processor,
    HunyuanVideoProcessor,
    LTXProcessor,
    MochiProcessor,
    WanProcessor,
    cogvideox_grid,
    ltx_grid,
    patched_grid,
    refuse_block_causal,
)
from vmoba_flex.models.processor import VMoBAProcessor


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How a model family takes VMoBA. The model's forward has an argument ``hidden_states`` on the model's device.

    Attributes:
        processor: of its self-attention layers.
        stock: names of the processor classes that it can replace.
        layers: the self-attention layers of a model, in order, by name.
        grid: ``(model, forward's arguments by name)`` -> latent video size after patching.
        refuse: why a model cannot take VMoBA, or None if it can.
        refused_pipelines: names of pipeline classes that VMoBA cannot run in, each with the way out.
    """

    processor: type[VMoBAProcessor]
    stock: tuple[str, ...]
    layers: Callable[[nn.Module], list[tuple[str, Any]]]
    grid: Callable[[Any, dict[str, Any]], Grid]
    refuse: Callable[[Any], str | None] = lambda model: None
    refused_pipelines: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _attention_of(*path: str) -> Callable[[nn.Module], list[tuple[str, Any]]]:
    """The layers ``model.<blocks>[i].<attention>``, unwrapped, for each ``blocks.attention`` of ``path`` in turn."""

    def layers(model: nn.Module) -> list[tuple[str, Any]]:
        names = [one.split(".") for one in path]
        return [
            (f"{blocks}.{i}.{attention}", _unwrap_layer(getattr(block, attention)))
            for blocks, attention in names
            for i, block in enumerate(getattr(model, blocks))
        ]

    return layers


_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model", "model")

_ADAPTERS: dict[str, Adapter] = {
    "WanTransformer3DModel": Adapter(WanProcessor, ("WanAttnProcessor",), _attention_of("blocks.attn1"), patched_grid),
    "SkyReelsV2Transformer3DModel": Adapter(
        WanProcessor,
        ("SkyReelsV2AttnProcessor",),
        _attention_of("blocks.attn1"),
        patched_grid,
        refuse=refuse_block_causal,
    ),
    "HunyuanVideoTransformer3DModel": Adapter(
        HunyuanVideoProcessor,
        ("HunyuanVideoAttnProcessor2_0",),
        _attention_of("transformer_blocks.attn", "single_transformer_blocks.attn"),
        patched_grid,
    ),
    "HunyuanVideo15Transformer3DModel": Adapter(
        HunyuanVideo15Processor,
        ("HunyuanVideo15AttnProcessor2_0",),
        _attention_of("transformer_blocks.attn"),
        patched_grid,
    ),
    "CogVideoXTransformer3DModel": Adapter(
        CogVideoXProcessor,
        ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
        _attention_of("transformer_blocks.attn1"),
        cogvideox_grid,
    ),
    "LTXVideoTransformer3DModel": Adapter(
        LTXProcessor,
        ("LTXVideoAttnProcessor",),
        _attention_of("transformer_blocks.attn1"),
        ltx_grid,
        refused_pipelines=dict.fromkeys(
            ("LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"),
            "it gives its transformer coordinates in place of a grid. Use LTXPipeline.from_pipe(pipe) or "
            "LTXImageToVideoPipeline.from_pipe(pipe)",
        ),
    ),
    "MochiTransformer3DModel": Adapter(
        MochiProcessor, ("MochiAttnProcessor2_0",), _attention_of("transformer_blocks.attn1"), patched_grid
    ),
}


def register_adapter(class_name: str, adapter: Adapter) -> None:
    """Makes ``apply_vmoba`` take a model of one's own.

    Args:
        class_name: of the model, or of a class that it derives from.
        adapter: for its layers.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the class has an adapter.
    """
    if not isinstance(class_name, str):
        raise TypeError(f"class_name must be a str, got {class_name!r}")
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
    raise TypeError(
        f"pipe_or_model must be one of {', '.join(sorted(_ADAPTERS))}, or of a class given to register_adapter, got "
        f"{type(model).__name__}"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, PEFT, DDP or FSDP wrappers; ``model`` itself if no class inside is known."""
    inner: nn.Module | None = model
    while inner is not None and _known(inner) is None:
        inner = _inside(inner)
    return model if inner is None else inner


def _known(model: object) -> Adapter | None:
    return next((_ADAPTERS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _ADAPTERS), None)


def _unwrap_layer(layer: nn.Module) -> nn.Module:
    while "processor" not in vars(layer) and (inner := _inside(layer)) is not None:
        layer = inner
    return layer


def _inside(wrapper: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, by the names that torch and PEFT have for it."""
    return next((inner for name, inner in wrapper.named_children() if name in _WRAPPED), None)


def forward_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the model, by name."""
    return _signature(type(model)).bind(model, *args, **kwargs).arguments


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)
