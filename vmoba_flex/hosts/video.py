"""What hosts share: where a call's video lies, what a config asks of its layer, and attending that.

B batch, H heads, S tokens, D head dim.
"""

import math
import re
from typing import NamedTuple

from torch import Tensor

from vmoba_flex.attention import vmoba_attention
from vmoba_flex.by_steps import values_of
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.config_fields import rules_of_layers
from vmoba_flex.layer import Layer
from vmoba_flex.selection.kept import Selection

# Stands for the number of layers where a host does not tell it: no layer's index reaches it.
_UNKNOWN = 2**31 - 1


class Video(NamedTuple):
    """Where a call's video lies among its tokens.

    Attributes:
        grid: latent video size (frames, height, width) in tokens, in raster order.
        prefix: tokens before it, which attend all, and which all attend.
        suffix: the same after it.
    """

    grid: tuple[int, int, int]
    prefix: int = 0
    suffix: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prefix, grid and suffix."""
        return self.prefix + math.prod(self.grid) + self.suffix


def index_in(name: str) -> int | None:
    """The index of a layer by its dotted name, the only number in it; None if there is none, or are several."""
    numbers = [part for part in name.split(".") if re.fullmatch(r"\d+", part)]
    return int(numbers[0]) if len(numbers) == 1 else None


def layer_of(config: VMoBAConfig, i: int, num_layers: int | None, step: int | None, num_steps: int | None) -> Layer:
    """What layer i does at a step; see ``VMoBAConfig.layer``.

    Args:
        config: of the model.
        i: the layer, from 0.
        num_layers: of the model; None where the host does not tell.
        step: from 0; None where the host does not tell.
        num_steps: in all; None where the host does not tell.

    Raises:
        ValueError: if the config needs what the host does not tell.
    """
    if num_layers is None:
        layers = config.dense_layers
        if not isinstance(layers, int) and any(layer < 0 for layer in layers):
            raise ValueError(
                "dense_layers must be counted from the first layer here, because the host does not tell how many there "
                f"are, got {layers}"
            )
        num_layers = len(config.rule) if isinstance(config.rule, tuple) else _UNKNOWN
    try:
        return config.layer(i, num_layers, step, num_steps)
    except ValueError as error:
        if num_steps is None:
            error.add_note("The host does not tell num_steps: give numbers of first steps, not shares.")
        raise


def check_pools(config: VMoBAConfig) -> None:
    """Raises unless ranks that share out a layer's heads can choose each for its own.

    Raises:
        ValueError: if heads compete.
    """
    for rules in rules_of_layers(config.rule):
        for rule in values_of(rules):
            if rule.pool in ("block", "global"):
                raise ValueError(f"pool must be 'query' or 'head' where ranks share out heads, got {rule.pool!r}")


def attend_video(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    video: Video,
    config: VMoBAConfig,
    layer: Layer,
    *,
    scale: float | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """Attention as a layer does it at a step.

    Args:
        query: ``(B, S, H, D)``.
        key: ``(B, S, key heads, D)``.
        value: ``(B, S, key heads, value dim)``.
        video: where the video lies; ``S`` is its ``num_tokens``.
        config: of the model.
        layer: what the layer does.
        scale: as in ``vmoba_attention``.
        selection: what was chosen before, instead of the layer's rule.

    Returns:
        ``(B, S, H, value dim)``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or a block is larger than the grid.
    """
    output = vmoba_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        config.partition(layer.kind, *video),
        layer.rule if selection is None else None,
        scale=scale,
        enable_gqa=key.shape[2] != query.shape[2],
        dispatch="dense" if layer.dense else config.dispatch,
        backend="auto" if layer.dense else config.backend,
        tail=None if layer.dense else layer.tail,
        selection=selection,
    )
    return output.transpose(1, 2)
