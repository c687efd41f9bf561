"""Tiny random diffusers models of each supported family, their inputs, and what VMoBA must make of them.

Parameters are drawn anew, so that no gate is shut and every layer's attention shows in the output. ``reference`` makes
a stock model compute VMoBA densely, with the masks of ``vmoba_flex.reference``: it shares no code with the library.
"""

import contextlib
import dataclasses
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

# pytest looks for doctests in this module too, also where diffusers is missing.
pytest.importorskip("diffusers")

import diffusers
from diffusers.models import attention_processor

from vmoba_flex import BlockPartition, TopK, reference_gates
from vmoba_flex import reference as oracle
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.rules import Rule

Grid = tuple[int, int, int]
# What a layer attends: blocks (of the video only: text is added where the model has it) and rule, or None for all.
Choose = Callable[[int], tuple[BlockPartition, Rule] | None]

HEADS, HEAD_DIM = 2, 16
CHANNELS = 4
TEXT_DIM = 8
GRID, OTHER_GRID = (3, 4, 6), (4, 6, 4)
# As many tokens as GRID has.
TURNED_GRID = (3, 6, 4)

KINDS = ("temporal", "spatial", "spatiotemporal")
# Block shapes of the three kinds. They do not divide all grids.
BLOCKS = (1, (2, 3), (2, 2, 3))
SPARSE = VMoBAConfig(*BLOCKS, TopK(2))


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        class_name: of the transformer, in diffusers.
        config: the transformer's arguments for a number of layers.
        draw: forward's arguments for a grid, a batch size, a dtype and a generator.
        blocks: the lists of blocks in layer order, as attributes of the transformer.
        attention: the self-attention's attribute in a block.
        block_classes: the class names of the blocks, for ``compile_repeated_blocks``.
        text: where text lies among the tokens that attend each other: ``"prefix"``, ``"suffix"`` or None for nowhere.
        by_sdpa: whether the stock processor calls ``scaled_dot_product_attention`` itself, heads first.
    """

    class_name: str
    config: Callable[[int], dict[str, Any]]
    draw: Callable[[Grid, int, torch.dtype, torch.Generator], dict[str, Any]]
    blocks: tuple[str, ...]
    attention: str
    block_classes: tuple[str, ...]
    text: str | None = None
    by_sdpa: bool = False

    def build(self, seed: int = 0, num_layers: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A random model on the CPU, in eval mode."""
        model = getattr(diffusers, self.class_name)(**self.config(num_layers))
        draw_parameters(model, torch.Generator().manual_seed(seed))
        return model.to(dtype).eval()

    def inputs(
        self, grid: Grid = GRID, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Arguments of forward for a latent video of ``grid`` tokens after patching."""
        return self.draw(grid, batch, dtype, torch.Generator().manual_seed(seed)) | {"return_dict": False}

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The blocks in layer order."""
        return [block for name in self.blocks for block in getattr(model, name)]

    def attentions(self, model: nn.Module) -> list[Any]:
        """The self-attention modules in layer order."""
        return [getattr(block, self.attention) for block in self.layers(model)]


def layers_of(grid: Grid, rule: Rule | dict[str, Rule], *, dense_layers: int = 0) -> Choose:
    """What the layers attend on ``grid`` with ``BLOCKS``: one kind after another, the first layers all."""
    partitions = [getattr(BlockPartition, kind)(grid, block) for kind, block in zip(KINDS, BLOCKS, strict=True)]
    rules = [rule[kind] if isinstance(rule, dict) else rule for kind in KINDS]
    return lambda i: None if i < dense_layers else (partitions[i % 3], rules[i % 3])


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's output, which is the video's."""
    return model(**inputs)[0]


@contextlib.contextmanager
def reference(model: nn.Module, family: Family, choose: Choose) -> Iterator[dict[int, list[float]]]:
    """Makes a stock model compute VMoBA by dense masked attention in float64, gradients included.

    Padded text is attended by nobody. Cross-attention and token refiners stay as they are.

    Args:
        model: a stock model, not compiled.
        family: its family.
        choose: what each layer attends.

    Yields:
        The densities of each layer's selections, one for each call of the stock processor's attention.
    """
    inside: list[int] = []
    densities: dict[int, list[float]] = {}
    module: Any = attention_processor if family.by_sdpa else importlib.import_module(type(model).__module__)
    stock = F.scaled_dot_product_attention if family.by_sdpa else module.dispatch_attention_fn

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        chosen = choose(inside[-1]) if inside else None
        if chosen is None:
            return stock(query, key, value, attn_mask=attn_mask, **options)
        turn = (lambda x: x) if family.by_sdpa else (lambda x: x.transpose(1, 2))
        query, key, value = turn(query), turn(key), turn(value)
        partition, rule = chosen
        text = query.shape[2] - partition.num_video_tokens
        partition = dataclasses.replace(partition, **({family.text: text} if family.text else {}))
        assert partition.num_tokens == query.shape[2]
        mask, density = vmoba_mask_of(query, key, partition, rule)
        densities.setdefault(inside[-1], []).append(density)
        if attn_mask is not None:
            # Only keys count: a stock mask may also silence padded queries, which would leave softmax nothing.
            mask = mask & attn_mask.any(-2, keepdim=True)
        return turn(oracle.attention(query, key, value, mask)[0].to(query.dtype))

    hooks = []
    for i, attention in enumerate(family.attentions(model)):
        hooks.append(attention.register_forward_pre_hook(functools.partial(_enter, inside, i)))
        hooks.append(attention.register_forward_hook(functools.partial(_leave, inside), always_call=True))
    if family.by_sdpa:
        namespace = types.SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": attend})
        patch = mock.patch.object(module, "F", namespace)
    else:
        patch = mock.patch.object(module, "dispatch_attention_fn", attend)
    try:
        with patch:
            yield densities
    finally:
        for hook in hooks:
            hook.remove()


def sparse_output(family: Family, inputs: dict[str, Any], grid: Grid = GRID) -> Tensor:
    """What a new model gives with ``SPARSE``, by the reference."""
    model = family.build()
    with torch.no_grad(), reference(model, family, layers_of(grid, SPARSE.rule)):
        return run(model, inputs)


def dense_output(family: Family, inputs: dict[str, Any]) -> Tensor:
    """What a new stock model gives."""
    with torch.no_grad():
        return run(family.build(), inputs)


def gradients(output: Tensor, model: nn.Module) -> list[Tensor]:
    """Of the output's product with noise, in all parameters."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    return list(torch.autograd.grad(output, parameters, upstream, allow_unused=True, materialize_grads=True))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Holds outputs, which are about 1, to the tolerance that float32 models are promised."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_gradients_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Holds each gradient to the largest entry of the expected one."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=2e-5 * max(1.0, e.abs().max().item()))


def compile_blocks(model: Any, family: Family, backend: str = "eager") -> CompileCounterWithBackend:
    """Compiles each block by ``compile_repeated_blocks``; the counter's ``frame_count`` is the graphs made so far."""
    counter = CompileCounterWithBackend(backend)
    # diffusers names no blocks for some families, and for others also modules without attention.
    model._repeated_blocks = list(family.block_classes)
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=counter)
    return counter


