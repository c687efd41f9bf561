"""One call to run a diffusers model with VMoBA, and the handle that it returns."""

import copy
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.inputs import check_count, check_positive
from vmoba_flex.models.adapters import Adapter, find_adapter, forward_arguments, supported
from vmoba_flex.models.parallel import ranks_of
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.run import Checkpointing, Run, StepSource
from vmoba_flex.partition import BlockPartition
from vmoba_flex.warmup import check_warmup, warmed

# Where pipelines keep their transformers; Wan 2.2 has two experts.
_COMPONENTS = ("transformer", "transformer_2")


def apply_vmoba(pipe_or_model: Any, config: VMoBAConfig) -> "VMoBAHandle":
    """Makes the self-attention of a video transformer sparse, by swapping its attention processors.

    Text in joint attention is always attended, padding never. The grid is learned at each forward. Weights, their names
    and cross-attention stay as they are.

    Args:
        pipe_or_model: a diffusers pipeline (its ``transformer``, and ``transformer_2`` where there is one), or a model:
            Wan 2.1 and 2.2, HunyuanVideo, HunyuanVideo-1.5, CogVideoX, LTX, Mochi, SkyReels-V2, or one that
            ``register_adapter`` knows.
        config: what each layer does.

    Returns:
        A handle to look at it, switch it off and remove it; also a context manager that removes it at its end.

    Raises:
        TypeError: if ``config`` is no ``VMoBAConfig`` or the model is of an unknown class.
        ValueError: if VMoBA is applied already, a layer has a processor that is not the model's own, or the model is in
            a mode that VMoBA cannot take. The model is left as it was.

    Example:
        >>> handle = apply_vmoba(pipe, VMoBAConfig.paper("inference"))  # doctest: +SKIP
        >>> pipe("a cat that plays the piano")  # doctest: +SKIP
        >>> print(handle.summary())  # doctest: +SKIP
    """
    if not isinstance(config, VMoBAConfig):
        raise TypeError(f"config must be a VMoBAConfig, got {type(config).__name__}")
    models = _models(pipe_or_model)
    for name, model in models.items():  # all checks before any change
        _check(name, model, config)
    source = None if isinstance(pipe_or_model, nn.Module) else StepSource(pipe_or_model)
    return VMoBAHandle({name: (model, Applied(model, Run(config, source=source))) for name, model in models.items()})


