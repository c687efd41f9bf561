"""What VMoBA uses of diffusers' insides, because nothing public serves; checked before anything is applied.

The hook needs a dispatcher of attention that calls registered backends and hands the parallel config on as it is, and
processors that call it with a backend and a config of their own. Skipping layers needs to be told of our processors.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Our backend of diffusers' dispatcher, whose names these are."""
    if not hasattr(_parallel_config, "attend_call"):
        raise ValueError(
            "every call of a layer with VMoBA applied must pass the parallel config of its processor, got one with "
            f"{type(_parallel_config).__name__}"
        )
    options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    return _parallel_config.attend_call(query, key, value, attn_mask, is_causal, **options)


class _Probe:
    """Stands for a layer, and shows that a call arrives."""

    def attend_call(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, is_causal: bool, **options: Any) -> Any:
        return key - query + value + mask


@functools.cache
def our_backend() -> Any:
    """The backend that diffusers' dispatcher knows VMoBA by. It is in no enum, so that no user can set it by name.

    Raises:
        RuntimeError: if the dispatcher of the installed diffusers does not do what the hook needs.
    """
    import diffusers

    try:
        from diffusers.models import attention_dispatch

        backend = str.__new__(attention_dispatch.AttentionBackendName, "vmoba")
        backend._name_, backend._value_ = "VMOBA", "vmoba"
        attention_dispatch._AttentionBackendRegistry.register(backend)(_attend)
        x = torch.arange(4.0, device="cpu").view(4, 1, 1, 1, 1)
        dispatch: Any = attention_dispatch.dispatch_attention_fn
        arrived = dispatch(x[0], x[1], x[2], attn_mask=x[3], backend=backend, parallel_config=_Probe())
        if arrived.item() != 6:
            raise ValueError(f"the dispatcher changed query, key, value or mask, got {arrived.item()} for 6")
    except Exception as error:  # another diffusers may fail in any way; the message says which
        raise RuntimeError(
            f"diffusers {diffusers.__version__} must pass calls of dispatch_attention_fn on to a registered backend "
            f"for VMoBA, which was tested with 0.42.1, got {type(error).__name__}: {error}"
        ) from error
    return backend


def check_hands_over(processor: Any, where: str) -> None:
    """Raises unless a stock processor hands its attention to the dispatcher, with its own backend and config.

    Args:
        processor: of a layer.
        where: the name of the layer.

    Raises:
        ValueError: if it does not.
        RuntimeError: as in ``our_backend``.
    """
    import diffusers

    names: tuple[str, ...] = getattr(getattr(type(processor).__call__, "__code__", None), "co_names", ())
    missing = [x for x in ("dispatch_attention_fn", "_attention_backend", "_parallel_config") if x not in names]
    if missing:
        raise ValueError(
            f"{where} must have a processor that calls diffusers' dispatch_attention_fn with its _attention_backend "
            f"and _parallel_config, got {type(processor).__name__} without {missing[0]} (diffusers "
            f"{diffusers.__version__}; tested with 0.42.1)"
        )
    our_backend()


def skips_scores(layer: nn.Module) -> bool:
    """Whether a hook of diffusers on the layer asks for its value as its output (perturbed-attention guidance)."""
    hooks = getattr(getattr(layer, "_diffusers_hook", None), "hooks", {})
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())


def register_for_layer_skipping(processor: type) -> None:
    """Tells diffusers what a skipped layer returns; without it skipping layers fails."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
    except ImportError:
        return
    skip: Any = _skip
    AttentionProcessorRegistry.register(processor, AttentionProcessorMetadata(skip))


def _skip(layer: Any, hidden_states: Any, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)
