"""The smallest model of each class that has an adapter and no family in ``video_models.py``, with its arguments.

Where the video lies among the tokens of a layer is written here by hand, and shown by ``moved``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# pytest looks for doctests in this module too, also where diffusers is missing.
pytest.importorskip("diffusers")

import diffusers

from tests.video_models import Grid, draw_parameters

Draw = Callable[..., Tensor]

# How latents come: letters of their dims, or "tokens".
BCTHW, BTCHW, BTHWC, TOKENS = "bcthw", "btchw", "bthwc", "tokens"
IMAGE = (1, 4, 4)


@dataclasses.dataclass(frozen=True)
class Model:
    """One class.

    Attributes:
        class_name: of the transformer, in diffusers.
        config: its arguments.
        draw: forward's arguments for a function that draws a tensor of a shape.
        layers: its self-attention layers, as paths from the transformer.
        grid: of the video.
        prefix: tokens before the video in these layers.
        suffix: tokens after the video.
        layout: of ``hidden_states``; None where the first layer sees other tokens than these.
        first: of the video among ``hidden_states``: a frame, or a token.
        patch: tokens' size in latents.
        by_sdpa: whether the stock processor calls ``scaled_dot_product_attention`` itself, heads first.
    """

    class_name: str
    config: dict[str, Any]
    draw: Callable[[Draw], dict[str, Any]]
    layers: tuple[str, ...]
    grid: Grid
    prefix: int = 0
    suffix: int = 0
    layout: str | None = BCTHW
    first: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    by_sdpa: bool = False

    def build(self) -> nn.Module:
        """A random model on the CPU, in eval mode."""
        model = getattr(diffusers, self.class_name)(**self.config)
        draw_parameters(model, torch.Generator().manual_seed(0))
        return model.eval()

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of forward."""
        generator = torch.Generator().manual_seed(seed)
        return self.draw(lambda *shape: torch.randn(shape, generator=generator)) | {"return_dict": False}

    def attentions(self, model: nn.Module) -> list[Any]:
        """The self-attention layers."""
        return [model.get_submodule(path) for path in self.layers]

    def moved(self, inputs: dict[str, Any], place: Grid) -> tuple[dict[str, Any], int]:
        """The arguments with other latents at one token of the grid, and its place among the tokens of a layer."""
        (t, y, x), (_, height, width) = place, self.grid
        token = (t * height + y) * width + x
        latents = inputs["hidden_states"].clone()
        if self.layout == TOKENS:
            latents[:, self.first + token] += 3
        else:
            axes = dict(zip("thw", ((t + self.first, 0), (y, 1), (x, 2)), strict=True))
            at = [slice(None)] * 5
            for axis, (i, which) in axes.items():
                size = self.patch[which]
                at[(self.layout or "").index(axis)] = slice(i * size, (i + 1) * size)
            latents[tuple(at)] += 3
        return inputs | {"hidden_states": latents}, self.prefix + token


T2 = torch.tensor([500, 300])
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip
HUNYUAN: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16,
    "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip
LTX2: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 16, "rope_double_precision": False,
}  # fmt: skip
KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 16,
    "patch_size": (1, 2, 2), "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}  # fmt: skip
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
    "text_embed_dim": 8, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 9, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": 8,
}  # fmt: skip
TWO_BLOCKS = ("blocks.0.attn1", "blocks.1.attn1")
TWO_OF_TRANSFORMER = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
DUAL_AND_SINGLE = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
VALID = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


def wan(z: Draw) -> dict[str, Any]:
    """Wan's own."""
    return {"hidden_states": z(2, 4, 4, 8, 8), "timestep": T2, "encoder_hidden_states": z(2, 12, 16)}


