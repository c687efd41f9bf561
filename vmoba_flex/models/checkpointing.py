"""Layers that a checkpoint computes again run in the plans of their own forward."""

from collections.abc import Callable
from typing import Any

import torch

from vmoba_flex.models.plan import Forward
from vmoba_flex.models.state import ModelState


class Checkpointing:
    """A function for gradient checkpointing whose layers are computed again in the plans of their forward."""

    def __init__(self, inner: Callable[..., Any], state: ModelState) -> None:
        self.inner, self.state = inner, state

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        # A compiled graph recomputes by itself, without running Python again.
        if not torch.compiler.is_compiling() and self.state.now.forward is not None:
            layer = _Bound(layer, self.state, self.state.now.forward)
        return self.inner(layer, *args, **kwargs)


class _Bound:
    """A layer that runs in the plans of a forward."""

    def __init__(self, layer: Callable[..., Any], state: ModelState, forward: Forward) -> None:
        self.layer, self.state, self.forward = layer, state, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.state.enter(self.forward)
        try:
            return self.layer(*args, **kwargs)
        finally:
            self.state.enter(before)
