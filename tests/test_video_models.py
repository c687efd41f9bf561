"""The tiny models show what they are there to show."""

import pytest
import torch

pytest.importorskip("diffusers")

from tests.video_models import FAMILIES, GRID, OTHER_GRID, Family, each_family, layers_of, reference, run
from vmoba_flex import BlockPartition, Threshold, TopK


@each_family
@torch.no_grad()
def test_each_layers_attention_shows_in_the_output(family: Family):
    model, inputs = family.build(), family.inputs()
    expected = run(model, inputs)
    assert expected.isfinite().all() and 0.3 < expected.std() < 3

    def perturb(module, arguments, output):
        video, *rest = output if isinstance(output, tuple) else (output,)
        video = video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
        return (video, *rest) if rest else video

    assert len(family.attentions(model)) == 3
    for attention in family.attentions(model):
        hook = attention.register_forward_hook(perturb)
        assert (run(model, inputs) - expected).abs().mean() > 1e-2
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("name", ["hunyuan", "hunyuan1.5", "ltx", "mochi"])
def test_padded_text_does_not_show(name: str):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    expected = run(model, inputs)
    masks = {name: mask for name, mask in inputs.items() if "attention_mask" in name}
    assert masks
    for name, mask in masks.items():
        states = name.replace("attention_mask", "hidden_states")
        changed = inputs | {states: inputs[states] + 9 * (1 - mask[..., None].float())}
        torch.testing.assert_close(run(model, changed), expected, rtol=1e-4, atol=1e-4)
        assert (run(model, inputs | {name: torch.ones_like(mask)}) - expected).abs().mean() > 1e-3


@each_family
@torch.no_grad()
@pytest.mark.parametrize("grid", [GRID, OTHER_GRID])
def test_a_reference_that_keeps_everything_is_the_stock_model(family: Family, grid: tuple[int, int, int]):
    model, inputs = family.build(), family.inputs(grid)
    expected = run(model, inputs)
    everything = BlockPartition(grid, (2, 2, 3)), TopK(density=1.0)
    with reference(model, family, lambda i: everything) as densities:
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert sorted(densities) == [0, 1, 2] and all(set(layer) == {1.0} for layer in densities.values())
    assert torch.equal(run(model, inputs), expected)


@each_family
def test_a_sparse_reference_differs_from_the_stock_model_in_each_layer(family: Family):
    model, inputs = family.build(), family.inputs()
    expected = run(model, inputs)
    choose = layers_of(GRID, Threshold(0.2))
    for layer in range(3):
        with reference(model, family, lambda i, layer=layer: choose(i) if i == layer else None) as densities:
            output = run(model, inputs)
            output.sum().backward()
        assert list(densities) == [layer] and 0.1 < densities[layer][0] < 0.6
        assert (output - expected).abs().mean() > 1e-2
        assert family.attentions(model)[layer].to_q.weight.grad.abs().max() > 0
