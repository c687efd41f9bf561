"""torch.compile: the compiled paths equal the eager ones, in one graph, without recompiling."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.paths import assert_within_budget, expected_mask, low_precision, through_attention, through_mask
from tests.strategies import Problem
from vmoba_flex import BlockPartition, Threshold, TopK, reference, vmoba_attention
from vmoba_flex.rules import Rule

GRID = (4, 9, 10)
KINDS = {
    "temporal": BlockPartition.temporal(GRID, 1, prefix=5, suffix=3),
    "spatial": BlockPartition.spatial(GRID, (4, 4)),
    "spatiotemporal": BlockPartition.spatiotemporal(GRID, (2, 3, 4), suffix=2),
}
MANY_BLOCKS = BlockPartition(GRID, (1, 3, 1))


def problem(kind: str, rule: Rule, dtype: torch.dtype = torch.float32, batch: int = 2, key_heads: int = 2) -> Problem:
    generator = torch.Generator().manual_seed(0)
    partition = KINDS.get(kind, MANY_BLOCKS)

    def tensor(heads: int) -> torch.Tensor:
        return torch.randn(batch, heads, partition.num_tokens, 32, generator=generator).to(dtype)

    return Problem(tensor(2), tensor(key_heads), tensor(key_heads), partition, rule)


@pytest.mark.parametrize(
    ("path", "case"),
    [
        (through_attention("tiles"), problem("temporal", TopK(2), key_heads=1)),
        (through_attention("tiles"), problem("spatial", Threshold(0.25), torch.bfloat16)),
        (through_attention("tiles"), problem("spatiotemporal", TopK(density=0.3, pool="global"))),
        (through_mask("raster", tile_size=32), problem("spatiotemporal", Threshold(0.3, pool="block"))),
        (through_mask("block", tile_size=32), problem("temporal", TopK(1, pool="head"), torch.bfloat16)),
        # 65 groups and more take more than one word of selection bits.
        (
            through_attention("tiles"),
            problem("many", Threshold(0.25, pool="query"), batch=1),
        ),
    ],
    ids=["temporal-gqa", "spatial-bf16", "spatiotemporal", "raster", "block-bf16", "many-blocks"],
)
def test_compiled_outputs_equal_dense_masked_attention(path, case: Problem):
    mask = expected_mask(case)
    with torch.no_grad():
        output = torch.compile(path, fullgraph=True, dynamic=False)(case)
    exact, _ = reference.attention(case.query, case.key, case.value, mask)
    assert_within_budget([output], [low_precision(case, mask)], [exact])


class Block(nn.Module):
    """Projections around one attention call."""

    def __init__(self, partition: BlockPartition, rule: Rule) -> None:
        super().__init__()
        self.qkv, self.partition, self.rule = nn.Linear(32, 96), partition, rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        return vmoba_attention(query, key, value, self.partition, self.rule).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rule", [TopK(2), Threshold(0.25, max_density=0.4)], ids=["top-k", "threshold"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_one_graph_per_partition_kind_and_no_recompiles(rule: Rule, training: bool):
    torch.compiler.reset()
    # Counting graphs needs Dynamo and AOTAutograd; the C++ that Inductor would make of them is tested above.
    counter = CompileCounterWithBackend("aot_eager")
    blocks = {kind: Block(partition, rule) for kind, partition in KINDS.items()}
    compiled = {kind: torch.compile(block, backend=counter, fullgraph=True) for kind, block in blocks.items()}
    for step in range(20):
        stance = "default" if step == 0 else "fail_on_recompile"
        with torch.compiler.set_stance(stance), torch.set_grad_enabled(training):
            for kind, block in blocks.items():
                x = torch.randn(1, block.partition.num_tokens, 32)
                output = compiled[kind](x)
                if step in (0, 19):
                    torch.testing.assert_close(output, block(x), rtol=1e-4, atol=1e-5)
                if training:
                    output.square().mean().backward()
    assert counter.frame_count == len(KINDS)


def test_compiled_gradients_equal_eager_ones():
    case = problem("spatiotemporal", Threshold(0.3), batch=1).with_leaves()
    path = through_attention("tiles")
    inputs = (case.query, case.key, case.value)
    upstream = torch.randn(case.query.shape)
    expected = torch.autograd.grad(path(case), inputs, upstream)
    actual = torch.autograd.grad(torch.compile(path, fullgraph=True, dynamic=False)(case), inputs, upstream)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
