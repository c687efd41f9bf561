"""One call to run a diffusers model with VMoBA."""

from typing import Any

from torch import nn

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models.adapters import find_adapter
from vmoba_flex.models.handle import VMoBAHandle, models_of
from vmoba_flex.models.parallel import ranks_of
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import ModelState
from vmoba_flex.models.steps import StepSource


def apply_vmoba(pipe_or_model: Any, config: VMoBAConfig) -> VMoBAHandle:
    """Makes the self-attention of a video transformer sparse: its layers hand query, key and value over to VMoBA.

    Text and other tokens next to the video are always attended, padding never. Each forward brings its grid. Weights,
    their names and cross-attention stay as they are.

    Args:
        pipe_or_model: a diffusers pipeline (its ``transformer``, and ``transformer_2`` if it has one), or a model:
            of a class in ``models/table.py``, or one that ``register_adapter`` knows; also inside ``torch.compile``,
            PEFT, DDP or FSDP.
        config: what each layer does.

    Returns:
        A handle to look at it, switch it off and remove it; also a context manager that removes it at its end.

    Raises:
        TypeError: if ``config`` is no ``VMoBAConfig`` or the model is of an unknown class.
        ValueError: if VMoBA is applied already, a layer has a processor that is not the model's own, or the mode of
            the model or the pipeline is one that VMoBA cannot run in. The model is left as it was.
        RuntimeError: if VMoBA does not fit the installed diffusers.

    Example:
        >>> handle = apply_vmoba(pipe, VMoBAConfig.paper("inference"))  # doctest: +SKIP
        >>> pipe("a cat that plays the piano")  # doctest: +SKIP
        >>> print(handle.summary())  # doctest: +SKIP
    """
    if not isinstance(config, VMoBAConfig):
        raise TypeError(f"config must be a VMoBAConfig, got {type(config).__name__}")
    models = models_of(pipe_or_model)
    for name, model in models.items():  # all checks before any change
        _check(name, model, config, type(pipe_or_model))
    # Loads torch._dynamo, which importing vmoba_flex must not.
    from vmoba_flex.models.applied import Applied

    source = None if isinstance(pipe_or_model, nn.Module) else StepSource(pipe_or_model)
    return VMoBAHandle({name: (model, Applied(model, ModelState(config, source))) for name, model in models.items()})


def _check(name: str, model: nn.Module, config: VMoBAConfig, pipeline: type) -> None:
    """Raises unless the model can take the config and run in the pipeline."""
    adapter = find_adapter(model)
    for cls in pipeline.__mro__:
        if way_out := adapter.refused_pipelines.get(cls.__name__):
            raise ValueError(f"pipe_or_model must not be a {cls.__name__}, got one: {way_out}")
    if reason := adapter.refuse(model):
        raise ValueError(f"{name}: {reason}")
    layers = adapter.layers_of(model)
    for layer_name, layer in layers:
        processor = layer.processor
        if isinstance(processor, VMoBAProcessor):
            raise ValueError(
                f"{name} must not have VMoBA applied yet, got it in {layer_name}: call remove() on its "
                "handle, or on VMoBAHandle.of(...)"
            )
        adapter.check(processor, f"{name}: {layer_name}")
        # Raises if it must not be parallel as it is.
        ranks_of(getattr(processor, "_parallel_config", None), adapter.joint(model), type(processor).__name__)
    config.layer(0, len(layers), step=0, num_steps=1)  # dense_layers fits
