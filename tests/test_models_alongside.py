"""What else users do with a model stays right with VMoBA, done before or after applying it."""

# pyright: reportPrivateImportUsage=false
import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from diffusers.models import attention_dispatch
from peft import LoraConfig

from tests.video_models import (
    BLOCKS,
    FAMILIES,
    GRID,
    OTHER_GRID,
    SPARSE,
    TURNED_GRID,
    Family,
    assert_close,
    assert_gradients_close,
    dense_output,
    each_family,
    gradients,
    layers_of,
    reference,
    run,
    sparse_output,
)
from vmoba_flex import TopK
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba

ORDERS = ("before", "after")


def add_lora(model: Any) -> None:
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def offload(model: Any, offload_type: str) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type=offload_type, num_blocks_per_group=1)


def cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


CHANGES: dict[str, Callable[[Any], None]] = {
    "LoRA": add_lora,
    "fused projections": lambda model: model.fuse_qkv_projections(),
    "group offload by blocks": functools.partial(offload, offload_type="block_level"),
    "group offload by leaves": functools.partial(offload, offload_type="leaf_level"),
    "layerwise casting": cast,
}


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def both(model: Any, config: VMoBAConfig, change: Callable[[Any], None], order: str) -> Any:
    """Applies the config before or after a change; returns the handle."""
    if order == "before":
        change(model)
    handle = apply_vmoba(model, config)
    if order == "after":
        change(model)
    return handle


@each_family
@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_to_the_model(family: Family, change: str, order: str):
    if change == "fused projections" and family.class_name == "MochiTransformer3DModel":
        pytest.skip("Mochi has no fused projections")
    stock, model, inputs = family.build(), family.build(), family.inputs()
    CHANGES[change](stock)
    with reference(stock, family, layers_of(GRID, TopK(2))):
        expected = run(stock, inputs)
    handle = both(model, SPARSE, CHANGES[change], order)
    assert_close(run(model, inputs), expected)
    handle.remove()
    assert_close(run(model, inputs), run(stock, inputs))


def quantize_by_torch(layer: nn.Module) -> None:
    """To packed weights in 16 bit, which are no parameters: in 8 bit it would round activations, too."""
    quantize_dynamic(layer, {nn.Linear}, dtype=torch.float16, inplace=True)


def quantize_by_torchao(layer: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())


QUANTIZED: dict[str, Callable[[nn.Module], None]] = {"torch": quantize_by_torch, "torchao": quantize_by_torchao}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["wan2.1", "hunyuan"])
@pytest.mark.parametrize("library", QUANTIZED)
def test_quantized_weights(library: str, name: str):
    family = FAMILIES[name]
    inputs = family.inputs()
    stock, model = family.build(), family.build()
    for one in (stock, model):
        for layer in family.layers(one):
            QUANTIZED[library](layer)
        query = family.attentions(one)[0].to_q
        assert type(query) is not nn.Linear or type(query.weight) is not nn.Parameter
    with reference(stock, family, layers_of(GRID, TopK(2))):
        expected = run(stock, inputs)
    handle = apply_vmoba(model, SPARSE)
    assert_close(run(model, inputs), expected)
    handle.remove()
    assert_close(run(model, inputs), run(stock, inputs))


@torch.no_grad()
def test_unfusing_cogvideox():
    """Its methods keep processors and put them back."""
    family = FAMILIES["cogvideox"]
    inputs = family.inputs()
    for fuse_first in (True, False):
        model: Any = family.build()
        handle = both(model, SPARSE, lambda model: model.fuse_qkv_projections(), "before" if fuse_first else "after")
        assert_close(run(model, inputs), sparse_output(family, inputs))
        model.unfuse_qkv_projections()
        assert_close(run(model, inputs), sparse_output(family, inputs))
        handle.remove()
        assert_close(run(model, inputs), dense_output(family, inputs))


@torch.no_grad()
@pytest.mark.parametrize("fuse_first", [True, False])
def test_unfused_cogvideox_goes_by_its_own_projections(fuse_first: bool):
    family = FAMILIES["cogvideox"]
    model: Any = family.build()
    both(model, SPARSE, lambda model: model.fuse_qkv_projections(), "before" if fuse_first else "after")
    run(model, family.inputs())
    model.unfuse_qkv_projections()
    plain = family.build()
    apply_vmoba(plain, SPARSE)
    for one in (model, plain):
        family.attentions(one)[0].to_q.weight.mul_(-1)
    assert_close(run(model, family.inputs()), run(plain, family.inputs()))


