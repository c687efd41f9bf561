"""ComfyUI's nodes and the override of attention, with a stub of ComfyUI's options, samplers and models."""

import dataclasses
import logging
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import hosts
from vmoba_flex import Remember, Selection, Tail, TopK, VMoBAConfig, vmoba_attention, vmoba_selection
from vmoba_flex.hosts import comfyui

GRID = (2, 4, 4)
CONFIG = VMoBAConfig(1, (2, 2), (1, 2, 2), TopK(density=0.5))
FULL = dataclasses.replace(CONFIG, rule=TopK(density=1.0))
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])


class Model:
    """ComfyUI's ModelPatcher, as far as a node sees it."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.model_options = {"transformer_options": dict(options or {})}
        self.callbacks: dict[str, dict[str, list[Callable[..., None]]]] = {}

    def clone(self) -> "Model":
        copied = Model(self.model_options["transformer_options"])
        copied.callbacks = {kind: dict(of) for kind, of in self.callbacks.items()}
        return copied

    def add_callback_with_key(self, kind: str, key: str, callback: Callable[..., None]) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def call_back(self, kind: str, *args: Any) -> None:
        for callbacks in self.callbacks.get(kind, {}).values():
            for callback in callbacks:
                callback(self, *args)

    def attend(self, *qkv: Tensor, **keywords: Any) -> Tensor:
        """One call of attention in a forward of the model."""
        own = keywords.pop("transformer_options", {})
        return attention(*qkv, transformer_options=self.model_options["transformer_options"] | own, **keywords)


def attention(*args: Any, **keywords: Any) -> Tensor:
    """ComfyUI's attention, which an override in the options takes the place of."""
    options = keywords["transformer_options"]
    override = options.get("optimized_attention_override")
    if override is None or "_inside_attn_wrapper" in keywords:
        return plain(*args, **keywords)
    return override(attention, *args, _inside_attn_wrapper=True, **keywords)


