"""capture: query and key of an applied model as it runs."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from tests.video_models import BLOCKS, FAMILIES, GRID, SPARSE, Family, assert_close, compile_blocks, each_family, run
from vmoba_flex import Threshold, VMoBAConfig, apply_vmoba
from vmoba_flex.insight import calibrate, capture, inspect, load

CONFIG = VMoBAConfig(*BLOCKS, Threshold(0.3))


@each_family
@torch.no_grad()
def test_records_choose_as_the_model_did(family: Family):
    """Of one sample and all heads, so that densities are the model's own."""
    model, inputs = family.build(), family.inputs(batch=1)
    apply_vmoba(model, CONFIG)
    expected = run(model, inputs)
    with capture(model, heads=2) as captured:
        assert_close(run(model, inputs), expected)
    assert [(one.layer, one.step, one.kind, one.heads) for one in captured.records] == [
        (i, 0, CONFIG.cycle[i], (0, 1)) for i in range(3)
    ]
    for one, attention in zip(captured.records, family.attentions(model), strict=True):
        assert one.partition.grid == GRID and (one.partition.prefix + one.partition.suffix > 0) == bool(family.text)
        density = sum(report.density for report in inspect([one], CONFIG.rule)) / 2
        assert density == pytest.approx(attention.processor.density.item(), abs=1e-6)
    assert_close(run(model, inputs), expected)


@each_family
@torch.no_grad()
def test_dense_layers_are_recorded_and_stay_dense(family: Family):
    model, inputs = family.build(), family.inputs()
    handle = apply_vmoba(model, CONFIG)
    handle.set_enabled(False)
    expected = run(model, inputs)
    with capture(model) as captured:
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(captured.records) == 3
    assert torch.equal(run(model, inputs), expected)


@torch.no_grad()
def test_what_is_wanted_and_no_more():
    family = FAMILIES["wan2.1"]
    model, inputs = family.build(), family.inputs()
    handle = apply_vmoba(model, SPARSE)
    with capture(model, layers=[1, 2], steps=[0, 2], heads=1) as captured:
        for step in (0, 0, 1, 2):  # guidance runs each step twice
            handle.set_step(step, 3)
            run(model, inputs)
    assert [(one.layer, one.step) for one in captured.records] == [(1, 0), (2, 0), (1, 2), (2, 2)]
    each = captured.records[0].num_bytes()
    assert captured.left_out == 0
    handle.set_step(None)
    with capture(model, heads=1, max_bytes=2 * each) as captured:
        run(model, inputs)
        run(model, inputs)
    assert sum(one.num_bytes() for one in captured.records) <= 2 * each
    assert (len(captured.records), captured.left_out) == (2, 4)
    with capture(model, layers=[0]) as captured:
        run(model, inputs)
        copied = copy.deepcopy(model)
        run(model, inputs)
        run(copied, inputs)
    assert [one.step for one in captured.records] == [0, 1]


@torch.no_grad()
def test_compiled_models_run_eagerly_meanwhile():
    family = FAMILIES["wan2.1"]
    model, inputs = family.build(), family.inputs()
    torch.compiler.reset()
    apply_vmoba(model, CONFIG)
    counter = compile_blocks(model, family)
    expected, graphs = run(model, inputs), counter.frame_count
    with capture(model) as captured:
        assert_close(run(model, inputs), expected)
    assert len(captured.records) == 3
    assert_close(run(model, inputs), expected)
    assert counter.frame_count == graphs
    torch.compiler.reset()


@torch.no_grad()
def test_from_capture_to_a_config_that_applies(tmp_path):
    family = FAMILIES["hunyuan"]
    model, inputs = family.build(), family.inputs()
    with apply_vmoba(model, CONFIG), capture(model) as captured:
        run(model, inputs)
    captured.save(tmp_path / "a.safetensors")
    config, _ = calibrate(load(tmp_path / "a.safetensors"), CONFIG, recall=0.8)
    with apply_vmoba(model, VMoBAConfig.from_json(config.to_json())) as handle:
        run(model, inputs)
        assert handle.summary().count("sparse") == 3


def test_an_error_ends_a_capture():
    family = FAMILIES["wan2.1"]
    model = family.build()
    handle = apply_vmoba(model, CONFIG)
    with pytest.raises(RuntimeError, match="broken off"), capture(model):
        raise RuntimeError("broken off")
    assert handle.states()["model"].recorder is None
    with capture(model), pytest.raises(ValueError, match="model must not be captured already"), capture(model):
        pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [-1]}, ValueError, "layers must lie in 0..num_layers - 1 = 0..2, got -1"),
        ({"layers": [0, 3]}, ValueError, "layers must lie in 0..num_layers - 1 = 0..2, got 3"),
        ({"layers": 0}, TypeError, "layers must hold ints, got 0"),
        ({"steps": "0"}, TypeError, "steps must hold ints, got '0'"),
        ({"steps": [0.5]}, TypeError, "steps must be an int, got 0.5"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an int, got 1.5"),
    ],
)
def test_bad_values(options, error, message):
    model = FAMILIES["wan2.1"].build()
    with pytest.raises(ValueError, match="model must have VMoBA applied, got none"):
        capture(model)
    apply_vmoba(model, CONFIG)
    with pytest.raises(error, match=message):
        capture(model, **options)
