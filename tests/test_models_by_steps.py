"""Rules and tails that change by steps in models: each step's own, in one graph."""

# pyright: reportPrivateImportUsage=false
import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("diffusers")

from tests.video_models import BLOCKS, FAMILIES, SPARSE, assert_close, compile_blocks, run
from vmoba_flex import BySteps, Tail, Threshold, TopK, VMoBAAttention
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba

FALLING = VMoBAConfig(
    *BLOCKS,
    {
        "temporal": BySteps({0: TopK(2), 0.75: TopK(1)}),
        "spatial": BySteps({0: TopK(3), 0.5: Threshold(0.3), 0.75: TopK(1)}),
        "spatiotemporal": TopK(2),
    },
    dense_steps=1,
    tail=BySteps({0: None, 0.5: Tail(4)}),
)


def at_step(config: VMoBAConfig, step: int, num_steps: int) -> VMoBAConfig:
    """What a config does at one step, as a config that does it at each."""
    layers = [config.layer(i, 3, step, num_steps) for i in range(3)]
    rules = {layer.kind: layer.rule for layer in layers}
    return dataclasses.replace(config, rule=rules, tail=layers[0].tail, dense_steps=0)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_each_step_has_its_own(name: str, compiled: bool):
    family = FAMILIES[name]
    model, other, inputs = family.build(), family.build(), family.inputs()
    dense = run(other, inputs)
    handle = apply_vmoba(model, FALLING)
    if compiled:
        torch.compiler.reset()
        compile_blocks(model, family)
    outputs = []
    for turn, step in enumerate((0, 1, 2, 3, 1, 0)):
        handle.set_step(step, 4)
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            outputs.append(run(model, inputs))
        with apply_vmoba(other, at_step(FALLING, step, 4)):
            assert_close(outputs[-1], run(other, inputs) if step else dense)
    assert not any(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in itertools.pairwise(outputs))


@torch.no_grad()
def test_the_summary_has_the_rule_of_the_step():
    family = FAMILIES["wan2.1"]
    model = family.build()
    handle = apply_vmoba(model, FALLING)
    assert "BySteps({0: TopK(k=3" in handle.summary()
    handle.set_step(3, 4)
    run(model, family.inputs())
    assert handle.summary().count("TopK(k=1") == 2
    assert "BySteps" not in handle.summary()


@torch.no_grad()
def test_a_step_that_nobody_knows_is_an_error():
    family = FAMILIES["wan2.1"]
    model = family.build()
    handle = apply_vmoba(model, dataclasses.replace(SPARSE, tail=BySteps({0: None, 1: Tail(4)})))
    with pytest.raises(ValueError, match="config with BySteps needs the denoising step: run a pipeline"):
        run(model, family.inputs())
    handle.set_enabled(False)
    run(model, family.inputs())


@torch.no_grad()
def test_all_thresholds_warm_up():
    family = FAMILIES["wan2.1"]
    model, other, inputs = family.build(), family.build(), family.inputs()
    handle = apply_vmoba(model, VMoBAConfig(*BLOCKS, BySteps({0: Threshold(0.5), 1: Threshold(0.2)})))
    handle.set_warmup(0.5)
    for step, tau in enumerate((0.75, 0.6)):
        handle.set_step(step, 2)
        with apply_vmoba(other, VMoBAConfig(*BLOCKS, Threshold(tau))):
            assert_close(run(model, inputs), run(other, inputs))
    handle = apply_vmoba(other, FALLING)
    with pytest.raises(ValueError, match="rule must be a Threshold to be warmed up, got TopK"):
        handle.set_warmup(0.5)


def test_a_module_knows_no_steps():
    with pytest.raises(ValueError, match="config must have no BySteps for VMoBAAttention, which knows no steps"):
        VMoBAAttention(FALLING, layer=2, num_layers=3)
    one = VMoBAAttention(at_step(FALLING, 2, 4), layer=2, num_layers=3)
    assert (one.plan.rule, one.plan.tail) == (TopK(2), Tail(4))
