"""Thresholds that fall from full attention over training steps, in one graph."""

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from vmoba_flex import BlockPartition, Threshold, TopK, VMoBAAttention, VMoBAConfig, Warmup, vmoba_attention
from vmoba_flex.warmup import warmed

GRID = (3, 4, 6)
BLOCKS = (1, (2, 3), (2, 2, 3))


def config(**options) -> VMoBAConfig:
    return VMoBAConfig(*BLOCKS, Threshold(0.25, **options), dispatch="tiles")


def tensors() -> torch.Tensor:
    return torch.randn(3, 1, 2, 72, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)


def with_tau(layer: VMoBAAttention, tau: float, x: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer.plan.rule, Threshold)
    rule = Threshold(tau, max_density=layer.plan.rule.max_density, normalize=layer.plan.rule.normalize)
    partition = layer.config.partition(layer.plan.kind, GRID)
    return vmoba_attention(*x, partition, rule, dispatch="tiles")


@pytest.mark.parametrize("options", [{}, {"normalize": "softmax"}, {"max_density": 0.5}], ids=str)
def test_one_graph_serves_all_thresholds_and_one_full_attention(options):
    torch.compiler.reset()
    layer = VMoBAAttention(config(**options), layer=1, num_layers=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=counter)
    schedule, x = Warmup(4, dense_steps=1), tensors()
    for step in range(7):
        share = schedule.at(step)
        layer.set_warmup(share)
        with torch.compiler.set_stance("fail_on_recompile" if step > 2 else "default"):
            output = compiled(*x, GRID)
            (gradient,) = torch.autograd.grad(output.square().sum(), x)
        expected = with_tau(layer, 1 - 0.75 * share, x) if share else F.scaled_dot_product_attention(*x)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2
    assert torch.equal(layer(*x, GRID), with_tau(layer, 0.25, x))


def test_density_falls_from_one_to_the_rules():
    partition = BlockPartition.spatial(GRID, (2, 3))
    densities = []
    for share in (0.0, 0.01, 0.5, 1.0):
        rule = warmed(Threshold(0.25), share)
        _, stats = vmoba_attention(*tensors(), partition, rule, return_stats=True)
        densities.append(stats.density.mean().item())
    assert densities[0] == 1 and densities == sorted(densities, reverse=True) and densities[1] > 0.9
    _, stats = vmoba_attention(*tensors(), partition, Threshold(0.25), return_stats=True)
    assert densities[-1] == stats.density.mean()


def test_a_cap_holds_throughout_and_stats_count_what_it_cut():
    partition = BlockPartition.spatial(GRID, (2, 3))
    rule = warmed(Threshold(0.25, max_density=0.5), 0.01)
    _, stats = vmoba_attention(*tensors(), partition, rule, return_stats=True)
    assert (stats.density == 0.5).all() and (stats.cut > 0.4 * partition.num_blocks * 72).all()


def test_a_warmed_rule_says_what_is_in_force_and_is_warmed_from_its_own_tau():
    rule = warmed(Threshold(0.25, pool="query", max_density=0.5, normalize="softmax"), 0.5)
    expected = Threshold(0.625, pool="query", max_density=0.5, normalize="softmax")
    assert repr(rule) == repr(expected)
    assert warmed(rule, 1.0).now == 0.25 and rule.now == 0.625
    assert copy.deepcopy(rule).now == 0.625
    assert dataclasses.replace(rule, max_density=None).now is rule.now


def test_the_tau_in_force_lies_on_the_cpu_in_float64_whatever_the_defaults():
    with torch.device("meta"), torch.inference_mode():
        rule = warmed(Threshold(0.25), 0.5)
    assert (rule.now.device.type, rule.now.dtype, rule.now.is_inference()) == ("cpu", torch.float64, False)


def layer(rule=None) -> VMoBAAttention:
    return VMoBAAttention(VMoBAConfig(*BLOCKS, rule or Threshold(0.25)), 0, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Warmup(0), ValueError, "steps must be at least 1, got 0"),
        (lambda: Warmup(1.5), TypeError, "steps must be an int, got 1.5"),
        (lambda: Warmup(1, dense_steps=-1), ValueError, "dense_steps must be at least 0, got -1"),
        (lambda: Warmup(1).at(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: layer().set_warmup(1.5), ValueError, r"share must lie in \[0, 1\], got 1.5"),
        (lambda: layer().set_warmup("1"), TypeError, "share must be a number, got '1'"),
        (
            lambda: layer(TopK(2)).set_warmup(0.5),
            ValueError,
            r"rule must be a Threshold to be warmed up, got TopK\(k=2",
        ),
    ],
)
def test_bad_values(call, error, message):
    with pytest.raises(error, match=message):
        call()
