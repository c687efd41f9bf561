"""VMoBA as a module, for a model of your own."""

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vmoba_flex.attention import vmoba_attention
from vmoba_flex.checks import check_count, check_positive
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.selection.kept import Selection
from vmoba_flex.warmup import check_warmup, warmed


class VMoBAAttention(nn.Module):
    """The attention of one layer of a config, over projected query, key and value; it has no parameters.

    Args:
        config: of the whole model. The module knows no denoising steps. So it ignores ``dense_steps`` and ``remember``:
            pass ``dense=config.layer(layer, num_layers, step, num_steps).dense``, and a ``selection`` that a dense step
            made, to ``forward`` instead. It takes no ``BySteps``: make a module for each value, with
            ``dataclasses.replace(config, rule=..., tail=...)``.
        layer: index of this layer, in 0..num_layers - 1.
        num_layers: layers of the model.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if ``layer``, ``config.dense_layers`` or a list of rules does not fit ``num_layers``, or a
            rule or tail changes by steps.

    Example:
        >>> import torch
        >>> from vmoba_flex.config import VMoBAConfig
        >>> attention = VMoBAAttention(VMoBAConfig.paper("training"), layer=1, num_layers=30)
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8 + 5, 16)
        >>> attention(q, k, v, (4, 8, 8), suffix=5).shape
        torch.Size([1, 2, 261, 16])
    """

    def __init__(self, config: VMoBAConfig, layer: int, num_layers: int) -> None:
        super().__init__()
        if not isinstance(config, VMoBAConfig):
            raise TypeError(f"config must be a VMoBAConfig, got {type(config).__name__}")
        check_positive("num_layers", num_layers)
        check_count("layer", layer, num_layers, "num_layers")
        # Forward reads the plan and never the index: torch.compile makes a graph for each plan, not for each layer.
        self.config = config
        self.index = layer
        self.num_layers = num_layers
        of_any_step = dataclasses.replace(config, dense_steps=0, remember=None)
        if of_any_step.needs_step:
            raise ValueError(
                "config must have no BySteps for VMoBAAttention, which knows no steps: make a module for each value, "
                f"with dataclasses.replace(config, rule=..., tail=...), got rule={config.rule} and tail={config.tail}"
            )
        self.plan = of_any_step.layer(layer, num_layers)
        self.full = False

    def set_warmup(self, share: float) -> None:
        """Sets how far the layer's threshold is on its way from full attention; see ``Warmup``.

        Call it before the first forward, because until then tau is a constant of compiled graphs. Afterwards there are
        two graphs, for full attention and for sparse, whatever the share. Do not call it between a forward and its
        recomputation in backward, nor inside a CUDA graph.

        Args:
            share: 0 for full attention, up to 1 for the config's threshold.

        Raises:
            TypeError: if ``share`` is no number.
            ValueError: if it is not in [0, 1], or the rule is a ``TopK``.
        """
        check_warmup(share)
        self.plan = dataclasses.replace(self.plan, rule=warmed(self.plan.rule, share))
        self.full = not share

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int, int],
        *,
        prefix: int = 0,
        suffix: int = 0,
        text_lengths: Tensor | None = None,
        dense: bool = False,
        selection: Selection | None = None,
    ) -> Tensor:
        """Attention in raster order; see ``vmoba_attention``.

        Args:
            query: ``(B, H, S, D)``, with ``S`` the tokens of prefix, grid and suffix.
            key: ``(B, H, S, D)``.
            value: ``(B, H, S, value dim)``.
            grid: latent video size (frames, height, width) in tokens.
            prefix: text tokens before the video's.
            suffix: text tokens after the video's.
            text_lengths: int64 ``(B,)``: the first so many of each sample's prefix and suffix tokens are valid, the
                others padding that no query attends. All are valid by default.
            dense: attend everything in this call, as layers that are dense in the config always do.
            selection: what was chosen before, instead of the config's rule; not in a call that is dense.

        Returns:
            ``(B, H, S, value dim)``.

        Raises:
            TypeError: if an argument has a wrong type or dtype.
            ValueError: if shapes, devices or values do not fit, or a block is larger than the grid.
        """
        if not isinstance(dense, bool):
            raise TypeError(f"dense must be a bool, got {dense!r}")
        partition = self.config.partition(self.plan.kind, grid, prefix, suffix)
        dense = dense or self.plan.dense or self.full
        return vmoba_attention(
            query,
            key,
            value,
            partition,
            self.plan.rule if selection is None else None,
            # Full attention takes torch's kernels, and would refuse a backend by name.
            dispatch="dense" if dense else self.config.dispatch,
            backend="auto" if dense else self.config.backend,
            text_lengths=text_lengths,
            tail=None if dense else self.plan.tail,
            selection=selection,
        )

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns Any

    def extra_repr(self) -> str:
        """The layer's index, kind and rule."""
        what = "dense" if self.plan.dense else f"rule={self.plan.rule}"
        return f"layer={self.index}, num_layers={self.num_layers}, kind={self.plan.kind!r}, {what}"
