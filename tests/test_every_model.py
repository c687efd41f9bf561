"""Each class of diffusers with an adapter: full density is the stock model, and a sparse rule the reference's mask."""

# pyright: reportPrivateImportUsage=false
import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("diffusers")

from tests.more_models import MODELS, Model
from tests.video_models import FAMILIES, assert_close, assert_gradients_close, vmoba_mask_of
from vmoba_flex import BlockPartition, TopK
from vmoba_flex import reference as oracle
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba
from vmoba_flex.models.table import ADAPTERS, REFUSED

KINDS = ("temporal", "spatial", "spatiotemporal")
each_model = pytest.mark.parametrize("model_of", MODELS.values(), ids=MODELS)


def config_of(model_of: Model, rule: TopK, **fields: Any) -> VMoBAConfig:
    """Blocks that do not divide the grid; an image has no temporal ones."""
    cycle = ("spatial",) if model_of.grid[0] == 1 else KINDS
    return VMoBAConfig(1, (2, 3), (1, 3, 3), rule, cycle=cycle, **fields)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """All tensors that a model returns: of video, and of sound where it has any."""
    found: list[Tensor] = []
    waiting: list[Any] = list(model(**inputs)[:2])
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, list):
            waiting += one
        elif one is not None:
            found.append(one)
    return found


def gradients(found: list[Tensor], model: nn.Module) -> list[Tensor]:
    """Of the outputs' sum of squares, in all parameters."""
    total = torch.stack([x.square().sum() for x in found]).sum()
    return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True))


@contextlib.contextmanager
def reference(model_of: Model, model: nn.Module, config: VMoBAConfig | None) -> Iterator[list[Tensor]]:
    """Makes a stock model attend by dense masks, in float64; yields the values of the layers, ``(B, H, S, D)``."""
    inside: list[int] = []
    values: list[Tensor] = []
    attentions = model_of.attentions(model)
    module: Any = sys.modules[type(attentions[0].processor).__module__]
    stock = F.scaled_dot_product_attention if model_of.by_sdpa else module.dispatch_attention_fn
    turn = (lambda x: x) if model_of.by_sdpa else (lambda x: x.transpose(1, 2))

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if not inside or options.get("is_causal"):
            return stock(query, key, value, attn_mask=attn_mask, **options)
        values.append(turn(value))
        if config is None:
            return stock(query, key, value, attn_mask=attn_mask, **options)
        query, key, value = turn(query), turn(key), turn(value)
        queries, tokens = query.shape[2], key.shape[2]
        query = F.pad(query, (0, 0, tokens - queries, 0))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        plan = config.layer(inside[-1], len(attentions), step=0, num_steps=1)
        grid = model_of.grid
        suffix = tokens - model_of.prefix - grid[0] * grid[1] * grid[2]
        block = config.partition(plan.kind, grid).block
        partition = BlockPartition(grid, block, prefix=model_of.prefix, suffix=suffix)
        mask, _ = vmoba_mask_of(query, key, partition, plan.rule)
        mask = mask if attn_mask is None else mask & attn_mask.any(-2, keepdim=True)
        output = oracle.attention(query, key, value, mask)[0].to(query.dtype)
        return turn(output[:, :, tokens - queries :])

    hooks = []
    for i, attention in enumerate(attentions):
        hooks.append(attention.register_forward_pre_hook(lambda *_, i=i: inside.append(i)))
        hooks.append(attention.register_forward_hook(lambda *_: inside.clear(), always_call=True))
    name, patched = "dispatch_attention_fn", attend
    if model_of.by_sdpa:
        name, patched = "F", types.SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": attend})
    else:
        functools.update_wrapper(attend, stock)
    with mock.patch.object(module, name, patched):
        yield values
    for hook in hooks:
        hook.remove()


def test_the_table_is_covered():
    """By these models or by a family."""
    tested = {model_of.class_name for model_of in MODELS.values()} | {each.class_name for each in FAMILIES.values()}
    assert tested == ADAPTERS.keys()


@each_model
@torch.no_grad()
def test_a_token_of_the_grid_is_where_the_adapter_says(model_of: Model):
    """Among the values of the first layer, in raster order. At full density a wrong place would not show."""
    if model_of.layout is None:
        pytest.skip("tokens attend each other before the first layer, or come in lists")
    model, inputs = model_of.build(), model_of.inputs()
    with reference(model_of, model, None) as values:
        outputs(model, inputs)
        tokens = values[0].shape[2]
        assert tokens == model_of.prefix + torch.Size(model_of.grid).numel() + model_of.suffix
        for place in ((0, 0, 1), (model_of.grid[0] - 1, 2, 3)):
            moved, token = model_of.moved(inputs, place)
            start = len(values)
            outputs(model, moved)
            changed = (values[start] - values[0]).abs().amax((0, 1, 3)) > 1e-6
            assert changed.nonzero().flatten().tolist() == [token]