class Applied:
    """VMoBA on one model: its processors, and the hook that readies them before each forward."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        adapter = _adapter(model)
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
        adapter = _adapter(model)
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
        for (_, layer), processor in zip(_adapter(model).layers(model), self.processors, strict=True):
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


class VMoBAHandle:
    """VMoBA on a model, or on the models of a pipeline; a context manager that removes it at its end."""

    def __init__(self, applied: dict[str, tuple[nn.Module, Applied]]) -> None:
        self._applied = applied

    @classmethod
    def of(cls, pipe_or_model: Any) -> Self:
        """The handle of what has VMoBA applied, such as a copy of a model, or one that was pickled.

        Raises:
            TypeError: if the model is of an unknown class.
            ValueError: if VMoBA is not applied.
        """
        applied = {}
        for name, model in _models(pipe_or_model).items():
            found = [layer.processor for _, layer in _adapter(model).layers(model)]
            runs = [processor.run for processor in found if isinstance(processor, VMoBAProcessor)]
            if not runs:
                raise ValueError(f"{name} must have VMoBA applied, got none")
            applied[name] = model, runs[0].owner
        return cls(applied)

    def runs(self) -> dict[str, Run]:
        """What the layers of each model share, by the model's name."""
        return {name: applied.run for name, (_, applied) in self._applied.items()}

    def summary(self) -> str:
        """A table: each layer with its kind, blocks, rule, whether it is dense, and what it attended last."""
        return "\n".join(line for name, (_, applied) in self._applied.items() for line in _table(name, applied))

    def set_enabled(self, enabled: bool) -> None:
        """Makes all layers dense from the next forward on, or as the config has them again.

        Raises:
            TypeError: if ``enabled`` is no bool.
        """
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be a bool, got {enabled!r}")
        for _, applied in self._applied.values():
            applied.run.enabled = enabled

    def set_warmup(self, share: float) -> None:
        """Sets how far thresholds are on their way from full attention, from the next forward on; see ``Warmup``.

        Call it before the first forward: until it was called once, taus are constants of compiled graphs. After that no
        graph is made anew, but one for full attention and one for sparse. Not inside a CUDA graph.

        Args:
            share: 0 for full attention, up to 1 for the config's thresholds.

        Raises:
            TypeError: if ``share`` is no number.
            ValueError: if it is not in [0, 1], or a layer has a ``TopK``.
        """
        check_warmup(share)
        runs = self.runs().values()
        rules = [[warmed(processor.rule) for processor in run.processors] for run in runs]  # checked before any change
        for run, of_run in zip(runs, rules, strict=True):
            run.warmup = share
            for processor, rule in zip(run.processors, of_run, strict=True):
                processor.rule = rule

    def set_step(self, step: int | None, num_steps: int = 1) -> None:
        """Says which denoising step comes next, from 0, and how many there are, until it is called again.

        With ``None`` a pipeline's scheduler says so again.

        Raises:
            TypeError: if one is no int.
            ValueError: if ``step`` is not in 0..num_steps - 1.
        """
        if step is None:
            self._set_step(None)
            return
        check_positive("num_steps", num_steps)
        check_count("step", step, num_steps, "num_steps")
        self._set_step((step, num_steps))

    @property
    def on_step_end(self) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
        """A pipeline's ``callback_on_step_end``, for schedulers without a ``step_index``; starts at step 0.

        Where a run was broken off, call ``set_step(0, ...)`` before the next one.
        """
        self.set_step(0, 1)  # dense for any number of dense steps, and for any share of them
        return self._end_step

    def remove(self) -> None:
        """Puts the stock processors back. The model then computes what it did before, bit for bit."""
        for model, applied in self._applied.values():
            applied.remove(model)
        self._applied = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _end_step(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        num_steps = pipe.num_timesteps
        # Behind the last step: the next run may count its steps by itself.
        self._set_step((step + 1, num_steps) if step + 1 < num_steps else None)
        return callback_kwargs

    def _set_step(self, step: tuple[int, int] | None) -> None:
        for _, applied in self._applied.values():
            applied.run.step = step


def _models(pipe_or_model: Any) -> dict[str, nn.Module]:
    """The models to apply to, by name."""
    if isinstance(pipe_or_model, nn.Module):
        return {"model": pipe_or_model}
    found = {name: getattr(pipe_or_model, name, None) for name in _COMPONENTS}
    models = {name: model for name, model in found.items() if model is not None}
    if not models:
        raise TypeError(
            f"pipe_or_model must be a model, or have one as {' or '.join(_COMPONENTS)}, got "
            f"{type(pipe_or_model).__name__}"
        )
    return models


def _adapter(model: object) -> Adapter:
    adapter = find_adapter(model)
    if adapter is None:
        raise TypeError(
            f"pipe_or_model must be one of {', '.join(supported())}, or of a class given to register_adapter, got "
            f"{type(model).__name__}"
        )
    return adapter


def _check(name: str, model: nn.Module, config: VMoBAConfig) -> None:
    """Raises unless the model can take the config."""
    adapter = _adapter(model)
    if reason := adapter.refuse(model):
        raise ValueError(f"{name}: {reason}")
    layers = adapter.layers(model)
    for layer_name, layer in layers:
        processor = layer.processor
        if isinstance(processor, VMoBAProcessor):
            raise ValueError(
                f"{name} must not have VMoBA applied yet, got it in {layer_name}: call remove() on its "
                "handle, or on VMoBAHandle.of(...)"
            )
        if type(processor).__name__ not in adapter.stock:
            raise ValueError(
                f"{name} must have a processor of its own ({' or '.join(adapter.stock)}) in each layer, got "
                f"{type(processor).__name__} in {layer_name}"
            )
        joint = adapter.processor.joint
        ranks_of(getattr(processor, "_parallel_config", None), joint, type(processor).__name__)  # raises if it must not
    config.layer(0, len(layers), step=0, num_steps=1)  # dense_layers fits


def _table(name: str, applied: Applied) -> list[str]:
    run = applied.run
    rows = [("layer", "kind", "blocks", "rule", "attention", "last density")]
    for layer, processor in zip(applied.names, applied.processors, strict=True):
        block = run.blocks.get(processor.kind)
        blocks = "not known yet"
        if run.grid is not None and block is not None:
            blocks = f"{BlockPartition(run.grid, block).num_blocks} of {'x'.join(map(str, block))}"
        density = processor.density.item()
        last = f"{density:.3f}" if density else "-"
        attention = "dense" if processor.dense else "sparse"
        rows.append((layer, processor.kind, blocks, repr(processor.rule), attention, last))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    grid = "no forward yet" if run.grid is None else f"grid {'x'.join(map(str, run.grid))}"
    return [f"{name}: {grid}", *lines]


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
