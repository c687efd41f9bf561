"""The models of diffusers: each class with its adapter, or with the reason why it has none."""

from typing import Any

from vmoba_flex.models import grids
from vmoba_flex.models.adapter import Adapter
from vmoba_flex.models.families import (
    AllegroProcessor,
    CogVideoXProcessor,
    CosmosProcessor,
    EasyAnimateProcessor,
    HunyuanVideo15Processor,
    MochiProcessor,
)

_BLOCKS = ("blocks.*.attn1",)
_DUAL = ("transformer_blocks.*.attn",)
_DUAL_AND_SINGLE = (*_DUAL, "single_transformer_blocks.*.attn")
_FIRST = ("transformer_blocks.*.attn1",)


def _refuse_block_causal(model: Any) -> str | None:
    count = model.config.num_frame_per_block
    return f"num_frame_per_block must be 1 (no block-causal mode), got {count}" if count > 1 else None


_COGVIDEOX = Adapter(
    _FIRST,
    grids.frames_first_grid,
    processor=CogVideoXProcessor,
    stock=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
)
_NO_GRID = (
    "it gives its transformer coordinates in place of a grid. Use LTXPipeline.from_pipe(pipe) or "
    "LTXImageToVideoPipeline.from_pipe(pipe), or apply to pipe.transformer and call handle.set_grid"
)

# Video, then images as grids of one frame.
ADAPTERS: dict[str, Adapter] = {
    "WanTransformer3DModel": Adapter(_BLOCKS, grids.patched_grid),
    "WanVACETransformer3DModel": Adapter((*_BLOCKS, "vace_blocks.*.attn1"), grids.patched_grid),
    "WanAnimateTransformer3DModel": Adapter(_BLOCKS, grids.animated_grid, "prefix"),
    "ChronoEditTransformer3DModel": Adapter(_BLOCKS, grids.patched_grid),
    "SkyReelsV2Transformer3DModel": Adapter(_BLOCKS, grids.patched_grid, refuse=_refuse_block_causal),
    "AnyFlowTransformer3DModel": Adapter(_BLOCKS, grids.frames_first_grid),
    "HeliosTransformer3DModel": Adapter(_BLOCKS, grids.patched_grid, "prefix"),
    "MiniMaxH3Transformer3DModel": Adapter(_DUAL, grids.minimax_h3_grid, "prefix"),
    "LTXVideoTransformer3DModel": Adapter(
        _FIRST,
        grids.given_grid,
        refused_pipelines=dict.fromkeys(("LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"), _NO_GRID),
    ),
    "LTX2VideoTransformer3DModel": Adapter(_FIRST, grids.given_grid, "suffix"),
    "HunyuanVideoTransformer3DModel": Adapter(_DUAL_AND_SINGLE, grids.patched_grid, "suffix", padding="last"),
    "HunyuanVideoFramepackTransformer3DModel": Adapter(
        _DUAL_AND_SINGLE, grids.patched_grid, "suffix", grids.framepack_history, padding="last"
    ),
    "HunyuanVideo15Transformer3DModel": Adapter(
        _DUAL, grids.patched_grid, processor=HunyuanVideo15Processor, stock=("HunyuanVideo15AttnProcessor2_0",)
    ),
    "MotifVideoTransformer3DModel": Adapter(_DUAL_AND_SINGLE, grids.patched_grid, "suffix", padding="anywhere"),
    "Kandinsky5Transformer3DModel": Adapter(("visual_transformer_blocks.*.self_attention",), grids.kandinsky5_grid),
    "Kandinsky6Transformer3DModel": Adapter(
        ("visual_transformer_blocks.*.video_dec_block.self_attention",), grids.kandinsky6_grid, "suffix"
    ),
    "Cosmos3OmniTransformer": Adapter(("layers.*.self_attn",), grids.cosmos3_grid, "suffix", grids.cosmos3_text),
    "CosmosTransformer3DModel": Adapter(
        _FIRST, grids.patched_grid, processor=CosmosProcessor, stock=("CosmosAttnProcessor2_0",)
    ),
    "EasyAnimateTransformer3DModel": Adapter(
        _FIRST, grids.patched_grid, processor=EasyAnimateProcessor, stock=("EasyAnimateAttnProcessor2_0",)
    ),
    "AllegroTransformer3DModel": Adapter(
        _FIRST, grids.patched_grid, processor=AllegroProcessor, stock=("AllegroAttnProcessor2_0",)
    ),
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": _COGVIDEOX,
    "MochiTransformer3DModel": Adapter(
        _FIRST, grids.patched_grid, processor=MochiProcessor, stock=("MochiAttnProcessor2_0",)
    ),
    "Flux2Transformer2DModel": Adapter(_DUAL_AND_SINGLE, grids.flux2_grid, "suffix", grids.text_tokens),
    "QwenImageTransformer2DModel": Adapter(
        _DUAL, grids.qwen_image_grid, "suffix", grids.text_tokens, padding="anywhere"
    ),
    "ZImageTransformer2DModel": Adapter(("layers.*.attention",), grids.z_image_grid, "suffix", padding="last"),
    "Krea2Transformer2DModel": Adapter(_DUAL, grids.krea2_grid, "prefix", padding="anywhere"),
}

_SPLIT = "space and time attend in separate layers, which have few tokens each"
_LINEAR = "its self-attention is linear"
_SPARSE = "its self-attention is sparse by a mask of its own"

REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": _SPARSE,
    "Kandinsky6SRTransformer3DModel": _SPARSE,
    "WanAnimate2Transformer3DModel": "its denoising steps attend cached frames by a mask of its own",
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": "most of its self-attention is linear, and the rest has no processors",
    "LatteTransformer3DModel": _SPLIT,
    "UNetMotionModel": _SPLIT,
    "UNetSpatioTemporalConditionModel": _SPLIT,
    "I2VGenXLUNet": _SPLIT,
    "UNet3DConditionModel": _SPLIT,
    "TransformerTemporalModel": _SPLIT,
}