@each_model
@torch.no_grad()
def test_full_density_is_the_stock_model_and_remove_restores_it(model_of: Model):
    model, inputs = model_of.build(), model_of.inputs()
    stock, processors = outputs(model, inputs), [layer.processor for layer in model_of.attentions(model)]
    # Small random models may be ill-conditioned: what one rounding of the inputs moves is not held against us.
    rounded = {
        name: x * (1 + 2**-22) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }
    budgets = [1e-5 + (moved - exact).abs().max() for moved, exact in zip(outputs(model, rounded), stock, strict=True)]
    for dispatch in ("tiles", "packed"):
        with apply_vmoba(model, config_of(model_of, TopK(density=1.0), dispatch=dispatch)) as handle:
            for actual, expected, budget in zip(outputs(model, inputs), stock, budgets, strict=True):
                assert ((actual - expected).abs() <= budget + 1e-5 * expected.abs()).all()
            assert handle.summary().count("sparse") == len(model_of.layers)
    assert [layer.processor for layer in model_of.attentions(model)] == processors
    assert all(torch.equal(*pair) for pair in zip(outputs(model, inputs), stock, strict=True))


@each_model
def test_a_sparse_rule_is_the_reference_and_has_its_gradients(model_of: Model):
    model, inputs = model_of.build(), model_of.inputs()
    config = config_of(model_of, TopK(1))
    stock = outputs(model, inputs)
    with reference(model_of, model, config) as values:
        expected = outputs(model, inputs)
    assert len(values) >= len(model_of.layers) - 1
    expected_gradients = gradients(expected, model)
    apply_vmoba(model, config)
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()  # pyright: ignore
    found = outputs(model, inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)
    assert_gradients_close(gradients(found, model), expected_gradients)
    assert (found[0] - stock[0]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_cannot_take_it_says_why(name: str):
    model = type(name, (nn.Module,), {})()
    with pytest.raises(TypeError, match=f"must not be a {name}: .*(linear|mask of its own|separate layers)"):
        apply_vmoba(model, config_of(MODELS["vace"], TopK(1)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["minimax-h3", "framepack", "cosmos-3", "qwen-image"])
def test_compiled_whole_is_eager_in_dense_and_sparse_steps(name: str):
    """Prefix, suffix, both, fewer queries than keys, and gaps in the text's mask; in one graph."""
    model_of = MODELS[name]
    model, inputs = model_of.build(), model_of.inputs()
    handle = apply_vmoba(model, config_of(model_of, TopK(1)))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for enabled in (True, False):
        handle.set_enabled(enabled)
        for actual, expected in zip(outputs(compiled, inputs), outputs(model, inputs), strict=True):
            assert_close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("rest", ["prefix", "suffix"])
def test_conditioning_tokens_around_a_grid_set_by_hand(rest: Any):
    """As LTX's condition pipeline adds them, which gives coordinates in place of a grid."""
    family = FAMILIES["ltx"]
    model, inputs, z = family.build(), family.inputs(), torch.Generator().manual_seed(1)
    for name in ("num_frames", "height", "width"):
        inputs.pop(name)
    grid = torch.Size((3, 4, 6))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], torch.randn(2, 8, 4, generator=z)], 1)
    inputs["video_coords"] = torch.rand(2, 3, grid.numel() + 8, generator=z)
    model_of = Model(
        family.class_name, {}, lambda z: {}, tuple(f"transformer_blocks.{i}.attn1" for i in range(3)), tuple(grid),
        prefix=8 if rest == "prefix" else 0,
    )  # fmt: skip
    config = config_of(model_of, TopK(1))
    with reference(model_of, model, config):
        expected = outputs(model, inputs)
    handle = apply_vmoba(model, config)
    handle.set_grid((3, 4, 6), rest=rest)
    assert_close(outputs(model, inputs)[0], expected[0])
    handle.set_grid((4, 6, 6))
    with pytest.raises(ValueError, match=r"no more than the 80 tokens that arrive, got \(4, 6, 6\)"):
        outputs(model, inputs)
    handle.set_grid(None)
    with pytest.raises(ValueError, match="num_frames, height and width must be given"):
        outputs(model, inputs)


MODES: dict[str, tuple[dict[str, Any], str]] = {
    "kandinsky-5": ({"sparse_params": {"to_fractal": True}}, "sparse_params must be None"),
    "flux-2": ({"kv_cache_mode": "extract"}, "kv_cache_mode must be None"),
    "z-image": ({"x": [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 4)]}, "images of one size"),
    "cosmos-3": ({"vision_token_shapes": [(1, 4, 4), (1, 4, 4)]}, "those of one video"),
    "minimax-h3": ({"audio_indices": torch.arange(9, 14)}, "position ids must be those of a grid"),
    "allegro": (
        {"attention_mask": torch.ones(2, 3, 8, 8)},
        "attention_mask must be None with VMoBA applied to Allegro",
    ),
    "ltx-2": ({"video_self_attention_mask": torch.rand(2, 48, 48)}, "attention_mask must be None"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODES)
def test_modes_that_cannot_be_sparse_say_why(name: str):
    arguments, said = MODES[name]
    model, inputs = MODELS[name].build(), MODELS[name].inputs() | arguments
    apply_vmoba(model, config_of(MODELS[name], TopK(1)))
    with pytest.raises(ValueError, match=said):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["minimax-h3", "helios"])
def test_ranks_cannot_share_other_tokens(name: str):
    """There are plans for these models, so only the forward can tell."""
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    handle = apply_vmoba(model, config_of(MODELS[name], TopK(1)))
    for processor in handle.states()["model"].processors:
        processor.ranks = types.SimpleNamespace(size=2)
    with pytest.raises(
        ValueError, match=r"context parallelism must be off .* where other tokens attend with the video"
    ):
        model(**inputs)
