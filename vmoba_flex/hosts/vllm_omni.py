"""vLLM-Omni: an attention backend for video, in the place of RAINFUSION_ATTN on CUDA. Written against vLLM-Omni 0.30.0.

Its list of backends is closed, so that a plug-in can only stand in for one. RAINFUSION_ATTN runs on NPUs only, and is
the one with settings for sparse blocks. vLLM-Omni finds ``register`` by an entry point of this package.

B batch, H heads, S tokens, D head dim.
"""

# The host is not installed everywhere.
# pyright: reportMissingImports=false

import dataclasses
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum, register_diffusion_backend
from vllm_omni.diffusion.attention.selector import get_attn_backend_for_capability, get_attn_backend_for_role
from vllm_omni.platforms import current_omni_platform

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.hosts.video import Video, attend_video, check_pools, index_in, layer_of
from vmoba_flex.layer import Layer
from vmoba_flex.rules import TopK
from vmoba_flex.told import Told

_CONFIG = "VMOBA_FLEX_CONFIG"
# vLLM-Omni's own values of block_sparse, which has no sign of what a user gave.
_UNSET = {"sparsity": 0.8, "start_step": 0, "end_step": 0, "precision": "bf16"}
_TOLD = Told()


def register() -> None:
    """Makes RAINFUSION_ATTN this module's backend, on CUDA; elsewhere it stays what it is."""
    if current_omni_platform.is_cuda():
        register_diffusion_backend(DiffusionAttentionBackendEnum.RAINFUSION_ATTN, f"{__name__}.VMoBABackend")


class VMoBABackend(AttentionBackend):
    """VMoBA where a model publishes its grid of video tokens, and the platform's own attention elsewhere."""

    accept_output_buffer = True
    supported_platforms = ("cuda",)

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """Whether the platform's own attention takes a mask: calls with one are its."""
        return get_attn_backend_for_capability("self").supports_attention_mask()

    @staticmethod
    def get_name() -> str:
        """The name that users select it by."""
        return "RAINFUSION_ATTN"

    @staticmethod
    def get_impl_cls() -> type["VMoBAImpl"]:
        """The attention of one layer."""
        return VMoBAImpl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Empty: any."""
        return []


class VMoBAImpl(AttentionImpl):
    """The attention of one layer.

    Raises:
        ValueError: if the layer is causal or ranks share keys, or the settings are none of VMoBA's.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        role: str = "self",
        **extra_impl_args: Any,
    ) -> None:
        if causal:
            raise ValueError(
                f"causal must be False for VMoBA, got True for {prefix!r}: select another backend for role {role!r}"
            )
        self.config = config_of(backend_kwargs)
        _check_parallel(self.config)
        self.scale, self.index, self.role = softmax_scale, index_in(prefix), role
        platform, _ = get_attn_backend_for_role(role, head_size, allow_trtllm_default=False)  # it takes no masks
        self.dense = platform.get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            qkv_layout=qkv_layout,
        )

    @torch.compiler.disable(reason="graphs would hold the denoising step as a constant")
    def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        """What the layer attends.

        Args:
            query: ``(B, S, H, D)``, all tokens of some heads where ranks share a call (Ulysses).
            key: ``(B, S, key heads, D)``.
            value: ``(B, S, key heads, D)``.
            attn_metadata: vLLM-Omni's, with the grid.

        Returns:
            ``(B, S, H, D)``.

        Raises:
            ValueError: if grid, tokens or heads do not fit the config.
        """
        video = self._video(query, key, attn_metadata)
        layer = None if video is None else self._layer()
        if video is None or layer is None or layer.dense:
            return self.dense.forward(query, key, value, attn_metadata)
        padding = query.shape[1] - video.num_tokens
        q, k, v = (x[:, : video.num_tokens] for x in (query, key, value))
        return F.pad(attend_video(q, k, v, video, self.config, layer, scale=self.scale), (0, 0, 0, 0, 0, padding))

    def _video(self, query: Tensor, key: Tensor, metadata: Any) -> Video | None:
        """Where the video lies; None if the call is another's."""
        layout = getattr(metadata, "video_layout", None)
        if layout is None or key.shape[1] != query.shape[1]:
            if self.role in ("self", "joint"):
                _TOLD.tell("vLLM-Omni: self-attention without a video_layout of its model stays dense")
            return None
        if metadata.full_attn_spans is not None or metadata.joint_query is not None:
            _TOLD.tell("vLLM-Omni: attention with full_attn_spans or joint tokens stays dense")
            return None
        mask = metadata.attn_mask
        if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2):  # else of padding after the video's end
            _TOLD.tell("vLLM-Omni: attention with a mask of other than padding stays dense")
            return None
        video = _video_of(layout)
        used = metadata.extra.get("max_seqlen_q", layout.used_len or video.num_tokens)
        if video.num_tokens > query.shape[1] or video.num_tokens != used:
            raise ValueError(
                f"video_layout must describe all {used} valid of {query.shape[1]} tokens, got {video.num_tokens} by "
                f"{layout}"
            )
        return video

    def _layer(self) -> Layer | None:
        """What the layer does now; None if nothing tells."""
        from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

        if self.index is None:
            _TOLD.tell("vLLM-Omni: layers whose name has no index stay dense")
            return None
        step = num_steps = None
        if is_forward_context_available():
            context = get_forward_context()
            step, num_steps = context.denoise_step_idx, context.total_denoise_steps
        if step is None and self.config.needs_step:
            _TOLD.tell("vLLM-Omni: layers stay dense where the pipeline does not tell its denoising step")
            return None
        return layer_of(self.config, self.index, None, step, num_steps)