def _enter(inside: list[int], layer: int, *_: Any) -> None:
    inside.append(layer)


def _leave(inside: list[int], *_: Any) -> None:
    inside.pop()


@torch.no_grad()
def vmoba_mask_of(query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule) -> tuple[Tensor, float]:
    """The reference's mask ``(B, H, S, S)`` of a layer, and the density of its selection."""
    ids = oracle.block_ids(partition.grid, partition.block)
    video = slice(partition.prefix, partition.prefix + len(ids))
    selection = oracle.select(reference_gates.gate(query[:, :, video], key[:, :, video], ids), ids, rule)
    return oracle.attention_mask(selection, partition), selection.double().mean().item()


@torch.no_grad()
def draw_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Random parameters with which no gate is shut."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("scale_shift_table"):
            parameter.copy_(noise)
        elif name == "pos_frequencies":
            parameter.copy_(0.02 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _timesteps(batch: int) -> Tensor:
    return torch.tensor([700, 350, 100])[:batch]


def _text_mask(batch: int, tokens: int, lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(tokens) < torch.tensor(lengths[:batch])[:, None]


def _wan_config(num_layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": num_layers,
        "rope_max_seq_len": 16,
    }


def _wan_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": _normal(generator, batch, CHANNELS, frames, 2 * height, 2 * width, dtype=dtype),
        "timestep": _timesteps(batch),
        "encoder_hidden_states": _normal(generator, batch, 5, TEXT_DIM, dtype=dtype),
    }


def _wan_ti2v_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """A timestep for each token, 0 in the first frame, which is given."""
    inputs = _wan_inputs(grid, batch, dtype, generator)
    frames, height, width = grid
    later = (torch.arange(frames) > 0).repeat_interleave(height * width)
    return inputs | {"timestep": inputs["timestep"][:, None] * later}


def _wan_i2v_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """512 text tokens, from which the stock processor tells the image's."""
    return _wan_inputs(grid, batch, dtype, generator) | {
        "encoder_hidden_states": _normal(generator, batch, 512, TEXT_DIM, dtype=dtype),
        "encoder_hidden_states_image": _normal(generator, batch, 3, 8, dtype=dtype),
    }


def _skyreels_forcing_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """A timestep for each frame."""
    inputs = _wan_inputs(grid, batch, dtype, generator)
    timestep = inputs["timestep"][:, None] + 10 * torch.arange(grid[0])
    return inputs | {"timestep": timestep, "enable_diffusion_forcing": True}


def _hunyuan_config(num_layers: int) -> dict[str, Any]:
    single = num_layers // 3
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": num_layers - single,
        "num_single_layers": single,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }


