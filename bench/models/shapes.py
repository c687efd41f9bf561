"""The models of the end-to-end benchmark, and how they are built."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bench.common.sizes import Sizes3
from vmoba_flex import Tail, Threshold, TopK
from vmoba_flex.call import Dispatch
from vmoba_flex.config import ApproxBlocks, VMoBAConfig

TRAINING_RULE = Threshold(0.25, pool="head", max_density=0.25)
INFERENCE_RULE = TopK(density=0.25)
Random = Callable[..., Tensor]
# Factor of the weight of the norm on queries. Fresh weights attend all keys about equally, and the output would hardly
# depend on the attention.
_SHARPEN = 3.0


@dataclasses.dataclass(frozen=True)
class Part:
    """Layers of one kind that are built, and how many of them the whole model has.

    Attributes:
        layers: built; a multiple of 3, so that each kind of block shape occurs equally often.
        of: in the whole model.
        arguments: that make these layers, in addition to the model's.
    """

    layers: int
    of: int
    arguments: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer of diffusers.

    Attributes:
        name: in the table.
        class_name: in diffusers.
        heads: of its self-attention.
        head_dim: D.
        text_tokens: of the text that comes with the video.
        arguments: of the class, without the numbers of layers.
        parts: measured one after another; times are added up, each scaled to the layers of the whole model.
        draw: makes forward's arguments for a grid, given a function that makes random tensors.
    """

    name: str
    class_name: str
    heads: int
    head_dim: int
    text_tokens: int
    arguments: dict[str, Any]
    parts: tuple[Part, ...]
    draw: Callable[["Model", Sizes3, Random], dict[str, Any]]

    def build(self, part: Part, device: str, dtype: torch.dtype) -> Any:
        """The transformer of diffusers with random weights, made on the device; the same at each call."""
        import diffusers

        before = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                model = getattr(diffusers, self.class_name)(**self.arguments, **part.arguments)
        finally:
            torch.set_default_dtype(before)
        exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if exact & set(name.split(".")):
                    parameter.data = parameter.data.float()  # as from_pretrained does
                if name.endswith("norm_q.weight"):
                    parameter.mul_(_SHARPEN)
        return model

    def inputs(self, grid: Sizes3, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """Random inputs of batch 1; the same at each call."""
        generator = torch.Generator(device).manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return {**self.draw(self, grid, random), "return_dict": False}


def _wan_inputs(model: Model, grid: Sizes3, random: Random) -> dict[str, Any]:
    return {**_latents(model, grid, random), "encoder_hidden_states": _text(model, random, "text_dim")}


def _hunyuan_inputs(model: Model, grid: Sizes3, random: Random) -> dict[str, Any]:
    latents, text = _latents(model, grid, random), _text(model, random, "text_embed_dim")
    return {
        **latents,
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(text.shape[:2], dtype=torch.bool, device=text.device),
        "pooled_projections": random(1, model.arguments["pooled_projection_dim"]),
        "guidance": torch.full((1,), 6000.0, dtype=text.dtype, device=text.device),
    }


def _latents(model: Model, grid: Sizes3, random: Random) -> dict[str, Tensor]:
    frames, height, width = grid
    latents = random(1, model.arguments["in_channels"], frames, 2 * height, 2 * width)
    return {"hidden_states": latents, "timestep": torch.tensor([500], device=latents.device)}


def _text(model: Model, random: Random, channels: str) -> Tensor:
    return random(1, model.text_tokens, model.arguments[channels])


def _wan(name: str, layers: int, of: int, heads: int, head_dim: int, text: int, **arguments: int) -> Model:
    arguments |= {"num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": 16, "out_channels": 16}
    parts = (Part(layers, of, {"num_layers": layers}),)
    return Model(name, "WanTransformer3DModel", heads, head_dim, text, arguments, parts, _wan_inputs)


def _hunyuan(dual: int, single: int, heads: int, head_dim: int, text: int, **arguments: Any) -> Model:
    arguments |= {"num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": 16}
    arguments |= {"num_refiner_layers": 0}  # they see only the text: long to compile, quick to run
    parts = (
        Part(3, dual, {"num_layers": 3, "num_single_layers": 0}),
        Part(3, single, {"num_layers": 0, "num_single_layers": 3}),
    )
    name = "HunyuanVideo"
    return Model(name, "HunyuanVideoTransformer3DModel", heads, head_dim, text, arguments, parts, _hunyuan_inputs)


def _minimax_h3(of: int, heads: int, hidden: int, head_dim: int = 128, **arguments: int) -> Model:
    """With 512 text tokens and 400 of audio before the video: of all rows, and no condition frames."""
    arguments |= {"num_attention_heads": heads, "attention_head_dim": head_dim, "hidden_size": hidden}
    arguments |= {"num_refiner_layers": 0, "in_channels": 24, "audio_in_channels": 32}
    parts = (Part(3, of, {"num_layers": 3}),)
    return Model("MiniMax-H3", "MiniMaxH3Transformer3DModel", heads, head_dim, 512, arguments, parts, _h3_inputs)


def _h3_inputs(model: Model, grid: Sizes3, random: Random) -> dict[str, Any]:
    text, audio, video = model.text_tokens, 400, math.prod(grid)
    kinds = torch.tensor([1] * text + [2] * audio + [0] * video)
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    positions = torch.zeros(len(kinds), 3)
    positions[text + audio :] = torch.stack(axes, -1).flatten(0, 2)
    latents = random(1, video, 4 * model.arguments["in_channels"])
    on_device = {
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros_like(kinds),
        "token_tags": kinds,
        "position_ids": positions,
        **{f"{name}_indices": (kinds == kind).nonzero()[:, 0] for kind, name in enumerate(("video", "text", "audio"))},
    }
    return {
        "hidden_states": latents,
        "audio_hidden_states": random(1, audio, model.arguments["audio_in_channels"]),
        "encoder_hidden_states": _text(model, random, "text_dim"),
        **{name: x.to(latents.device) for name, x in on_device.items()},
    }


def _ltx2(of: int, heads: int, head_dim: int, text: int, **arguments: Any) -> Model:
    """With ten seconds of audio, 250 tokens, of another stream."""
    arguments |= {"num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": 128}
    arguments |= {"cross_attention_dim": heads * head_dim}
    parts = (Part(3, of, {"num_layers": 3}),)
    return Model("LTX-2", "LTX2VideoTransformer3DModel", heads, head_dim, text, arguments, parts, _ltx2_inputs)


def _ltx2_inputs(model: Model, grid: Sizes3, random: Random) -> dict[str, Any]:
    latents = random(1, math.prod(grid), model.arguments["in_channels"])
    return {
        "hidden_states": latents,
        "audio_hidden_states": random(1, 250, 128),
        "encoder_hidden_states": _text(model, random, "caption_channels"),
        "audio_encoder_hidden_states": _text(model, random, "caption_channels"),
        "timestep": torch.tensor([500.0], device=latents.device),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        "audio_num_frames": 250,
        "fps": 24.0,
    }


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of one run of the command.

    Attributes:
        dtype: of weights and inputs.
        models: one to measure whole, and those of which a few layers are measured.
        more: other models, of which a few layers are measured on one grid.
        grids: five latent video sizes from small to large, after patching.
        about: how many blocks the three kinds have; None for the paper's block shapes, or on other grids for about as
            many blocks.
    """

    dtype: torch.dtype
    models: tuple[Model, Model, Model]
    more: tuple[tuple[Model, Sizes3], ...]
    grids: tuple[Sizes3, ...]
    about: tuple[int, int, int] | None = None

    def config(
        self, grid: Sizes3, training: bool, name: str, density: float | None = None, tail: bool = False
    ) -> VMoBAConfig:
        """The configuration of a row of ours; ``name``: its dispatch; ``density``: None for the paper's rule."""
        rule = TRAINING_RULE if training else INFERENCE_RULE
        if density is not None:
            rule = TopK(density=density)
        options: Any = {"dispatch": cast(Dispatch, name), "tail": Tail() if tail else None}
        if self.about is None:
            return dataclasses.replace(VMoBAConfig.paper("training", grid), rule=rule, **options)
        temporal, spatial, cubes = map(ApproxBlocks, self.about)
        return VMoBAConfig(temporal, spatial, cubes, rule, **options)


_SMALL_AUDIO = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
FULL = ModelSizes(
    dtype=torch.bfloat16,
    models=(
        _wan("Wan 1.3B", 30, 30, heads=12, head_dim=128, text=512, ffn_dim=8960, text_dim=4096),
        _wan("Wan 14B", 3, 40, heads=40, head_dim=128, text=512, ffn_dim=13824, text_dim=4096),
        _hunyuan(20, 40, heads=24, head_dim=128, text=256, text_embed_dim=4096, pooled_projection_dim=768),
    ),
    more=(
        (_minimax_h3(50, heads=56, hidden=5376, ffn_dim=14336, text_dim=5120), (37, 34, 60)),
        (_ltx2(48, heads=32, head_dim=128, text=1024, caption_channels=3840), (31, 34, 60)),
    ),
    grids=((14, 24, 40), (21, 30, 52), (24, 36, 64), (21, 45, 80), (32, 48, 72)),
)
SMALL = ModelSizes(
    dtype=torch.float32,
    models=(
        _wan("Wan 1.3B", 3, 3, heads=2, head_dim=16, text=8, ffn_dim=48, text_dim=24),
        _wan("Wan 14B", 3, 6, heads=3, head_dim=16, text=8, ffn_dim=48, text_dim=24),
        _hunyuan(
            6, 9, heads=2, head_dim=16, text=8, text_embed_dim=24, pooled_projection_dim=24, rope_axes_dim=(4, 6, 6)
        ),
    ),
    more=(
        (_minimax_h3(6, 2, 24, head_dim=16, ffn_dim=32, text_dim=8, time_embed_dim=16, rope_freq_dim=2), (3, 4, 6)),
        (_ltx2(6, heads=2, head_dim=16, text=8, caption_channels=16, **_SMALL_AUDIO), (3, 4, 6)),
    ),
    grids=((3, 4, 6),) * 5,
    about=(2, 4, 6),
)
