"""What an adapter is: where a model's self-attention is, which grid it attends, and what else it attends."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from torch import nn

from vmoba_flex.checks import check_choice
from vmoba_flex.config_fields import LayerRule
from vmoba_flex.models.dispatcher import check_hands_over
from vmoba_flex.models.hook import HookedProcessor, Padding, hooked
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import Grid, ModelState, Rest

_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model", "model")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How a model takes VMoBA.

    The processors of its layers call diffusers' ``dispatch_attention_fn``, or there is a ``processor`` for them.

    Attributes:
        layers: paths of its self-attention layers, in order; ``*`` stands for each entry of a list of blocks, as in
            ``"blocks.*.attn1"``.
        grid: ``(model, forward's arguments by name)`` -> latent video size after patching.
        rest: where tokens lie that are not the grid's, as text does: before the video, after it, or nowhere. They
            attend all, and all attend them.
        prefix: ``(model, forward's arguments by name)`` -> tokens before the grid's, of a model that has some on both
            sides; ``rest`` is then ``"suffix"``.
        padding: where padding lies among these tokens: after the valid ones, anywhere, or nowhere. The layers' mask
            says so, bool ``(B, 1, 1, S)``; with ``"none"`` there must be no mask.
        processor: of layers whose stock processors do not use the dispatcher.
        stock: names of the classes that ``processor`` can replace.
        refuse: why a model cannot take VMoBA, or None if it can.
        refused_pipelines: names of pipeline classes that VMoBA cannot run in, each with the way out.
    """

    layers: tuple[str, ...]
    grid: Callable[[Any, dict[str, Any]], Grid]
    rest: Rest = "none"
    prefix: Callable[[Any, dict[str, Any]], int] = lambda model, arguments: 0
    padding: Padding = "none"
    processor: type[VMoBAProcessor] | None = None
    stock: tuple[str, ...] = ()
    refuse: Callable[[Any], str | None] = lambda model: None
    refused_pipelines: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, tuple) or not all(isinstance(path, str) for path in self.layers):
            raise TypeError(f'layers must be a tuple of paths such as "blocks.*.attn1", got {self.layers!r}')
        for name in ("grid", "prefix", "refuse"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}")
        check_choice("rest", self.rest, get_args(Rest))
        check_choice("padding", self.padding, get_args(Padding))
        if self.processor is not None and not (
            isinstance(self.processor, type) and issubclass(self.processor, VMoBAProcessor)
        ):
            raise TypeError(f"processor must be a class of VMoBAProcessors or None, got {self.processor!r}")
        if not isinstance(self.stock, tuple) or not all(isinstance(name, str) for name in self.stock):
            raise TypeError(f"stock must be a tuple of names of classes, got {self.stock!r}")
        refused: Any = self.refused_pipelines
        if not isinstance(refused, Mapping) or not all(isinstance(x, str) for pair in refused.items() for x in pair):
            raise TypeError(f"refused_pipelines must be a mapping from name to way out, got {refused!r}")

    def layers_of(self, model: nn.Module) -> list[tuple[str, Any]]:
        """The self-attention layers of a model, unwrapped, each with its name."""
        return [(name, unwrap_layer(layer)) for path in self.layers for name, layer in _at(path.split("."), model)]

    def check(self, processor: Any, where: str) -> None:
        """Raises unless a layer's processor can be replaced.

        Raises:
            ValueError: if it cannot.
            RuntimeError: if VMoBA does not fit the installed diffusers.
        """
        if self.processor is None:
            check_hands_over(processor, where)
        elif type(processor).__name__ not in self.stock:
            raise ValueError(
                f"{where} must have a processor of its model's own ({' or '.join(self.stock)}), got "
                f"{type(processor).__name__}"
            )

    def joint(self, model: nn.Module) -> bool:
        """Whether ranks cannot share a model's tokens, because others attend with the video and nobody planned it."""
        if self.processor is not None:
            return self.processor.joint
        return self.rest != "none" and getattr(model, "_cp_plan", None) is None

    def processor_for(
        self, model: nn.Module, stock: Any, state: ModelState, kind: str, rule: LayerRule
    ) -> VMoBAProcessor:
        """The processor that replaces a layer's stock one."""
        if self.processor is not None:
            return self.processor(stock, state, kind, rule)
        made: type[HookedProcessor] = hooked(type(stock))
        return made(stock, state, kind, rule, padding=self.padding, joint=self.joint(model))


def _at(path: list[str], module: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """What lies at a path, each with its name."""
    if not path:
        yield name.removesuffix("."), module
    elif path[0] == "*":
        for i, entry in enumerate(module):
            yield from _at(path[1:], entry, f"{name}{i}.")
    else:
        yield from _at(path[1:], getattr(module, path[0]), f"{name}{path[0]}.")


def unwrap_layer(layer: nn.Module) -> nn.Module:
    """The layer inside the wrappers of torch and PEFT."""
    while "processor" not in vars(layer) and (inner := inside(layer)) is not None:
        layer = inner
    return layer


def inside(wrapper: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, by the names that torch and PEFT have for it."""
    return next((inner for name, inner in wrapper.named_children() if name in _WRAPPED), None)
