"""VMoBA on one model: its processors, and the hooks around each forward."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from vmoba_flex.config_fields import rule_of_layer
from vmoba_flex.models.adapter import Adapter
from vmoba_flex.models.adapters import device_of, find_adapter, forward_arguments
from vmoba_flex.models.checkpointing import Checkpointing
from vmoba_flex.models.dispatcher import register_for_layer_skipping, skips_scores
from vmoba_flex.models.plan import Forward
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import ModelState
from vmoba_flex.models.summary import line_of

# Where diffusers' models and torch's checkpoint_wrapper keep the function that checkpoints a layer.
_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
_EXPORT = "torch.export would freeze the grid and the denoising step of a model with VMoBA applied"


class Applied:
    """VMoBA on one model: its processors, and the hooks that begin and end each forward."""

    def __init__(self, model: nn.Module, state: ModelState) -> None:
        adapter = find_adapter(model)
        self.state, state.owner = state, self
        self.recompile_limit: int = dynamo_config.recompile_limit
        layers = adapter.layers_of(model)
        self.names = [name for name, _ in layers]
        self.processors: list[VMoBAProcessor] = state.processors
        for i, (_, layer) in enumerate(layers):
            kind = state.config.layer(i, len(layers), step=0, num_steps=1).kind  # the same at each step
            rule = rule_of_layer(state.config.rule, kind, i, len(layers))
            layer.processor = adapter.processor_for(model, layer.processor, state, kind, rule)
            self.processors.append(layer.processor)
        for made in {type(processor) for processor in self.processors}:
            register_for_layer_skipping(made)
        if hasattr(type(model), "cache_context"):
            vars(model)["cache_context"] = NamedPasses(model, state)
        # Methods of an instance and no closures: they can be pickled, and a copy of the model has copies of them.
        self.hooks = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
        ]

    # Outside of compiled graphs, which would hold the step as a constant.
    @torch.compiler.disable(reason=_EXPORT)
    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plans a forward and puts it under way on this thread."""
        if torch.compiler.is_exporting() and self.state.config.needs_step:
            raise ValueError(f"config must do the same at each step for an export: {_EXPORT}")
        adapter = find_adapter(model)
        layers = adapter.layers_of(model)
        self._keep_processors(layers, adapter)
        if reason := adapter.refuse(model):
            raise ValueError(reason)
        arguments = forward_arguments(model, args, kwargs)
        if self.state.given is not None:
            (grid, rest), prefix = self.state.given, 0
        else:
            grid, prefix, rest = adapter.grid(model, arguments), adapter.prefix(model, arguments), adapter.rest
        forward = self.state.plan(grid, [skips_scores(layer) for _, layer in layers], prefix, rest)
        device = device_of(arguments)
        for processor, plan in zip(self.processors, forward.plans, strict=True):
            processor.ready(plan, device)
        if torch.is_grad_enabled():
            self._bind_checkpoints(model)
        self.state.enter(forward)
        # Dynamo counts graphs by the code of a layer. Graphs of further grids, kinds and texts are no recompilations.
        texts = [x for name, x in arguments.items() if name.startswith("encoder_hidden_states")]
        text = tuple(x.shape[1] for x in texts if isinstance(x, Tensor))
        self.state.shapes.update((plan.grid, plan.block, text) for plan in forward.plans)
        limit = max(dynamo_config.recompile_limit, len(self.state.shapes) * self.recompile_limit)
        settings = dynamo_config.patch(recompile_limit=limit)
        settings.__enter__()
        self.state.now.settings = settings

    @torch.compiler.disable(reason=_EXPORT)
    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends the forward, which lives on in its graph."""
        forward, settings = self.state.enter(None), self.state.now.settings
        if forward is None or settings is None:
            return
        self.state.now.settings = None
        settings.__exit__(None, None, None)
        self.state.end_pass(forward)
        self.state.told.inform(lambda: line_of(type(model).__name__, self.processors, forward.plans))
        outputs = output.values() if isinstance(output, dict) else output
        for x in outputs if isinstance(outputs, Iterable) and not isinstance(outputs, Tensor) else [outputs]:
            if isinstance(x, Tensor) and x.grad_fn is not None:
                x.grad_fn.metadata[Forward] = forward  # pyright: ignore[reportIndexIssue]: torch types it as a method
                self.state.alive.add(forward)

    def remove(self, model: nn.Module) -> None:
        """Puts everything back."""
        for (_, layer), processor in zip(find_adapter(model).layers_of(model), self.processors, strict=True):
            if layer.processor is processor:
                layer.processor = processor.stock
        # Where a model keeps processors to put back itself, it must not put back ours.
        kept = getattr(model, "original_attn_processors", None) or {}
        for name, processor in kept.items():
            if isinstance(processor, VMoBAProcessor):
                kept[name] = processor.stock
        for hook in self.hooks:
            hook.remove()
        vars(model).pop("cache_context", None)
        self.state.forget()
        for module in model.modules():
            for name in _CHECKPOINT_FUNCTIONS:
                if isinstance(function := vars(module).get(name), Checkpointing):
                    setattr(module, name, function.inner)

    def _bind_checkpoints(self, model: nn.Module) -> None:
        for module in model.modules():
            for name in _CHECKPOINT_FUNCTIONS:
                function = vars(module).get(name)
                if function is not None and not isinstance(function, Checkpointing):
                    setattr(module, name, Checkpointing(function, self.state))

    def _keep_processors(self, layers: list[tuple[str, Any]], adapter: Adapter) -> None:
        """Stands in for processors that the model itself has swapped since, as some do to fuse projections."""
        for i, (name, layer) in enumerate(layers):
            now, processor = layer.processor, self.processors[i]
            if now is processor:
                continue
            if isinstance(now, VMoBAProcessor) and now.state is self.state:
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


class NamedPasses:
    """Stands in for a model's ``cache_context``: notes the pass, with the prompt or without it, for forwards inside."""

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
