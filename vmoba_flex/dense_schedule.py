"""Which layers and which denoising steps attend everything."""

from collections.abc import Sequence
from typing import Any

from vmoba_flex.checks import check_count

# What a config keeps: a number of first layers, or their indices; first steps, or first and last ones, each as a
# number (int) or a share (float).
DenseLayers = int | tuple[int, ...]
DenseSteps = int | float | tuple[int | float, int | float]


def checked_layers(value: Any) -> DenseLayers:
    """``dense_layers`` as a config keeps it.

    Raises:
        TypeError: if it is neither an int nor a list of ints.
        ValueError: if a number of layers is below 0.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in value):
            raise TypeError(f"dense_layers must hold ints, got {value!r}")
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"dense_layers must be an int, or a list of layers such as [0, -1], got {value!r}")
    check_count("dense_layers", value)
    return value


def checked_steps(value: Any) -> DenseSteps:
    """``dense_steps`` as a config keeps it: of a pair without last steps, the first steps only.

    Raises:
        TypeError: if it is neither a number nor a pair of numbers.
        ValueError: if a number is below 0, a share is not below 1, or the shares of a pair leave no step.
    """
    if not isinstance(value, tuple | list):
        _check_part(value, value)
        return value
    if len(value) != 2:
        raise ValueError(f"dense_steps must be one number or a pair (first, last), got {value!r}")
    for part in value:
        _check_part(part, value)
    first, last = value
    if isinstance(first, float) and isinstance(last, float) and first + last >= 1:
        raise ValueError(f"dense_steps must be shares that add up to less than 1, got {value!r}")
    return (first, last) if last else first


def _check_part(part: Any, value: Any) -> None:
    if isinstance(part, bool) or not isinstance(part, int | float):
        raise TypeError(f"dense_steps must be an int or a float, or a pair of these, got {value!r}")
    if part < 0 or (isinstance(part, float) and not part < 1):
        raise ValueError(f"dense_steps must be a number of steps (int) or a share in [0, 1) (float), got {value!r}")


def is_dense_layer(dense_layers: DenseLayers, i: int, num_layers: int) -> bool:
    """Whether layer i of ``num_layers`` attends everything.

    Raises:
        ValueError: if ``dense_layers`` does not fit ``num_layers``.
    """
    if isinstance(dense_layers, int):
        if dense_layers > num_layers:
            raise ValueError(f"dense_layers must be at most num_layers = {num_layers}, got {dense_layers}")
        return i < dense_layers
    for layer in dense_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"dense_layers must lie in -num_layers..num_layers - 1 = {-num_layers}..{num_layers - 1}, got {layer} "
                f"in {dense_layers}"
            )
    return i in dense_layers or i - num_layers in dense_layers


def is_dense_step(dense_steps: DenseSteps, step: int | None, num_steps: int | None) -> bool:
    """Whether a denoising step attends everything.

    Args:
        dense_steps: as ``checked_steps`` returns it.
        step: from 0; needed where ``dense_steps`` is not 0.
        num_steps: needed where ``dense_steps`` is a share or has last steps.

    Raises:
        ValueError: if one that is needed is None.
    """
    if not dense_steps:
        return False
    if step is None:
        raise ValueError(f"step must be given where dense_steps is not 0 but {dense_steps}, got None")
    if isinstance(dense_steps, int):
        return step < dense_steps
    if num_steps is None:
        what = "has last steps" if isinstance(dense_steps, tuple) else "is a share"
        raise ValueError(f"num_steps must be given where dense_steps {what}, {dense_steps}, got None")
    first, last = dense_steps if isinstance(dense_steps, tuple) else (dense_steps, 0)
    return is_within(step, first, num_steps) or is_within(num_steps - 1 - step, last, num_steps)


def is_within(steps_before: int, part: int | float, num_steps: int) -> bool:
    """Whether a step with ``steps_before`` steps before it is one of the first ``part``: a number, or a share."""
    # Not steps_before < share * num_steps: that product may round up past a whole number, for one dense step too many.
    return steps_before < part if isinstance(part, int) else steps_before / num_steps < part
