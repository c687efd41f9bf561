"""ComfyUI: nodes that give a model VMoBA attention. Written against its sources around 0.38.

A model's attention goes through one function of its options, ``optimized_attention_override``, which is ours. ComfyUI
finds the nodes by ``NODE_CLASS_MAPPINGS`` of a file in ``custom_nodes`` that imports it from here.

B batch, H heads, S tokens, D head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.hosts.video import Video, attend_video, layer_of
from vmoba_flex.models.memory import LayerMemory, RunMemory
from vmoba_flex.remember import CHOOSES_ONCE
from vmoba_flex.rules import TopK
from vmoba_flex.tail import Tail
from vmoba_flex.told import Told

_SLOT = "optimized_attention_override"
_KEY = "vmoba_flex"


def patch_model(model: Any, config: VMoBAConfig) -> Any:
    """A copy of a model whose self-attention is VMoBA.

    Args:
        model: ComfyUI's ``ModelPatcher``, which stays as it is.
        config: of all layers. Steps are those of the sampler that runs.

    Raises:
        TypeError: if ``config`` is no ``VMoBAConfig``.
    """
    if not isinstance(config, VMoBAConfig):
        raise TypeError(f"config must be a VMoBAConfig, got {type(config).__name__}")
    patched, run = model.clone(), Run(config)
    run.install(patched.model_options["transformer_options"])

    def prepare(patcher: Any, timestep: Any, model_options: Any = None) -> None:
        run.install((model_options or patcher.model_options)["transformer_options"])

    # A node after this one may have taken the slot; and what a run remembers ends with it.
    patched.add_callback_with_key("on_prepare_state", _KEY, prepare)
    patched.add_callback_with_key("on_cleanup", _KEY, lambda patcher: run.clear())
    return patched


class Run:
    """VMoBA in one patched model, and what its layers keep in the run of a sampler."""

    def __init__(self, config: VMoBAConfig) -> None:
        self.config, self.told, self._inside = config, Told(), False
        self.overrides: list[Any] = []
        self.clear()

    def clear(self) -> None:
        """Ends a run."""
        self.memory: RunMemory | None = None
        self._sigmas: Any = None
        self._step: tuple[int, int] | None = None

    def install(self, options: dict[str, Any]) -> None:
        """Puts this on top of whatever overrides the attention, which then runs what stays dense."""
        before = options.get(_SLOT)
        if before in self.overrides:
            return

        @torch.compiler.disable(reason="graphs would hold the denoising step as a constant")
        def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            sparse = None if self._inside else self.attend(*args, **kwargs)
            if sparse is not None:
                return sparse
            outer, self._inside = self._inside, True  # what was here before may hand the call on to this again
            try:
                return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)
            finally:
                self._inside = outer

        self.overrides.append(override)
        options[_SLOT] = override

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> Tensor | None:
        """Sparse attention, by the names that ComfyUI passes; None if the call stays dense.

        Args:
            q: ``(B, S, H * D)``, or ``(B, H, S, D)`` with ``skip_reshape``.
            k: the same.
            v: the same.
            heads: H.
            mask: a call with one stays dense.
            attn_precision: a call with another dtype than its tensors stays dense.
            skip_reshape: see ``q``.
            skip_output_reshape: whether the output is ``(B, H, S, D)`` and not ``(B, S, H * D)``.
            transformer_options: the grid, the block and the noise level.
            **others: such as ``scale``.

        Raises:
            ValueError: if the grid does not fit the config.
        """
        if q.shape != k.shape:  # cross-attention, or fewer key heads
            return None
        if mask is not None or attn_precision not in (None, q.dtype):
            self.told.tell("ComfyUI: attention with a mask or another precision stays dense")
            return None
        query, key, value = (
            x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1)) for x in (q, k, v)
        )  # each (B, S, H, D)
        options = transformer_options or {}
        video = self._video(options, query.shape[1])
        if video is None:
            return None
        step = self._step_of(options)
        if step is None and self.config.needs_step:
            self.told.tell("ComfyUI: layers stay dense where the sampler tells no falling sigmas, and so no step")
            return None
        index = options["block_index"]
        layer = layer_of(self.config, index, options.get("total_blocks"), *(step or (None, None)))
        kept, memory = None, self._memory(options, index, step)
        if memory is not None:
            heads_first = (query.transpose(1, 2), key.transpose(1, 2))
            partition, records = self.config.partition(layer.kind, *video), memory.records_of(layer)
            kept = memory.choice(layer.rule, records, layer.dense, *heads_first, partition, self.config.dispatch)
        if layer.dense:
            return None
        output = attend_video(query, key, value, video, self.config, layer, scale=others.get("scale"), selection=kept)
        return output.transpose(1, 2) if skip_output_reshape else output.flatten(2)

    def _video(self, options: dict[str, Any], tokens: int) -> Video | None:
        """Where the video lies among the tokens; None if that is not known."""
        layout, grid = options.get("minimax_h3_layout"), options.get("grid_sizes")
        video = None
        if layout is not None:
            if layout.seq_len != tokens:  # of the text, before it is packed
                return None
            for start, stop, kind in layout.segments:
                if kind == "video":
                    _, frames, height, width, _ = layout.signature
                    video = Video((frames, height // 2, width // 2), start, layout.seq_len - stop)
        elif grid is not None:
            video = Video(tuple(grid))
        if video is None or "block_index" not in options:
            self.told.tell("ComfyUI: layers of a model that publishes no grid of its tokens stay dense")
            return None
        if video.num_tokens != tokens:
            self.told.tell("ComfyUI: %d tokens stay dense: the model publishes a grid for %d", tokens, video.num_tokens)
            return None
        return video

    def _step_of(self, options: dict[str, Any]) -> tuple[int, int] | None:
        """The step of the sampler that runs, and their number; None if they are not known."""
        sigmas, schedule = options.get("sigmas"), options.get("sample_sigmas")
        if sigmas is None or schedule is None or len(schedule) < 2:
            return None
        if sigmas is not self._sigmas:  # one tensor for each forward: the device is read once for all layers
            levels, now = schedule.tolist(), sigmas.flatten()[0].item()
            steps = len(levels) - 1
            # A sampler may look between two levels. Then it still is at the step from the higher one.
            passed = sum(level >= now * (1 - 1e-5) for level in levels[1:])
            self._sigmas, self._step = sigmas, (min(passed, steps - 1), steps) if levels[0] > levels[-1] else None
        return self._step

    def _memory(self, options: dict[str, Any], index: int, step: tuple[int, int] | None) -> LayerMemory | None:
        """What the block keeps for these prompts; None if nothing is remembered."""
        if self.config.remember is None or step is None:
            return None
        schedule = options["sample_sigmas"]
        if self.memory is None or not self.memory.is_of(schedule, *step):
            self.memory = RunMemory(self.config.remember, schedule, step[1], self.told)
        # Calls of a block at a step are told apart by their order: samplers look twice, and blocks of VACE have the
        # index of the block that they belong to.
        one = self.memory.begin_pass(step[0], f"block {index} for {options.get('uuids')}")
        return self.memory.layer(one, index)


class VMoBANode:
    """Attention over the blocks of the video that matter to each token."""

    CATEGORY = "model/patch"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """ComfyUI's description of the arguments of ``patch``."""
        share = {"min": 0.0, "max": 0.99, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "density": ("FLOAT", share | {"default": 0.125, "min": 0.01, "max": 1.0, "step": 0.005}),
                "dense_steps": ("FLOAT", share | {"default": 0.25, "tooltip": "share of first steps that stay dense"}),
                "tail": ("BOOLEAN", {"default": True, "tooltip": "skipped blocks take part by means of their cells"}),
                "remember": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "blocks are those that dense steps attended most"},
                ),
            }
        }

    def patch(self, model: Any, density: float, dense_steps: float, tail: bool, remember: bool) -> tuple[Any]:
        """The model with ``VMoBAConfig.fast``, but for these values."""
        config = dataclasses.replace(
            VMoBAConfig.fast(),
            rule=TopK(density=density, gate="spread"),
            dense_steps=dense_steps,
            tail=Tail() if tail else None,
            remember=CHOOSES_ONCE if remember else None,
        )
        return (patch_model(model, config),)


class VMoBAFileNode:
    """The same, by a file of ``VMoBAConfig.save``."""

    CATEGORY = "model/patch"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """ComfyUI's description of the arguments of ``patch``."""
        return {"required": {"model": ("MODEL",), "config_file": ("STRING", {"default": ""})}}

    def patch(self, model: Any, config_file: str) -> tuple[Any]:
        """The model with the config of a file."""
        return (patch_model(model, VMoBAConfig.load(config_file)),)


NODE_CLASS_MAPPINGS = {"VMoBASparseAttention": VMoBANode, "VMoBASparseAttentionFile": VMoBAFileNode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "VMoBASparseAttention": "VMoBA Sparse Attention",
    "VMoBASparseAttentionFile": "VMoBA Sparse Attention (file)",
}