def _hunyuan_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": _normal(generator, batch, CHANNELS, frames, 2 * height, 2 * width, dtype=dtype),
        "timestep": _timesteps(batch),
        "encoder_hidden_states": _normal(generator, batch, 7, TEXT_DIM, dtype=dtype),
        "encoder_attention_mask": _text_mask(batch, 7, (4, 7, 2)).long(),
        "pooled_projections": _normal(generator, batch, 8, dtype=dtype),
        "guidance": torch.full((batch,), 6000.0, dtype=dtype),
    }


def _hunyuan15_config(num_layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": num_layers,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": 8,
        "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }


def _hunyuan15_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Text from two encoders, and no image: three padded tokens."""
    return {
        "hidden_states": _normal(generator, batch, CHANNELS, *grid, dtype=dtype),
        "timestep": _timesteps(batch).to(dtype),
        "encoder_hidden_states": _normal(generator, batch, 6, TEXT_DIM, dtype=dtype),
        "encoder_attention_mask": _text_mask(batch, 6, (3, 6, 1)).long(),
        "encoder_hidden_states_2": _normal(generator, batch, 4, 8, dtype=dtype),
        "encoder_attention_mask_2": _text_mask(batch, 4, (4, 2, 3)).long(),
        "image_embeds": torch.zeros(batch, 3, 8, dtype=dtype),
    }


def _hunyuan15_i2v_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """With an image, whose tokens all exist."""
    inputs = _hunyuan15_inputs(grid, batch, dtype, generator)
    return inputs | {"image_embeds": _normal(generator, batch, 3, 8, dtype=dtype)}


def _cogvideox_config(num_layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT_DIM,
        "num_layers": num_layers,
        "max_text_seq_length": 5,
        "use_rotary_positional_embeddings": True,
    }


def _cogvideox_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    frames, height, width = grid
    angles = torch.randn(frames * height * width, HEAD_DIM // 2, generator=generator).repeat_interleave(2, dim=1)
    return {
        "hidden_states": _normal(generator, batch, frames, CHANNELS, 2 * height, 2 * width, dtype=dtype),
        "timestep": _timesteps(batch),
        "encoder_hidden_states": _normal(generator, batch, 5, TEXT_DIM, dtype=dtype),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _cogvideox15_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Patches of two frames."""
    inputs = _cogvideox_inputs(grid, batch, dtype, generator)
    return inputs | {"hidden_states": torch.cat([inputs["hidden_states"]] * 2, 1)}


def _ltx_config(num_layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "caption_channels": TEXT_DIM,
        "num_layers": num_layers,
    }


def _ltx_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": _normal(generator, batch, frames * height * width, CHANNELS, dtype=dtype),
        "timestep": _timesteps(batch),
        "encoder_hidden_states": _normal(generator, batch, 7, TEXT_DIM, dtype=dtype),
        "encoder_attention_mask": _text_mask(batch, 7, (4, 7, 2)).long(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _mochi_config(num_layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "num_layers": num_layers,
        "pooled_projection_dim": 16,
        "text_embed_dim": TEXT_DIM,
        "time_embed_dim": 16,
        "max_sequence_length": 7,
    }


def _mochi_inputs(grid: Grid, batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": _normal(generator, batch, CHANNELS, frames, 2 * height, 2 * width, dtype=dtype),
        "timestep": _timesteps(batch),
        "encoder_hidden_states": _normal(generator, batch, 7, TEXT_DIM, dtype=dtype),
        "encoder_attention_mask": _text_mask(batch, 7, (4, 7, 2)),
    }


FAMILIES = {
    "wan2.1": Family("WanTransformer3DModel", _wan_config, _wan_inputs, ("blocks",), "attn1", ("WanTransformerBlock",)),
    "wan2.2": Family(
        "WanTransformer3DModel", _wan_config, _wan_ti2v_inputs, ("blocks",), "attn1", ("WanTransformerBlock",)
    ),
    "hunyuan": Family(
        "HunyuanVideoTransformer3DModel",
        _hunyuan_config,
        _hunyuan_inputs,
        ("transformer_blocks", "single_transformer_blocks"),
        "attn",
        ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
        text="suffix",
    ),
    "hunyuan1.5": Family(
        "HunyuanVideo15Transformer3DModel",
        _hunyuan15_config,
        _hunyuan15_inputs,
        ("transformer_blocks",),
        "attn",
        ("HunyuanVideo15TransformerBlock",),
        text="suffix",
    ),
    "cogvideox": Family(
        "CogVideoXTransformer3DModel",
        _cogvideox_config,
        _cogvideox_inputs,
        ("transformer_blocks",),
        "attn1",
        ("CogVideoXBlock",),
        text="prefix",
        by_sdpa=True,
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel",
        _ltx_config,
        _ltx_inputs,
        ("transformer_blocks",),
        "attn1",
        ("LTXVideoTransformerBlock",),
    ),
    "mochi": Family(
        "MochiTransformer3DModel",
        _mochi_config,
        _mochi_inputs,
        ("transformer_blocks",),
        "attn1",
        ("MochiTransformerBlock",),
        text="suffix",
        by_sdpa=True,
    ),
    "skyreels": Family(
        "SkyReelsV2Transformer3DModel", _wan_config, _wan_inputs, ("blocks",), "attn1", ("SkyReelsV2TransformerBlock",)
    ),
}

# Other modes of the same classes, with a state of their own that attention must not disturb.
VARIANTS = {
    "wan2.1, image to video": dataclasses.replace(
        FAMILIES["wan2.1"],
        config=lambda num_layers: _wan_config(num_layers) | {"image_dim": 8, "added_kv_proj_dim": HEADS * HEAD_DIM},
        draw=_wan_i2v_inputs,
    ),
    "hunyuan, token replace": dataclasses.replace(
        FAMILIES["hunyuan"],
        config=lambda num_layers: _hunyuan_config(num_layers) | {"image_condition_type": "token_replace"},
        block_classes=(
            "HunyuanVideoTokenReplaceTransformerBlock",
            "HunyuanVideoTokenReplaceSingleTransformerBlock",
        ),
    ),
    "hunyuan1.5, image to video": dataclasses.replace(FAMILIES["hunyuan1.5"], draw=_hunyuan15_i2v_inputs),
    "cogvideox1.5": dataclasses.replace(
        FAMILIES["cogvideox"],
        config=lambda num_layers: _cogvideox_config(num_layers) | {"patch_size_t": 2, "patch_bias": False},
        draw=_cogvideox15_inputs,
    ),
    "skyreels, diffusion forcing": dataclasses.replace(FAMILIES["skyreels"], draw=_skyreels_forcing_inputs),
}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