def plain(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: Any = None,
    skip_reshape: bool = False, skip_output_reshape: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """What ComfyUI attends by default."""
    query, key, value = (x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    output = hosts.full_attention(query, key, value, mask)
    return output.transpose(1, 2) if skip_output_reshape else output.flatten(2)


def wan(i: int = 1, step: float = 2, uuid: str = "prompt", **more: Any) -> dict[str, Any]:
    """Options in a block of a Wan model, between steps too."""
    low, high = SIGMAS[math.ceil(step)], SIGMAS[math.floor(step)]
    sigmas = (high + (low - high) * (step % 1)).expand(2)
    where = {"grid_sizes": torch.Size(GRID), "block_index": i, "total_blocks": 4}
    return where | {"sigmas": sigmas, "sample_sigmas": SIGMAS, "uuids": [uuid]} | more


def tensors(tokens: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``(B, H, S, D)``."""
    q, k, v = torch.randn(3, 2, 2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    return q, k, v


def expected(config: VMoBAConfig, i: int, qkv: tuple[Tensor, ...], prefix: int = 0, suffix: int = 0) -> Tensor:
    plan = config.layer(i, 4, 2, 4)
    return vmoba_attention(*qkv, config.partition(plan.kind, GRID, prefix, suffix), plan.rule, tail=plan.tail)


def is_dense(model: Model, qkv: tuple[Tensor, ...], options: dict[str, Any]) -> bool:
    output = model.attend(*qkv, heads=2, skip_reshape=True, skip_output_reshape=True, transformer_options=options)
    full = hosts.full_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    return torch.allclose(output, full, atol=1e-5)


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("config", [CONFIG, FULL, dataclasses.replace(CONFIG, tail=Tail(2))])
def test_blocks_of_a_grid_in_each_layout(config: VMoBAConfig, skip_reshape: bool, skip_output_reshape: bool):
    model, qkv = Model(), tensors()
    patched = comfyui.patch_model(model, config)
    passed = qkv if skip_reshape else tuple(x.transpose(1, 2).flatten(2) for x in qkv)
    flags = {"heads": 2, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    for i in range(4):
        wanted = expected(config, i, qkv)
        wanted = wanted if skip_output_reshape else wanted.transpose(1, 2).flatten(2)
        output = patched.attend(*passed, transformer_options=wan(i), **flags)
        torch.testing.assert_close(output, wanted)
        full = model.attend(*passed, transformer_options=wan(i), **flags)
        assert torch.allclose(output, full, atol=1e-5) == (config is FULL)
        assert torch.equal(full, plain(*passed, **flags))  # the model that was patched stays as it is


def test_of_packed_tokens_the_video_has_blocks(caplog: pytest.LogCaptureFixture):
    segments = [(0, 3, "text"), (3, 7, "ref_img"), (7, 9, "audio"), (9, 41, "video"), (41, 44, "other")]
    layout = types.SimpleNamespace(segments=segments, signature=(3, 2, 8, 8, 1), seq_len=44)
    options = {name: value for name, value in wan(3).items() if name not in ("grid_sizes", "total_blocks")}
    options["minimax_h3_layout"] = layout
    model, qkv = comfyui.patch_model(Model(), CONFIG), tensors(44)
    output = model.attend(*qkv, heads=2, skip_reshape=True, skip_output_reshape=True, transformer_options=options)
    torch.testing.assert_close(output, expected(CONFIG, 3, qkv, 9, 3))
    assert not is_dense(model, qkv, options)
    assert is_dense(model, tensors(3), options)  # the text on its own
    assert not caplog.text
    layout.segments = [(0, 44, "text")]
    assert is_dense(model, qkv, options)
    assert "publishes no grid" in caplog.text


def test_scale_reaches_the_call():
    qkv, i = tensors(), 2
    model = comfyui.patch_model(Model(), CONFIG)
    flags = {"heads": 2, "skip_reshape": True, "skip_output_reshape": True, "scale": 0.1}
    plan = CONFIG.layer(i, 4)
    wanted = vmoba_attention(*qkv, CONFIG.partition(plan.kind, GRID), plan.rule, scale=0.1)
    torch.testing.assert_close(model.attend(*qkv, transformer_options=wan(i), **flags), wanted)


def test_what_is_no_video_is_comfyuis(caplog: pytest.LogCaptureFixture):
    needs_step = comfyui.patch_model(Model(), dataclasses.replace(CONFIG, dense_steps=1))
    model, qkv = comfyui.patch_model(Model(), CONFIG), tensors()
    flags = {"heads": 2, "skip_reshape": True, "skip_output_reshape": True}
    mask = torch.rand(2, 1, 32, 32) < 0.8

    def without(*names: str) -> dict[str, Any]:
        return {name: value for name, value in wan().items() if name not in names}

    for one, options, more, reason in [
        (model, wan(), {"mask": mask}, "a mask or another precision"),
        (model, wan(), {"attn_precision": torch.float64}, "a mask or another precision"),
        (model, without("grid_sizes"), {}, "publishes no grid"),
        (model, without("block_index"), {}, "publishes no grid"),
        (model, wan(grid_sizes=(3, 4, 4)), {}, "32 tokens stay dense: the model publishes a grid for 48"),
        (needs_step, without("sigmas"), {}, "tells no falling sigmas"),
        (needs_step, without("sample_sigmas"), {}, "tells no falling sigmas"),
        (needs_step, wan(sample_sigmas=SIGMAS.flip(0)), {}, "tells no falling sigmas"),
    ]:
        output = one.attend(*qkv, transformer_options=options, **flags, **more)
        torch.testing.assert_close(output, plain(*qkv, **flags, **more))
        assert reason in caplog.text
    assert not is_dense(model, qkv, without("sigmas"))  # it needs no step
    caplog.clear()
    q, k, v = qkv
    cross = model.attend(q, k[:, :, :5], v[:, :, :5], transformer_options=wan(), **flags)
    assert torch.equal(cross, plain(q, k[:, :, :5], v[:, :, :5], **flags))
    model.attend(*qkv, transformer_options=without("grid_sizes"), **flags)
    assert not caplog.text  # each reason is logged once, cross-attention never
    with pytest.raises(ValueError, match="temporal block must not be larger than grid"):
        comfyui.patch_model(Model(), dataclasses.replace(CONFIG, temporal=3)).attend(
            *qkv, transformer_options=wan(0), **flags
        )


def test_steps_are_those_of_the_sampler():
    qkv = tensors()
    for dense_steps, expected_dense in [(1, "0"), (0.5, "01"), ((0.25, 1), "03"), ((0, 2), "23")]:
        model = comfyui.patch_model(Model(), dataclasses.replace(CONFIG, dense_steps=dense_steps))
        dense = [step for step in range(4) if is_dense(model, qkv, wan(step=step))]
        assert "".join(map(str, dense)) == expected_dense
    model = comfyui.patch_model(Model(), dataclasses.replace(CONFIG, dense_steps=2))
    looks = (0, 0.5, 1, 1.3, 1.999, 2, 2.5, 3.7)  # a sampler may look between two steps
    assert [is_dense(model, qkv, wan(step=step)) for step in looks] == [step < 2 for step in looks]
    layers = comfyui.patch_model(Model(), dataclasses.replace(CONFIG, dense_layers=[0, -1]))
    assert [is_dense(layers, qkv, wan(i)) for i in range(4)] == [True, False, False, True]


def chosen(config: VMoBAConfig, i: int, qkv: tuple[Tensor, ...]) -> Selection:
    """What a dense step finds."""
    plan = config.layer(i, 4, 2, 4)
    rule = dataclasses.replace(plan.rule, gate="exact")
    return vmoba_selection(*qkv[:2], config.partition(plan.kind, GRID), rule, as_bits=True)


def test_sparse_steps_take_over_what_dense_ones_find(caplog: pytest.LogCaptureFixture):
    """For each prompt, and for two calls of a block, as blocks of VACE share the index of another."""
    caplog.set_level(logging.WARNING)
    config = dataclasses.replace(CONFIG, rule=TopK(2), dense_steps=1, remember=Remember())
    model = comfyui.patch_model(Model(), config)
    flags = {"heads": 2, "skip_reshape": True, "skip_output_reshape": True}
    calls = [(i, uuid, call) for uuid in ("yes", "no") for i in (0, 1) for call in (0, 1)]
    first = {one: tensors(seed=seed) for seed, one in enumerate(calls)}
    for i, uuid, call in calls:
        assert is_dense(model, first[i, uuid, call], wan(i, 0, uuid))
    later = tensors(seed=20)
    for step in (1, 2):
        for i, uuid, call in calls:
            kept = chosen(config, i, first[i, uuid, call])
            partition = config.partition(config.layer(i, 4, step, 4).kind, GRID)
            output = model.attend(*later, transformer_options=wan(i, step, uuid), **flags)
            torch.testing.assert_close(output, vmoba_attention(*later, partition, None, selection=kept))
    assert not caplog.text
    model.call_back("on_cleanup")  # the run ends: the next one has nothing to take over
    output = model.attend(*later, transformer_options=wan(1, 2, "yes"), **flags)
    torch.testing.assert_close(output, expected(config, 1, later))
    assert "remember: nothing is kept for step 2 of 4" in caplog.text


def test_a_sparse_step_that_chooses_anew_attends_its_choice():
    config = dataclasses.replace(CONFIG, rule=TopK(2), remember=Remember(refresh=2))
    model, qkv = comfyui.patch_model(Model(), config), tensors()
    flags = {"heads": 2, "skip_reshape": True, "skip_output_reshape": True}
    partition = config.partition("spatial", GRID)
    wanted = vmoba_attention(*qkv, partition, None, selection=chosen(config, 1, qkv))
    torch.testing.assert_close(model.attend(*qkv, transformer_options=wan(1, 0), **flags), wanted)


def test_other_overrides_run_what_stays_dense():
    calls: list[str] = []

    def override(name: str) -> Any:
        def run(func: Any, *args: Any, **keywords: Any) -> Tensor:
            calls.append(name)
            return func(*args, **keywords)

        return run

    qkv = tensors()
    config = dataclasses.replace(CONFIG, dense_layers=1)
    patched = comfyui.patch_model(Model({"optimized_attention_override": override("before")}), config)
    assert is_dense(patched, qkv, wan(0))
    assert not is_dense(patched, qkv, wan(1))
    assert calls == ["before"]
    options = patched.model_options["transformer_options"]
    options["optimized_attention_override"] = override("after")  # a later node took the slot
    for arguments in [
        (None, patched.model_options),
        (None, patched.model_options),
        (None,),
    ]:  # older versions pass no options
        patched.call_back("on_prepare_state", *arguments)
        assert is_dense(patched, qkv, wan(0))
        assert not is_dense(patched, qkv, wan(1))
    assert calls == ["before", "after", "after", "after"]


def test_a_later_node_that_hands_calls_on_counts_none_twice():
    """Else the second call of a block would take what the first one keeps."""
    config = dataclasses.replace(CONFIG, rule=TopK(2), dense_steps=1, remember=Remember())
    model = comfyui.patch_model(Model(), config)
    options = model.model_options["transformer_options"]
    ours = options["optimized_attention_override"]
    options["optimized_attention_override"] = lambda func, *args, **keywords: ours(func, *args, **keywords)
    model.call_back("on_prepare_state", None, model.model_options)
    flags = {"heads": 2, "skip_reshape": True, "skip_output_reshape": True}
    first, later = [tensors(seed=seed) for seed in (0, 1)], tensors(seed=2)
    assert all(is_dense(model, qkv, wan(1, 0)) for qkv in first)
    partition = config.partition("spatial", GRID)
    for qkv in first:
        wanted = vmoba_attention(*later, partition, None, selection=chosen(config, 1, qkv))
        torch.testing.assert_close(model.attend(*later, transformer_options=wan(1, 1), **flags), wanted)


@pytest.mark.parametrize("name", comfyui.NODE_CLASS_MAPPINGS)
def test_nodes_take_what_they_ask_for(name: str, tmp_path: Any):
    node = comfyui.NODE_CLASS_MAPPINGS[name]()
    asked = node.INPUT_TYPES()["required"]
    assert name in comfyui.NODE_DISPLAY_NAME_MAPPINGS and node.RETURN_TYPES == ("MODEL",) and asked.pop("model")
    values = {key: options["default"] for key, (_, options) in asked.items()}
    if "config_file" in values:
        FULL.save(tmp_path / "config.json")
        values["config_file"] = str(tmp_path / "config.json")
    (patched,) = getattr(node, node.FUNCTION)(Model(), **values)
    assert is_dense(patched, tensors(), wan(step=3)) == ("config_file" in values)


def test_values_of_the_node_reach_the_config(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui, "patch_model", lambda model, config: config)
    (config,) = comfyui.VMoBANode().patch(None, density=0.3, dense_steps=0.1, tail=False, remember=False)
    wanted = {"rule": TopK(density=0.3, gate="spread"), "dense_steps": 0.1, "tail": None, "remember": None}
    assert config == dataclasses.replace(VMoBAConfig.fast(), **wanted)
    (config,) = comfyui.VMoBANode().patch(None, density=0.3, dense_steps=0.1, tail=True, remember=True)
    assert (config.tail, config.remember) == (Tail(), Remember(refresh=1000))
    (config,) = comfyui.VMoBANode().patch(None, density=0.3, dense_steps=0.0, tail=True, remember=True)
    assert config.layer(0, 4, 0, 50).records  # the second model of Wan 2.2 may have no dense step of its own


def test_only_a_config_is_one():
    with pytest.raises(TypeError, match="config must be a VMoBAConfig, got float"):
        comfyui.patch_model(Model(), 0.125)
