"""The key of a denoise: equal for equal pipelines, calls, configs, prompts and seeds, in every process."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.denoise import Prompt, arguments_of
from vmoba_flex.version import __version__

_SAMPLES = 16
"""Values of each parameter that tell weights apart."""


def identity_of(pipe: Any) -> str:
    """What tells a pipeline's videos and times from another's, as a hash.

    Its class, the config of its scheduler, name, shape, dtype and some values of all weights, adapters and caches, the
    device, and the versions of what runs it.
    """
    device = "cpu"
    if torch.accelerator.is_available():
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
        )
    return _hash(["1", __version__, str(torch.__version__), device, type(pipe).__name__, *_parts(pipe)])


def key_of(
    identity: str, pipe: Any, config: VMoBAConfig | None, prompt: Prompt, seed: int, call: Mapping[str, Any]
) -> str:
    """The key of a denoise, hexadecimal.

    Args:
        identity: of the pipeline, by ``identity_of``.
        pipe: as in ``run_denoise``, with all that follows.
        config: None for full attention.
        prompt: a text or arguments. Tensors, arrays and images count by their values; other objects by their ``repr``.
        seed: of the noise.
        call: further arguments.
    """
    arguments = arguments_of(pipe, prompt, call)
    return _hash([identity, "full" if config is None else config.to_json(), str(seed), *_of_value(arguments)])


def _parts(pipe: Any) -> Iterator[str]:
    components = getattr(pipe, "components", None)
    for name, part in sorted((components if isinstance(components, Mapping) else vars(pipe)).items()):
        yield f"{name}: {type(part).__name__}"
        if isinstance(part, nn.Module):
            yield from _of_module(part)
        elif isinstance(config := getattr(part, "config", None), Mapping):
            yield json.dumps(dict(config), sort_keys=True, default=repr)
    if isinstance(config := getattr(pipe, "config", None), Mapping):
        yield json.dumps({key: one for key, one in config.items() if isinstance(one, bool | int | float | str)})


def _of_module(module: nn.Module) -> Iterator[str]:
    yield repr(getattr(module, "_cache_config", None))
    for name, one in module.named_modules():
        if hasattr(one, "lora_A"):
            facts = (getattr(one, key, None) for key in ("active_adapters", "scaling", "merged", "disable_adapters"))
            yield f"{name}: {list(facts)}"
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        yield f"{name}: {tuple(weight.shape)} {weight.dtype} {_sample(weight)}"


def _sample(weight: Tensor) -> list[float] | None:
    """Some values, spread evenly; None for weights that are elsewhere, or whose values cannot be read."""
    if weight.is_meta or not weight.numel():
        return None
    places = torch.linspace(0, weight.numel() - 1, min(_SAMPLES, weight.numel()), dtype=torch.float64).long()
    try:
        return weight.detach().flatten()[places.to(weight.device)].double().tolist()
    except (NotImplementedError, RuntimeError, TypeError):  # packed by a library for quantized weights
        return None


def _of_value(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield f"{key}:"
            yield from _of_value(value[key])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}"
        for one in value:
            yield from _of_value(one)
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype} {tuple(plain.shape)} {_digest(plain.flatten().view(torch.uint8).numpy().tobytes())}"
    elif hasattr(value, "__array_interface__"):  # arrays, PIL images
        import numpy as np

        array = np.ascontiguousarray(value)
        yield f"{array.dtype} {array.shape} {_digest(array.tobytes())}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield repr(value)
    else:
        yield f"{type(value).__name__} {value!r}"


def _hash(parts: list[str]) -> str:
    return _digest("\n".join(parts).encode())[:32]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