def wan_animate(z: Draw) -> dict[str, Any]:
    """A reference frame, then those of the pose."""
    return {
        "hidden_states": z(2, 12, 6, 8, 8),
        "timestep": T2,
        "encoder_hidden_states": z(2, 512, 16),
        "encoder_hidden_states_image": z(2, 5, 16),
        "pose_hidden_states": z(2, 4, 5, 8, 8),
        "face_pixel_values": z(2, 3, 17, 16, 16),
    }


def helios(z: Draw) -> dict[str, Any]:
    """Histories of 4, 8 and 32 tokens."""
    inputs = {"hidden_states": z(2, 4, 3, 8, 8), "timestep": T2, "encoder_hidden_states": z(2, 12, 16)}
    for name, frames in (("short", 2), ("mid", 2), ("long", 16)):
        inputs[f"latents_history_{name}"] = z(2, 4, frames, 8, 8)
        inputs[f"indices_latents_history_{name}"] = torch.arange(frames)[None].expand(2, -1)
    return inputs | {"indices_hidden_states": torch.arange(20, 23)[None].expand(2, -1)}


def hunyuan(z: Draw, *, frames: int = 3) -> dict[str, Any]:
    """HunyuanVideo's own, of two samples with padding."""
    return {
        "hidden_states": z(2, 4, frames, 8, 8),
        "timestep": T2.float(),
        "encoder_hidden_states": z(2, 12, 16),
        "encoder_attention_mask": VALID,
        "pooled_projections": z(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def framepack(z: Draw) -> dict[str, Any]:
    """Histories of 4 frames in three sizes."""
    return hunyuan(z) | {
        "image_embeds": z(2, 5, 16),
        "indices_latents": torch.arange(12, 15),
        "latents_clean": z(2, 4, 2, 8, 8),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": z(2, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.arange(2, 4),
        "latents_history_4x": z(2, 4, 8, 8, 8),
        "indices_latents_history_4x": torch.arange(4, 12),
    }


def motif(z: Draw) -> dict[str, Any]:
    """Text with gaps, and an image."""
    mask = torch.tensor([[1] * 12, [1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0]])
    text = {"encoder_hidden_states": z(2, 12, 16), "encoder_attention_mask": mask, "image_embeds": z(2, 3, 4)}
    return {"hidden_states": z(2, 9, 3, 8, 8), "timestep": T2} | text


def minimax_h3(z: Draw) -> dict[str, Any]:
    """5 text tokens, 4 of a condition frame, 6 of audio, and a video of 3 x 4 x 4."""
    kinds = torch.tensor([1] * 5 + [0] * 4 + [2] * 6 + [0] * 48)
    rows = torch.arange(63)
    axes = torch.meshgrid(torch.arange(3) + 5.0, torch.arange(4.0), torch.arange(4.0), indexing="ij")
    positions = torch.zeros(63, 3)
    positions[:15, 0], positions[15:] = torch.arange(15), torch.stack(axes, -1).flatten(0, 2)
    return {
        "hidden_states": z(2, 52, 16),
        "audio_hidden_states": z(2, 6, 6),
        "encoder_hidden_states": z(2, 5, 8),
        "timestep": torch.tensor([0.5, 0.3, 0.0]),
        "timestep_indices": torch.tensor([0] * 5 + [2] * 4 + [1] * 6 + [0] * 48),
        "token_tags": kinds,
        "position_ids": positions,
        "video_indices": rows[kinds == 0],
        "audio_indices": rows[kinds == 2],
        "text_indices": rows[kinds == 1],
    }


def ltx2(z: Draw) -> dict[str, Any]:
    """Video and audio."""
    return {
        "hidden_states": z(2, 48, 4),
        "audio_hidden_states": z(2, 9, 4),
        "encoder_hidden_states": z(2, 6, 16),
        "audio_encoder_hidden_states": z(2, 6, 16),
        "timestep": T2.float(),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def ltx23(z: Draw) -> dict[str, Any]:
    """With guidance that skips the second block's attention in one sample."""
    of_guidance = {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([1.0, 0.0])}
    return ltx2(z) | {"sigma": torch.tensor([0.5, 0.3])} | of_guidance


def kandinsky(z: Draw, *, audio: bool = False) -> dict[str, Any]:
    """Latents with channels last."""
    inputs: dict[str, Any] = {
        "hidden_states": z(2, 3, 8, 8, 4),
        "encoder_hidden_states": z(2, 6, 8),
        "timestep": T2,
        "pooled_projections": z(2, 8),
    }
    positions = tuple(torch.arange(size) for size in (3, 4, 4))
    if audio:  # and the last frame is a reference
        of_time = torch.tensor([0, 1, 2, 0])
        inputs |= {"hidden_states": z(2, 4, 8, 8, 4), "audio_hidden_states": z(2, 7, 5)}
        return inputs | {"visual_rope_pos": (of_time, *positions[1:])}
    return inputs | {"visual_rope_pos": positions, "text_rope_pos": torch.arange(6)}


def cosmos3(z: Draw) -> dict[str, Any]:
    """4 text tokens, then a video of 2 x 4 x 4."""
    rows = torch.arange(4, 36)
    return {
        "input_ids": torch.arange(4),
        "text_indexes": torch.arange(4),
        "position_ids": torch.arange(36).expand(3, -1),
        "und_len": 4,
        "sequence_length": 36,
        "vision_tokens": [z(1, 2, 2, 4, 4)],
        "vision_token_shapes": [(2, 4, 4)],
        "vision_sequence_indexes": rows,
        "vision_mse_loss_indexes": rows,
        "vision_timesteps": torch.ones(32),
        "vision_noisy_frame_indexes": [torch.tensor([0, 1])],
    }


def cosmos(z: Draw) -> dict[str, Any]:
    """Whole text."""
    text = {"encoder_hidden_states": z(2, 12, 16), "attention_mask": torch.ones(2, 12, dtype=torch.bool)}
    return {"hidden_states": z(2, 4, 3, 8, 8), "timestep": T2, "fps": 30} | text


def consisid(z: Draw) -> dict[str, Any]:
    """A face."""
    face = {"id_vit_hidden": [torch.ones(2, 2, 2)], "id_cond": torch.ones(2, 2)}
    angles = z(48, 4).repeat_interleave(2, 1)
    rotary = {"image_rotary_emb": (angles.cos(), angles.sin())}
    text = {"encoder_hidden_states": z(2, 8, 8)}
    return {"hidden_states": z(2, 3, 4, 8, 8), "timestep": T2} | text | face | rotary


def allegro(z: Draw) -> dict[str, Any]:
    """Cosines and sines by position on each axis, and each token's positions."""
    waves = [tuple(f(z(size, 4).repeat(1, 2)) for f in (torch.cos, torch.sin)) for size in (3, 4, 4)]
    axes = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(4), indexing="ij")
    return {
        "hidden_states": z(2, 4, 3, 8, 8),
        "encoder_hidden_states": z(2, 6, 8),
        "timestep": T2,
        "encoder_attention_mask": torch.ones(2, 6),
        "image_rotary_emb": (waves, [axis.flatten()[None] for axis in axes]),
    }


def flux2(z: Draw) -> dict[str, Any]:
    """An image, and one of 2 x 2 as reference."""
    of_images = [(0, y, x, 0) for y in range(4) for x in range(4)] + [(10, y, x, 0) for y in range(2) for x in range(2)]
    return {
        "hidden_states": z(2, 20, 4),
        "encoder_hidden_states": z(2, 6, 16),
        "timestep": torch.tensor([0.5, 0.3]),
        "img_ids": torch.tensor(of_images)[None].expand(2, -1, -1),
        "txt_ids": torch.tensor([(0, 0, 0, i) for i in range(6)])[None].expand(2, -1, -1),
        "guidance": torch.tensor([3.0, 3.0]),
    }


def qwen_image(z: Draw) -> dict[str, Any]:
    """Text with gaps, an image, and one of 2 x 2 that it edits."""
    return {
        "hidden_states": z(2, 20, 16),
        "encoder_hidden_states": z(2, 8, 16),
        "encoder_hidden_states_mask": torch.tensor([[1] * 8, [1, 0, 1, 1, 0, 0, 1, 0]]),
        "timestep": torch.tensor([0.5, 0.3]),
        "img_shapes": [[(1, 4, 4), (1, 2, 2)]] * 2,
    }


def z_image(z: Draw) -> dict[str, Any]:
    """Two images with captions of two lengths."""
    images, texts = [z(4, 1, 8, 8), z(4, 1, 8, 8)], [z(16, 16), z(40, 16)]
    return {"x": images, "cap_feats": texts, "t": torch.tensor([0.5, 0.3])}


def krea2(z: Draw) -> dict[str, Any]:
    """Padded text before an image."""
    of_image = [(0, y, x) for y in range(4) for x in range(4)]
    return {
        "hidden_states": z(2, 16, 4),
        "encoder_hidden_states": z(2, 4, 2, 12),
        "timestep": torch.tensor([0.5, 0.3]),
        "position_ids": torch.tensor([(0, 0, 0)] * 4 + of_image),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]).bool(),
    }


