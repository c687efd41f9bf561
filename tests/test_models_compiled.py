"""``compile_repeated_blocks``: one graph for each kind, equal to eager, and none anew between dense and sparse."""

# pyright: reportPrivateImportUsage=false
import dataclasses
import functools
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models import attention_dispatch

from tests.video_models import (
    BLOCKS,
    FAMILIES,
    GRID,
    OTHER_GRID,
    SPARSE,
    Family,
    assert_close,
    assert_gradients_close,
    compile_blocks,
    dense_output,
    each_family,
    gradients,
    run,
    sparse_output,
)
from vmoba_flex import Threshold, TopK, Warmup
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_family
@torch.no_grad()
def test_equals_eager_at_two_resolutions(family: Family):
    model, eager = family.build(), family.build()
    handles = [apply_vmoba(each, VMoBAConfig(*BLOCKS, TopK(2), dense_layers=1)) for each in (model, eager)]
    compile_blocks(model, family)
    for enabled in (True, False):
        for handle in handles:
            handle.set_enabled(enabled)
        for inputs in (family.inputs(GRID), family.inputs(OTHER_GRID), family.inputs(GRID, seed=1)):
            assert_close(run(model, inputs), run(eager, inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan2.1", "hunyuan"])
def test_an_attention_backend_is_honoured_by_dense_steps(name: str, monkeypatch: pytest.MonkeyPatch):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    sparse, dense = sparse_output(family, inputs), dense_output(family, inputs)
    handle = apply_vmoba(model, SPARSE)
    model.set_attention_backend("_native_math")  # pyright: ignore
    compile_blocks(model, family)
    backends = attention_dispatch._AttentionBackendRegistry._backends
    math, calls = attention_dispatch.AttentionBackendName("_native_math"), []
    attend = backends[math]

    @functools.wraps(attend)
    def counting(*arguments: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls.append(1)
        return attend(*arguments, **options)

    monkeypatch.setitem(backends, math, counting)
    assert_close(run(model, inputs), sparse)
    of_text = len(calls)
    handle.set_enabled(False)
    assert_close(run(model, inputs), dense)
    assert len(calls) - 2 * of_text == len(family.attentions(model))


@torch.no_grad()
@pytest.mark.parametrize(("name", "normalize"), [("wan2.1", "softmax"), ("hunyuan", "minmax")])
def test_packed_equals_eager(name: str, normalize: str):
    family = FAMILIES[name]
    model, eager, inputs = family.build(), family.build(), family.inputs()
    for each in (model, eager):
        apply_vmoba(each, VMoBAConfig(*BLOCKS, Threshold(0.3, max_density=0.6, normalize=normalize), dispatch="packed"))
    compile_blocks(model, family)
    assert_close(run(model, inputs), run(eager, inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "mochi", "hunyuan"])
def test_graphs_are_three_whatever_the_step(name: str):
    """For each class of blocks, and those that a stock model has more of.

    CogVideoX's first block and HunyuanVideo's first single one get inputs of other strides than the others; Mochi's
    last has no text, and the stock model does not compile.
    """
    family = FAMILIES[name]
    model, stock, inputs = family.build(num_layers=12), family.build(num_layers=12), family.inputs()
    more = 1
    if name != "mochi":
        of_stock = compile_blocks(stock, family)
        run(stock, inputs)
        more = of_stock.frame_count - len(family.block_classes)
        torch.compiler.reset()
    assert more == (0 if name == "wan2.1" else 1)
    handle = apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(2), dense_steps=2))
    counter = compile_blocks(model, family)
    outputs = []
    for enabled, steps in ((True, range(5)), (False, [3]), (True, [4, 0])):
        handle.set_enabled(enabled)
        for step in steps:
            handle.set_step(step, 5)
            outputs.append(run(model, inputs))
            assert counter.frame_count == 3 * len(family.block_classes) + more
    handle.remove()
    dense = run(family.build(num_layers=12), inputs)
    are_dense = [torch.allclose(output, dense, rtol=1e-4, atol=1e-4) for output in outputs]
    assert are_dense == [True, True, False, False, False, True, False, True]


@torch.no_grad()
def test_applying_to_a_compiled_model():
    family = FAMILIES["wan2.1"]
    model, inputs = family.build(), family.inputs()
    counter = compile_blocks(model, family)
    dense = run(model, inputs)
    handle = apply_vmoba(model, SPARSE)
    assert_close(run(model, inputs), sparse_output(family, inputs))
    assert counter.frame_count == 4
    handle.remove()
    assert torch.equal(run(model, inputs), dense)
    assert counter.frame_count == 4


@pytest.mark.parametrize(("name", "checkpointing"), [("wan2.1", True), ("cogvideox", False)])
def test_training_equals_eager(name: str, checkpointing: bool):
    family = FAMILIES[name]
    model, eager, inputs = family.build(), family.build(), family.inputs()
    for each in (model, eager):
        apply_vmoba(each, SPARSE)
    compile_blocks(model, family, "aot_eager")
    if checkpointing:
        model.enable_gradient_checkpointing()  # pyright: ignore
    output, expected = run(model, inputs), run(eager, inputs)
    assert_close(output, expected)
    assert_gradients_close(gradients(output, model), gradients(expected, eager))


def test_inductor_equals_eager():
    """In one layer of Mochi; Inductor's gradients of both stock HunyuanVideos are wrong on a CPU (torch 2.13)."""
    family = FAMILIES["mochi"]
    model, eager, inputs = family.build(num_layers=1), family.build(num_layers=1), family.inputs()
    for each in (model, eager):
        apply_vmoba(each, SPARSE)
    compile_blocks(model, family, "inductor")
    with torch.no_grad():
        assert_close(run(model, inputs), run(eager, inputs))
    output, expected = run(model, inputs), run(eager, inputs)
    assert_close(output, expected)
    assert_gradients_close(gradients(output, model), gradients(expected, eager))


@torch.no_grad()
def test_summary_and_errors_reach_through_compiled_blocks():
    family = FAMILIES["wan2.1"]
    model = family.build()
    handle = apply_vmoba(model, VMoBAConfig(4, (4, 4), (2, 2, 3), TopK(1)))
    compile_blocks(model, family)
    with pytest.raises(ValueError, match="temporal block must not be larger than grid"):
        run(model, family.inputs(GRID))
    run(model, family.inputs(OTHER_GRID))
    assert handle.summary().count("sparse") == 3
    handle.remove()
    assert_close(run(model, family.inputs(GRID)), dense_output(family, family.inputs(GRID)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_warm_up_makes_no_graph_anew_in_training(checkpointing: bool):
    family = FAMILIES["wan2.1"]
    model, eager, inputs = family.build(), family.build(), family.inputs()
    config = VMoBAConfig(*BLOCKS, Threshold(0.25, normalize="softmax"), dispatch="tiles")
    handle = apply_vmoba(model, config)
    counter = compile_blocks(model, family, "aot_eager")
    if checkpointing:
        model.enable_gradient_checkpointing()  # pyright: ignore
    schedule, of_full = Warmup(3, dense_steps=1), 0
    for step in range(6):
        share = schedule.at(step)
        handle.set_warmup(share)
        with torch.compiler.set_stance("fail_on_recompile" if step not in (0, 2) else "default"):
            output = run(model, inputs)
            found = gradients(output, model)
        of_full = of_full or counter.frame_count
        tau = 1 - 0.75 * share
        with apply_vmoba(eager, dataclasses.replace(config, rule=dataclasses.replace(config.rule, tau=tau))) as other:
            other.set_enabled(share > 0)
            expected = run(eager, inputs)
            expected_gradients = gradients(expected, eager)
        assert_close(output, expected)
        assert_gradients_close(found, expected_gradients)
    assert counter.frame_count - of_full == 3
    assert "Threshold(tau=0.25" in handle.summary()


@torch.no_grad()
def test_a_warm_up_makes_no_graph_anew_without_gradients():
    family = FAMILIES["wan2.1"]
    model, eager, inputs = family.build(), family.build(), family.inputs()
    handle = apply_vmoba(model, VMoBAConfig(*BLOCKS, Threshold(0.25)))
    counter = compile_blocks(model, family)
    for share in (0.0, 0.4, 1.0, 0.0):
        handle.set_warmup(share)
        with apply_vmoba(eager, VMoBAConfig(*BLOCKS, Threshold(1 - 0.75 * share))) as other:
            other.set_enabled(share > 0)
            assert_close(run(model, inputs), run(eager, inputs))
    assert counter.frame_count == 3


def test_a_warm_up_between_a_forward_and_its_recomputation():
    family = FAMILIES["wan2.1"]
    model, eager, inputs = family.build(), family.build(), family.inputs()
    handle, _ = (apply_vmoba(each, VMoBAConfig(*BLOCKS, Threshold(0.25))) for each in (model, eager))
    model.enable_gradient_checkpointing()  # pyright: ignore
    handle.set_warmup(1.0)
    output = run(model, inputs)
    handle.set_warmup(0.5)
    run(model, inputs)
    assert_gradients_close(gradients(output, model), gradients(run(eager, inputs), eager))


def test_a_top_k_cannot_be_warmed_up():
    handle = apply_vmoba(FAMILIES["wan2.1"].build(), SPARSE)
    with pytest.raises(ValueError, match="rule must be a Threshold to be warmed up, got TopK"):
        handle.set_warmup(0.5)
