"""The names that pipelines give to the passes of a step: with the prompt, without it, and so on."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from vmoba_flex.models.state import ModelState


class NamedPasses:
    """Stands in for a model's ``cache_context``, and notes the name of the pass for the forwards inside it."""

    def __init__(self, model: nn.Module, state: ModelState) -> None:
        self.model, self.state = model, state

    @contextlib.contextmanager
    def __call__(self, name: str, **facts: Any) -> Iterator[None]:
        """The model's own context, with the name noted."""
        model: Any = self.model
        before, self.state.now.context = self.state.now.context, name
        try:
            with type(model).cache_context(model, name, **facts):
                yield
        finally:
            self.state.now.context = before