@torch.no_grad()
def test_unfusing_cogvideox_once_removed():
    family = FAMILIES["cogvideox"]
    model, inputs = family.build(), family.inputs()
    handle = both(model, SPARSE, lambda model: model.fuse_qkv_projections(), "after")
    run(model, inputs)
    handle.remove()
    model.unfuse_qkv_projections()  # pyright: ignore
    assert_close(run(model, inputs), dense_output(family, inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", ["hunyuan", "hunyuan1.5", "cogvideox"])
def test_skipping_a_layers_attention(name: str):
    """Which diffusers does by the class of the processor; it knows few stock models'."""
    family = FAMILIES[name]
    stock, model, inputs = family.build(), family.build(), family.inputs()
    family.attentions(stock)[1].register_forward_hook(
        lambda module, arguments, options, output: (options["hidden_states"], options["encoder_hidden_states"]),
        with_kwargs=True,
    )
    with reference(stock, family, layers_of(GRID, TopK(2))):
        expected = run(stock, inputs)
    apply_vmoba(model, SPARSE)
    config = diffusers.LayerSkipConfig([1], fqn="transformer_blocks", skip_ff=False)
    diffusers.hooks.apply_layer_skip(model, config)
    assert_close(run(model, inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan2.1", "mochi"])
def test_inference_mode_changes_nothing(name: str):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    handle = apply_vmoba(model, SPARSE)
    for enabled in (True, False, True):
        handle.set_enabled(enabled)
        with torch.inference_mode():
            run(model, inputs)
    with torch.enable_grad():
        run(model, inputs).sum().backward()
    assert handle.summary().count("sparse") == 3


@each_family
@torch.no_grad()
def test_saving_and_loading(family: Family, tmp_path: Path):
    model: Any = family.build()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    apply_vmoba(model, SPARSE)
    run(model, family.inputs())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for state in (model.state_dict(), loaded.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(x, before[name]) for name, x in state.items())
    inputs = family.inputs()
    assert_close(run(loaded, inputs), dense_output(family, inputs))
    apply_vmoba(loaded, SPARSE)
    assert_close(run(loaded, inputs), sparse_output(family, inputs))


@each_family
@torch.no_grad()
@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_are_applied_and_independent(family: Family, duplicate: str):
    model = family.build()
    handle = apply_vmoba(model, SPARSE)
    unused = COPIES[duplicate](model)
    run(model, family.inputs(TURNED_GRID))
    used = COPIES[duplicate](model)
    handle.set_enabled(False)
    cases = {grid: family.inputs(grid) for grid in (GRID, OTHER_GRID)}
    sparse = {grid: sparse_output(family, inputs, grid) for grid, inputs in cases.items()}
    for twin in (unused, used):
        for of_model, of_twin in ((GRID, OTHER_GRID), (OTHER_GRID, GRID)):
            assert_close(run(model, cases[of_model]), dense_output(family, cases[of_model]))
            assert_close(run(twin, cases[of_twin]), sparse[of_twin])
    handle.remove()
    assert_close(run(used, cases[GRID]), sparse[GRID])
    with pytest.raises(ValueError, match="must not have VMoBA applied yet"):
        apply_vmoba(used, SPARSE)


def count_calls(family: Family, model: nn.Module) -> list[int]:
    """A list that grows by the layer at each call of a self-attention."""
    calls: list[int] = []
    for i, attention in enumerate(family.attentions(model)):
        attention.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    return calls


class TestGradientCheckpointing:
    """Layers computed again in backward see what they saw in forward."""

    @each_family
    @pytest.mark.parametrize("order", ORDERS)
    def test_two_forwards_before_one_backward(self, family: Family, order: str):
        plain, model = family.build(), family.build()
        apply_vmoba(plain, SPARSE)
        both(model, SPARSE, lambda model: model.enable_gradient_checkpointing(), order)
        calls = count_calls(family, model)
        # As many tokens, so that a wrong grid would raise no error.
        cases = [family.inputs(GRID), family.inputs(TURNED_GRID, seed=1)]

        def total(model: nn.Module) -> Tensor:
            return torch.stack([run(model, inputs).flatten() for inputs in cases])

        expected = gradients(total(plain), plain)
        actual = gradients(total(model), model)
        assert sorted(calls) == [0] * 4 + [1] * 4 + [2] * 4
        assert_gradients_close(actual, expected)

    @each_family
    def test_switching_between_forward_and_backward(self, family: Family):
        plain, model, inputs = family.build(), family.build(), family.inputs()
        config = VMoBAConfig(*BLOCKS, TopK(2), dense_steps=1)
        apply_vmoba(plain, SPARSE)
        handle = both(model, config, lambda model: model.enable_gradient_checkpointing(), "before")
        handle.set_step(1, 2)
        output = run(model, inputs)
        handle.set_step(0, 2)
        with torch.no_grad():
            assert_close(run(model, inputs), dense_output(family, inputs))
        assert_gradients_close(gradients(output, model), gradients(run(plain, inputs), plain))

    @each_family
    def test_is_left_as_it_was_by_remove(self, family: Family):
        model: Any = family.build()
        model.enable_gradient_checkpointing()
        before = model._gradient_checkpointing_func
        handle = apply_vmoba(model, SPARSE)
        run(model, family.inputs()).sum().backward()
        handle.remove()
        assert model._gradient_checkpointing_func is before
        apply_vmoba(model, SPARSE)
        model.disable_gradient_checkpointing()
        assert_close(run(model, family.inputs()), sparse_output(family, family.inputs()))


CACHES: dict[str, Any] = {
    "pyramid attention broadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "first block cache": lambda: diffusers.FirstBlockCacheConfig(threshold=10.0),
}


@each_family
@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cache", CACHES)
def test_caches(family: Family, cache: str, order: str):
    if cache == "first block cache" and family.class_name in (
        "HunyuanVideo15Transformer3DModel",
        "SkyReelsV2Transformer3DModel",
    ):
        pytest.skip("diffusers has no first-block cache for this family")
    cases = [family.inputs(), family.inputs(seed=1), family.inputs(seed=2)]

    def enable(model: Any) -> None:
        model.enable_cache(CACHES[cache]())

    def outputs(model: Any) -> list[Tensor]:
        with model.cache_context("cond"):
            return [run(model, inputs) for inputs in cases]

    stock, model = family.build(), family.build()
    enable(stock)
    with reference(stock, family, layers_of(GRID, TopK(2))) as densities:
        expected = outputs(stock)
    both(model, SPARSE, enable, order)
    for a, e in zip(outputs(model), expected, strict=True):
        assert_close(a, e)
    # The cache did save calls, or this would test nothing.
    assert (expected[1] - sparse_output(family, cases[1])).abs().mean() > 1e-2
    assert len(densities[2]) < len(cases) * max(1, len(densities[0]) // len(cases)) or cache.startswith("pyramid")


@pytest.fixture
def backends() -> Iterator[None]:
    """``set_attention_backend`` also sets a default for the process."""
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield
    registry.set_active_backend(active)


@each_family
@torch.no_grad()
@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_an_attention_backend(family: Family, backend: str, order: str, monkeypatch: pytest.MonkeyPatch):
    """Sparse layers stay sparse; dense layers honour it, where the stock processor does."""
    inputs = family.inputs()
    stock, model = family.build(), family.build()
    with reference(stock, family, layers_of(GRID, TopK(2), dense_layers=1)):
        expected = run(stock, inputs)
    config = VMoBAConfig(*BLOCKS, TopK(2), dense_layers=1)
    both(model, config, lambda model: model.set_attention_backend(backend), order)
    inside: list[int] = []
    calls: list[int] = []
    for i, attention in enumerate(family.attentions(model)):
        attention.register_forward_pre_hook(lambda *_, i=i: inside.append(i))
        attention.register_forward_hook(lambda *_: inside.clear())
    registry = attention_dispatch._AttentionBackendRegistry
    name = attention_dispatch.AttentionBackendName(backend)
    attend = registry._backends[name]

    @functools.wraps(attend)
    def counting(*arguments: Any, **options: Any) -> Any:
        calls.extend(inside)
        return attend(*arguments, **options)

    monkeypatch.setitem(registry._backends, name, counting)
    assert_close(run(model, inputs), expected)
    assert calls == ([] if family.by_sdpa else [0])


def test_training_with_lora_reaches_only_its_weights():
    family = FAMILIES["wan2.1"]
    model, inputs = family.build(), family.inputs()
    apply_vmoba(model, SPARSE)
    add_lora(model)
    run(model, inputs).square().mean().backward()
    with_gradient = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.abs().max() > 0}
    assert with_gradient and all("lora" in name for name in with_gradient)