MODELS = {
    "vace": Model(
        "WanVACETransformer3DModel",
        WAN | {"rope_max_seq_len": 32, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 12},
        lambda z: wan(z) | {"control_hidden_states": z(2, 12, 4, 8, 8)},
        (*TWO_BLOCKS, "blocks.2.attn1", "vace_blocks.0.attn1", "vace_blocks.1.attn1"),
        (4, 4, 4),
    ),
    "wan-animate": Model(
        "WanAnimateTransformer3DModel",
        WAN | {
            "rope_max_seq_len": 32, "in_channels": 12, "latent_channels": 4, "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        wan_animate, TWO_BLOCKS, (5, 4, 4), prefix=16, first=1,
    ),
    "chronoedit": Model(
        "ChronoEditTransformer3DModel",
        WAN | {"rope_max_seq_len": 32, "rope_temporal_skip_len": 8}, wan, TWO_BLOCKS, (4, 4, 4),
    ),
    "minimax-h3": Model(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "patch_size": (1, 2, 2),
            "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        minimax_h3, ("transformer_blocks.0.attn", "transformer_blocks.1.attn"), (3, 4, 4), prefix=15, layout=TOKENS,
        first=4,
    ),
    "ltx-2": Model("LTX2VideoTransformer3DModel", LTX2, ltx2, TWO_OF_TRANSFORMER, (3, 4, 4), layout=TOKENS),
    "ltx-2.3": Model(
        "LTX2VideoTransformer3DModel",
        LTX2 | dict.fromkeys(
            ("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn"), True
        ) | {"rope_type": "split"},
        ltx23, TWO_OF_TRANSFORMER, (3, 4, 4), layout=TOKENS,
    ),
    "framepack": Model(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {
            "guidance_embeds": True, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True,
        },
        framepack, DUAL_AND_SINGLE, (3, 4, 4), prefix=38, suffix=17,
    ),
    "kandinsky-5": Model(
        "Kandinsky5Transformer3DModel", KANDINSKY, kandinsky,
        ("visual_transformer_blocks.0.self_attention", "visual_transformer_blocks.1.self_attention"), (3, 4, 4),
        layout=BTHWC,
    ),
    "kandinsky-6": Model(
        "Kandinsky6Transformer3DModel",
        KANDINSKY | {"visual_cond": False, "in_audio_dim": 5, "out_audio_dim": 5, "ca_rope": True},
        lambda z: kandinsky(z, audio=True),
        tuple(f"visual_transformer_blocks.{i}.video_dec_block.self_attention" for i in range(2)), (3, 4, 4), suffix=16,
        layout=BTHWC,
    ),
    "cosmos": Model(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        cosmos, TWO_OF_TRANSFORMER, (3, 4, 4),
    ),
    "cosmos-3": Model(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 12, "hidden_act": "relu2", "hidden_size": 24, "intermediate_size": 24, "latent_channel": 2,
            "latent_patch_size": 1, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
            "patch_latent_dim": 2, "qk_norm_for_text": False, "rms_norm_eps": 1e-5, "rope_axes_dim": [2, 2, 2],
            "rope_theta": 1e8, "vocab_size": 32,
        },
        cosmos3, ("layers.0.self_attn", "layers.1.self_attn"), (2, 4, 4), prefix=4, layout=None,
    ),
    "motif": Model(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
            "num_single_layers": 2, "mlp_ratio": 2.0, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16,
            "image_embed_dim": 4, "rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True, "num_decoder_layers": 1,
        },
        motif, (*DUAL_AND_SINGLE, "single_transformer_blocks.1.attn"), (3, 4, 4), suffix=15,
    ),
    "easyanimate": Model(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "mmdit_layers": 1,
            "num_layers": 2, "patch_size": 2, "sample_height": 8, "sample_width": 8, "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        lambda z: {"hidden_states": z(2, 4, 3, 8, 8), "timestep": T2, "encoder_hidden_states": z(2, 6, 16)},
        TWO_OF_TRANSFORMER, (3, 4, 4), prefix=6, by_sdpa=True,
    ),
    "anyflow": Model(
        "AnyFlowTransformer3DModel",
        WAN | {"rope_max_seq_len": 32, "cross_attn_norm": True, "gate_value": 0.25, "deltatime_type": "r"},
        lambda z: {
            "hidden_states": z(2, 4, 4, 8, 8), "timestep": torch.full((2, 4), 500.0),
            "r_timestep": torch.full((2, 4), 400.0), "encoder_hidden_states": z(2, 12, 16),
        },
        TWO_BLOCKS, (4, 4, 4), layout=BTCHW,
    ),
    "helios": Model(
        "HeliosTransformer3DModel",
        WAN | {
            "rope_dim": (4, 4, 4), "has_multi_term_memory_patch": True, "guidance_cross_attn": True,
            "zero_history_timestep": True, "is_amplify_history": True,
        },
        helios, TWO_BLOCKS, (3, 4, 4), prefix=40,
    ),
    "consisid": Model(
        "ConsisIDTransformer3DModel",
        COGVIDEOX | {
            "cross_attn_interval": 1, "is_kps": False, "is_train_face": True, "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8,
            "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        consisid, ("transformer_blocks.0.attn1",), (3, 4, 4), prefix=8, layout=BTCHW, by_sdpa=True,
    ),
    "allegro": Model(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "num_layers": 1,
            "cross_attention_dim": 48, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
            "caption_channels": 8,
        },
        allegro, ("transformer_blocks.0.attn1",), (3, 4, 4), by_sdpa=True,
    ),
    "flux-2": Model(
        "Flux2Transformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 16, "joint_attention_dim": 16, "timestep_guidance_channels": 16,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        flux2, DUAL_AND_SINGLE, IMAGE, prefix=6, suffix=4, layout=TOKENS,
    ),
    "qwen-image": Model(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 16, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
        },
        qwen_image, ("transformer_blocks.0.attn", "transformer_blocks.1.attn"), IMAGE, prefix=8, suffix=4,
        layout=TOKENS,
    ),
    "z-image": Model(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        z_image, ("layers.0.attention", "layers.1.attention"), IMAGE, suffix=80, layout=None,
    ),
    "krea-2": Model(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8,
            "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 12,
            "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
            "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        krea2, ("transformer_blocks.0.attn", "transformer_blocks.1.attn"), IMAGE, prefix=4, layout=TOKENS,
    ),
}  # fmt: skip
