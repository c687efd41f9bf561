"""FastVideo: its attention backend VMOBA_ATTN runs VMoBA of this package. Written against FastVideo 0.2.1.

B batch, H heads, S tokens, D head dim.
"""

# The host is not installed everywhere.
# pyright: reportMissingImports=false

import dataclasses
import functools
import json
from typing import Any, ClassVar

from fastvideo.attention.backends.abstract import AttentionImpl, layer_idx_from_prefix
from fastvideo.attention.backends.vmoba import VMOBAAttentionBackend
from fastvideo.forward_context import get_forward_context
from torch import Tensor

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.config_json import FASTVIDEO
from vmoba_flex.hosts.video import Video, attend_video, check_pools, layer_of


def install(config: VMoBAConfig | None = None) -> None:
    """Makes VMOBA_ATTN run this package's VMoBA, in models made from now on.

    FastVideo starts its workers anew: call it where they pass, as at the top of the script that they run.

    Args:
        config: of all layers; None for what FastVideo's own JSON says (``--moba-config-path``), with
            ``first_full_layer`` and ``first_full_step`` in effect.

    Raises:
        TypeError: if ``config`` is no ``VMoBAConfig``.
        ValueError: if it remembers choices.
    """
    if not isinstance(config, VMoBAConfig | None):
        raise TypeError(f"config must be a VMoBAConfig or None, got {type(config).__name__}")
    if config is not None and config.remember is not None:
        raise ValueError(
            f"remember must be None with FastVideo, which does not tell where a run ends, got {config.remember}"
        )
    impl = type("VMoBAImpl", (VMoBAImpl,), {"config": config})
    VMOBAAttentionBackend.get_impl_cls = staticmethod(lambda: impl)


class VMoBAImpl(AttentionImpl):
    """The attention of one layer.

    Attributes:
        config: of all layers; None for FastVideo's own settings.

    Raises:
        ValueError: if the layer is causal, or its name does not tell its index.
    """

    config: ClassVar[VMoBAConfig | None] = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        if causal:
            raise ValueError(f"causal must be False for VMoBA, got True for {prefix!r}")
        self.index, self.num_heads, self.scale = layer_idx_from_prefix(prefix), num_heads, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Tensor:
        """What the layer attends; differentiable.

        Args:
            query: ``(B, S, H, D)``, all tokens of some heads where ranks share a call.
            key: ``(B, S, key heads, D)``.
            value: ``(B, S, key heads, D)``.
            attn_metadata: of FastVideo's VMoBA: the grid, the step and the settings of its JSON.

        Returns:
            ``(B, S, H, D)``.

        Raises:
            ValueError: if tokens are not the grid's, or grid or heads do not fit the config.
        """
        video = Video(tuple(attn_metadata.patch_resolution))
        if not query.shape[1] == key.shape[1] == video.num_tokens:
            raise ValueError(
                f"query and key must have the {video.num_tokens} tokens of the grid {video.grid} and no others, got "
                f"{query.shape[1]} and {key.shape[1]}"
            )
        config = self.config or _config_of(_settings(attn_metadata))
        step, num_steps = attn_metadata.current_timestep, None
        if isinstance(step, Tensor):  # noise levels of a training step, where no layer is dense
            config, step = dataclasses.replace(config, dense_steps=0), None
        elif (batch := get_forward_context().forward_batch) is not None:
            num_steps = len(batch.timesteps)
        if query.shape[2] != self.num_heads:
            check_pools(config)
        layer = layer_of(config, self.index, None, step, num_steps)
        return attend_video(query, key, value, video, config, layer, scale=self.scale)


def _settings(metadata: Any) -> str:
    return json.dumps({name: getattr(metadata, name) for name in FASTVIDEO})


@functools.lru_cache(maxsize=64)
def _config_of(settings: str) -> VMoBAConfig:
    return VMoBAConfig.from_json(settings)
