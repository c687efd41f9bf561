"""VMoBAAttention: vmoba_attention with what the config says for its layer."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vmoba_flex import Threshold, TopK, vmoba_attention
from vmoba_flex.config import KINDS, ApproxBlocks, VMoBAConfig
from vmoba_flex.module import VMoBAAttention

GRID = (4, 6, 6)
CONFIG = VMoBAConfig(
    ApproxBlocks(2), (3, 2), (2, 3, 3), {"temporal": TopK(1), "spatial": Threshold(0.4), "spatiotemporal": TopK(2)}
)


def inputs(tokens: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, tokens, dim, generator=generator) for dim in (8, 8, 4)]


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize(("prefix", "suffix", "lengths"), [(0, 0, None), (3, 0, None), (0, 5, [5, 2]), (2, 1, [0, 3])])
def test_equals_vmoba_attention(layer: int, prefix: int, suffix: int, lengths: list[int] | None):
    q, k, v = inputs(4 * 6 * 6 + prefix + suffix)
    text_lengths = None if lengths is None else torch.tensor(lengths)
    output = VMoBAAttention(CONFIG, layer, 4)(q, k, v, GRID, prefix=prefix, suffix=suffix, text_lengths=text_lengths)
    plan = CONFIG.layer(layer, 4)
    partition = CONFIG.partition(plan.kind, GRID, prefix, suffix)
    assert plan.kind == KINDS[layer % 3]
    assert torch.equal(output, vmoba_attention(q, k, v, partition, plan.rule, text_lengths=text_lengths))
    assert output.shape == (2, 2, q.shape[2], 4)


def test_takes_any_grid_and_gives_gradients():
    attention = VMoBAAttention(CONFIG, 2, 3)
    for grid in [GRID, (2, 5, 7)]:
        q, k, v = (x.requires_grad_() for x in inputs(grid[0] * grid[1] * grid[2]))
        attention(q, k, v, grid).sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_dispatch_reaches_the_call():
    q, k, v = inputs(4 * 6 * 6)
    shared = VMoBAAttention(dataclasses.replace(CONFIG, dispatch="shared"), 1, 3)(q, k, v, GRID)
    partition = CONFIG.partition("spatial", GRID)
    assert torch.equal(shared, vmoba_attention(q, k, v, partition, Threshold(0.4), dispatch="shared"))
    with pytest.raises(ValueError, match="backend must be 'auto' on device cpu, got 'flash'"):
        VMoBAAttention(dataclasses.replace(CONFIG, backend="flash"), 1, 3)(q, k, v, GRID)


def test_dense_layers_and_calls_are_full_attention():
    q, k, v = inputs(4 * 6 * 6)
    full = F.scaled_dot_product_attention(q, k, v)
    config = dataclasses.replace(CONFIG, dense_layers=2, dense_steps=0.25, backend="flash", dispatch="packed")
    assert torch.equal(VMoBAAttention(config, 1, 3)(q, k, v, GRID), full)
    assert torch.equal(VMoBAAttention(config, 2, 3)(q, k, v, GRID, dense=True), full)
    sparse = VMoBAAttention(dataclasses.replace(config, backend="auto"), 2, 3)(q, k, v, GRID)
    assert not torch.allclose(sparse, full)


def test_has_no_parameters_and_says_what_it_does():
    attention = VMoBAAttention(dataclasses.replace(CONFIG, dense_layers=1), 1, 3)
    assert not attention.state_dict()
    assert str(attention) == (
        "VMoBAAttention(layer=1, num_layers=3, kind='spatial', "
        "rule=Threshold(tau=0.4, pool='head', max_density=None, normalize='minmax', gate='mean', always=()))"
    )
    assert (
        str(VMoBAAttention(attention.config, 0, 3)) == "VMoBAAttention(layer=0, num_layers=3, kind='temporal', dense)"
    )


def test_copies_and_pickles():
    q, k, v = inputs(4 * 6 * 6)
    attention = VMoBAAttention(CONFIG, 2, 3)
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(twin(q, k, v, GRID), attention(q, k, v, GRID))


@pytest.mark.parametrize("dynamic", [False, None])
def test_twelve_layers_make_three_graphs_a_grid(dynamic: bool | None):
    config = VMoBAConfig(ApproxBlocks(2), ApproxBlocks(4), ApproxBlocks(8), Threshold(0.25, max_density=0.25))
    layers = [VMoBAAttention(config, layer, 12) for layer in range(12)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    graphs = [torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic) for layer in layers]
    for number, grid in enumerate([(4, 6, 6), (2, 7, 8)]):
        q, k, v = inputs(grid[0] * grid[1] * grid[2])
        for _ in range(2):
            for layer, graph in zip(layers, graphs, strict=True):
                torch.testing.assert_close(graph(q, k, v, grid), layer(q, k, v, grid))
            assert counter.frame_count == 3 * (number + 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, qkv: VMoBAAttention({}, 0, 3), TypeError, "config must be a VMoBAConfig, got dict"),
        (lambda a, qkv: VMoBAAttention(CONFIG, 3, 3), ValueError, "layer must lie in 0..num_layers - 1 = 0..2, got 3"),
        (lambda a, qkv: a(*qkv, (4, 6, 7)), ValueError, r"query must have grid .* = 4x6x7 .* = 168 tokens .* got 144"),
        (lambda a, qkv: a(*qkv, (4, 72, 1)), ValueError, r"spatial block must not be larger than grid \(4, 72, 1\)"),
        (lambda a, qkv: a(*qkv, GRID, suffix=1), ValueError, "= 145 tokens"),
        (lambda a, qkv: a(*qkv, GRID, dense=1), TypeError, "dense must be a bool, got 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(VMoBAAttention(CONFIG, 1, 3), inputs(4 * 6 * 6))