def _video_of(layout: Any) -> Video:
    """Of several videos the target: references before and after it are attended by all."""
    targets = [span for span in layout.video_spans if span.role == "target"]
    if len(targets) > 1 or (not targets and (layout.prefix_len is None or layout.latent_grid is None)):
        raise ValueError(f"video_layout must have one target video, got {layout}")
    if not targets:
        return Video(tuple(layout.latent_grid), layout.prefix_len)
    start, grid = targets[0].start, tuple(targets[0].latent_grid)
    return Video(grid, start, layout.used_len - start - targets[0].length)


def config_of(backend_kwargs: dict[str, Any] | None) -> VMoBAConfig:
    """The config of the file that ``VMOBA_FLEX_CONFIG`` names; without one, that of vLLM-Omni's ``block_sparse``.

    Args:
        backend_kwargs: of ``block_sparse``: ``sparsity`` is 1 - density, ``start_step`` and ``end_step`` are numbers of
            dense steps, ``skip_layers`` dense layers. Blocks, gate and tail are those of ``VMoBAConfig.fast``.

    Raises:
        ValueError: if both are given, or a value is none of VMoBA's.
    """
    given = _UNSET | (backend_kwargs or {})
    if given["precision"] != "bf16":
        raise ValueError(f"precision of block_sparse must be 'bf16' for VMoBA, got {given['precision']!r}")
    if path := os.environ.get(_CONFIG):
        if given != _UNSET:
            raise ValueError(f"block_sparse must be left out where {_CONFIG} names a file, got {given}")
        config = VMoBAConfig.load(path)
        if config.remember is not None:
            raise ValueError(
                "remember must be None with vLLM-Omni, which does not tell a backend whose request it serves, got "
                f"{config.remember}"
            )
        return config
    if not 0 <= given["sparsity"] < 1:
        raise ValueError(f"sparsity of block_sparse must lie in [0, 1) for VMoBA, got {given['sparsity']}")
    return dataclasses.replace(
        VMoBAConfig.fast(),
        rule=TopK(density=1 - given["sparsity"], gate="spread"),
        remember=None,
        dense_steps=(given["start_step"], given["end_step"]),
        dense_layers=given.get("skip_layers", 0),
    )


def _check_parallel(config: VMoBAConfig) -> None:
    from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

    parallel = getattr(get_current_diffusion_config_or_none(), "parallel_config", None)
    for name in ("ring_degree", "allgather_degree"):
        if (degree := getattr(parallel, name, 1)) > 1:
            raise ValueError(f"{name} must be 1 for VMoBA, which chooses among all keys, got {degree}: use Ulysses")
    if any(getattr(parallel, name, 1) > 1 for name in ("ulysses_degree", "tensor_parallel_size")):
        check_pools(config)
