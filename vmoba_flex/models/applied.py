"""VMoBA on one model: its processors, and what readies them before each forward."""

import copy
from typing import Any

from torch import Tensor, nn

from vmoba_flex.models.adapters import Adapter, find_adapter, forward_arguments
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import Checkpointing, ModelState


class Applied:
    """VMoBA on one model: its processors, and the hook that readies them before each forward."""

    def __init__(self, model: nn.Module, run: ModelState) -> None:
        adapter = find_adapter(model)
        self.run, run.owner = run, self
        layers = adapter.layers(model)
        self.names = [name for name, _ in layers]
        self.processors: list[VMoBAProcessor] = run.processors
        # The step matters to no kind and no rule.
        plans = [run.config.layer(i, len(layers), step=0, num_steps=1) for i in range(len(layers))]
        for (_, layer), plan in zip(layers, plans, strict=True):
            processor = adapter.processor(layer.processor, run, plan.kind, plan.rule)
            self.processors.append(processor)
            layer.processor = processor
        _register_for_layer_skipping(adapter.processor)
        # A class instance and no closure: it can be pickled, and a copy of the model has a copy of it.
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Readies the processors for a forward."""
        adapter = find_adapter(model)
        self._keep_processors(model, adapter)
        if reason := adapter.refuse(model):
            raise ValueError(reason)
        arguments = forward_arguments(model, args, kwargs)
        device = arguments["hidden_states"].device
        self.run.learn(adapter.grid(model, arguments))
        step, num_steps = self.run.current_step() if self.run.enabled else (0, 1)
        for i, processor in enumerate(self.processors):
            plan = self.run.config.layer(i, len(self.processors), step, num_steps)
            processor.ready(plan.dense or not self.run.enabled or not self.run.warmup, device)
            processor.warm(self.run.warmup)
        self.run.keep()
        checkpointing = getattr(model, "_gradient_checkpointing_func", None)
        if checkpointing is not None and not isinstance(checkpointing, Checkpointing):
            model._gradient_checkpointing_func = Checkpointing(checkpointing, self.run)  # type: ignore[assignment]

    def remove(self, model: nn.Module) -> None:
        """Puts everything back."""
        for (_, layer), processor in zip(find_adapter(model).layers(model), self.processors, strict=True):
            if layer.processor is processor:
                layer.processor = processor.stock
        # Where a model keeps processors to put back itself, it must not put back ours.
        kept = getattr(model, "original_attn_processors", None) or {}
        for name, processor in kept.items():
            if isinstance(processor, VMoBAProcessor):
                kept[name] = processor.stock
        self.hook.remove()
        checkpointing = getattr(model, "_gradient_checkpointing_func", None)
        if isinstance(checkpointing, Checkpointing):
            model._gradient_checkpointing_func = checkpointing.inner  # type: ignore[assignment]

    def _keep_processors(self, model: nn.Module, adapter: Adapter) -> None:
        """Stands in for processors that the model itself has swapped since, as some do to fuse projections."""
        for i, (name, layer) in enumerate(adapter.layers(model)):
            now, processor = layer.processor, self.processors[i]
            if now is processor:
                continue
            if isinstance(now, VMoBAProcessor) and now.run is self.run:
                self.processors[i] = now  # the one from before a swap
            elif type(now).__name__ in adapter.stock and type(now) is not type(processor.stock):
                # Another object: the model may keep the one that stands in for its first processor.
                self.processors[i] = layer.processor = copy.copy(processor)
                self.processors[i].stock = now
            else:
                raise ValueError(
                    f"every layer must keep the processor that apply_vmoba gave it, got {type(now).__name__} in "
                    f"{name}: call handle.remove() and apply again"
                )


def _register_for_layer_skipping(processor: type[VMoBAProcessor]) -> None:
    """Tells diffusers what a skipped layer returns. It has no public way to; without it skipping layers fails."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
    except ImportError:
        return
    skip: Any = _skip_joint if processor.joint else _skip
    AttentionProcessorRegistry.register(processor, AttentionProcessorMetadata(skip))


def _skip(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _skip_joint(
    layer: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    return hidden_states, encoder_hidden_states
