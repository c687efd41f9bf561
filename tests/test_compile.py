"""torch.compile: the compiled paths equal the eager ones, in one graph, without recompiling."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from block_masks import group_mask
from tests.paths import (
    assert_within_budget,
    expected_mask,
    low_precision,
    through_attention,
    through_mask,
    through_shared,
)
from tests.strategies import Problem
from vmoba_flex import (
    ApproxBlocks,
    BlockPartition,
    Tail,
    Threshold,
    TopK,
    VMoBAConfig,
    reference,
    vmoba_attention,
    vmoba_mask,
    vmoba_selection,
)
from vmoba_flex.dispatch import compiled
from vmoba_flex.groups import group_of_key
from vmoba_flex.rules import Rule

GRID = (4, 9, 10)
KINDS = {
    "temporal": BlockPartition.temporal(GRID, 1, prefix=5, suffix=3),
    "spatial": BlockPartition.spatial(GRID, (4, 4)),
    "spatiotemporal": BlockPartition.spatiotemporal(GRID, (2, 3, 4), suffix=2),
}
MANY_BLOCKS = BlockPartition(GRID, (1, 3, 1))


def problem(
    kind: str,
    rule: Rule,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    key_heads: int = 2,
    value_dim: int = 32,
    scale: float | None = None,
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    partition = KINDS.get(kind, MANY_BLOCKS)

    def tensor(heads: int, dim: int = 32) -> torch.Tensor:
        return torch.randn(batch, heads, partition.num_tokens, dim, generator=generator).to(dtype)

    return Problem(tensor(2), tensor(key_heads), tensor(key_heads, value_dim), partition, rule, scale)


@pytest.mark.parametrize(
    ("path", "case", "tile_size"),
    [
        (through_attention("tiles"), problem("temporal", TopK(2), key_heads=1, scale=0.05), None),
        (through_attention("tiles"), problem("spatial", Threshold(0.25), torch.bfloat16), None),
        (through_attention("tiles"), problem("spatiotemporal", TopK(density=0.3, pool="global"), value_dim=16), None),
        (through_mask("raster", tile_size=32), problem("spatiotemporal", Threshold(0.3, pool="block")), None),
        (through_mask("block", tile_size=32), problem("temporal", TopK(1, pool="head"), torch.bfloat16), None),
        # 65 groups and more take more than one word of selection bits.
        (through_attention("tiles"), problem("many", Threshold(0.25, pool="query"), batch=1), None),
        (through_attention("shared"), problem("spatial", Threshold(0.25), torch.bfloat16, value_dim=16), 128),
        (through_shared(16), problem("temporal", TopK(2), key_heads=1, scale=0.05), 16),
        (through_shared(2), problem("many", TopK(density=0.2, pool="head"), batch=1), 2),
    ],
    ids=[
        *("temporal-gqa", "spatial-bf16", "spatiotemporal", "raster", "block-bf16", "many-blocks"),
        *("shared-bf16", "shared-gqa", "shared-many-blocks"),
    ],
)
def test_compiled_outputs_equal_dense_masked_attention(path, case: Problem, tile_size: int | None):
    graph = torch.compile(path, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def check(case: Problem) -> torch.Tensor:
        output, mask = graph(case), expected_mask(case, tile_size)
        exact, _ = reference.attention(case.query, case.key, case.value, mask, case.scale)
        assert_within_budget([output], [low_precision(case, mask)], [exact])
        return output

    # One kernel serves all data, so the properties hold over any of it.
    output = check(case)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        fresh = [torch.randn(x.shape, generator=generator).to(x) * 2**seed for x in (case.query, case.key, case.value)]
        check(dataclasses.replace(case, query=fresh[0], key=fresh[1], value=fresh[2]))
    check(dataclasses.replace(case, query=case.query * 0))  # all ties: a threshold takes everything
    if len(case.query) > 1:
        flipped = {name: getattr(case, name).flip(0) for name in ("query", "key", "value")}
        torch.testing.assert_close(check(dataclasses.replace(case, **flipped)), output.flip(0), rtol=1e-5, atol=1e-6)
        query, key = case.query.clone(), case.key.clone()
        token = case.partition.prefix + 7
        query[0, 0, token], key[0, 0, token + 2] = torch.nan, torch.inf
        with torch.no_grad():
            after = graph(dataclasses.replace(case, query=query, key=key))
        # FlexAttention's CPU kernel gives zeros where a row's scores are NaN; on a GPU, and eagerly, they stay NaN.
        # Either way nothing is made up.
        hit = after[0, 0, token]
        assert (hit.isnan() | (hit == 0)).all()
        assert torch.equal(after[1:], output[1:])


class Block(nn.Module):
    """Projections around one attention call."""

    def __init__(self, partition: BlockPartition, rule: Rule, dispatch: str) -> None:
        super().__init__()
        self.qkv, self.partition, self.rule, self.dispatch = nn.Linear(32, 96), partition, rule, dispatch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        output = vmoba_attention(query, key, value, self.partition, self.rule, dispatch=self.dispatch)
        return output.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("dispatch", "rule"),
    [("tiles", TopK(2)), ("tiles", Threshold(0.25, max_density=0.4)), ("shared", Threshold(0.25))],
    ids=["top-k", "threshold", "shared"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_one_graph_per_partition_kind_and_no_recompiles(dispatch: str, rule: Rule, training: bool):
    torch.compiler.reset()
    # Counting graphs needs Dynamo and AOTAutograd; the C++ that Inductor would make of them is tested above.
    counter = CompileCounterWithBackend("aot_eager")
    blocks = {kind: Block(partition, rule, dispatch) for kind, partition in KINDS.items()}
    graphs = {kind: torch.compile(block, backend=counter, fullgraph=True) for kind, block in blocks.items()}
    for step in range(20):
        stance = "default" if step == 0 else "fail_on_recompile"
        with torch.compiler.set_stance(stance), torch.set_grad_enabled(training):
            for kind, block in blocks.items():
                x = torch.randn(1, block.partition.num_tokens, 32)
                output = graphs[kind](x)
                if step in (0, 19):
                    torch.testing.assert_close(output, block(x), rtol=1e-4, atol=1e-5)
                if training:
                    output.square().mean().backward()
    assert counter.frame_count == len(KINDS)


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared"])
def test_compiled_gradients_equal_eager_ones(dispatch: str):
    case = problem("spatiotemporal", Threshold(0.3, max_density=0.5), batch=1, scale=0.3).with_leaves()
    path = through_attention(dispatch)
    inputs = (case.query, case.key, case.value)
    upstream = torch.randn(case.query.shape)
    expected = torch.autograd.grad(path(case), inputs, upstream)
    actual = torch.autograd.grad(torch.compile(path, fullgraph=True, dynamic=False)(case), inputs, upstream)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_gradient_in_value_only_is_enough():
    case = problem("spatial", TopK(2), batch=1)
    value = case.value.requires_grad_()
    output = torch.compile(through_attention("tiles"), backend="aot_eager", fullgraph=True)(case)
    (grad,) = torch.autograd.grad(output.sum(), value)
    (expected,) = torch.autograd.grad(through_attention("tiles")(case).sum(), value)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [(0, 0), (0, 7), (5, 3), (0, 16)])
@pytest.mark.parametrize("block", [(1, 4, 6), (3, 2, 3), (2, 2, 3)])
def test_compiled_groups_of_keys_equal_eager_ones(block: tuple[int, int, int], text: tuple[int, int]):
    """Inductor's loops over a quotient of arange ended too early on a CPU, and left the last ones unwritten."""
    torch.compiler.reset()
    partition = BlockPartition((3, 4, 6), block, prefix=text[0], suffix=text[1])
    compiled = torch.compile(group_of_key, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(partition, torch.device("cpu")), group_of_key(partition, torch.device("cpu")))


def test_selections_compile_with_symbolic_sizes():
    torch.compiler.reset()
    graph = torch.compile(vmoba_selection, backend="aot_eager", fullgraph=True, dynamic=True)
    for block in [(1, 9, 10), (2, 3, 4), (3, 4, 4)]:
        partition = BlockPartition(GRID, block, suffix=block[0])
        query, key = torch.randn(2, 1, 2, partition.num_tokens, 32)
        expected = vmoba_selection(query, key, partition, TopK(2))
        actual = graph(query, key, partition, TopK(2))
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


RULES = [
    TopK(2, always=(1,)),
    TopK(density=0.3, pool="head"),
    Threshold(0.25, max_density=0.3),
    Threshold(0.3, max_density=0.4, pool="block"),
    Threshold(0.3, max_density=0.5, pool="query", normalize="softmax"),
]
CONFIGS = {
    "explicit": VMoBAConfig(2, (3, 2), (2, 3, 2), TopK(2)),
    "approximate": VMoBAConfig(ApproxBlocks(3), ApproxBlocks(5), ApproxBlocks(8), TopK(2)),
}


@pytest.mark.parametrize("blocks", CONFIGS)
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_three_resolutions_of_one_graph(blocks: str, dynamic: bool | None):
    torch.compiler.reset()
    config = CONFIGS[blocks]

    def run(query, key, value, grid, partition) -> list[torch.Tensor | None]:
        inside = config.partition("spatiotemporal", grid, 1, 2)
        mask = vmoba_mask(query, key, inside, RULES[0], tile_size=16)  # by any rule: it is made from a selection
        found = [mask.kv_num_blocks, mask.full_kv_indices]
        for rule in RULES:
            found.append(vmoba_selection(query, key, partition, rule))
            found.append(vmoba_attention(query, key, value, partition, rule, dispatch="packed"))
        return found

    # Dynamo traces; what a backend makes of the graph is tested above.
    graph = torch.compile(run, backend="eager", fullgraph=True, dynamic=dynamic)
    for grid in [(2, 4, 6), (3, 8, 6), (4, 4, 9)]:
        partition = config.partition("spatiotemporal", grid, 1, 2)
        query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 8)
        expected = run(query, key, value, grid, partition)
        for x, y in zip(graph(query, key, value, grid, partition), expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dispatch", ["tiles", "shared", "dense"])
@pytest.mark.parametrize("tail", [None, Tail(4), Tail((1, 2, 2))])
def test_three_resolutions_on_other_dispatches(dispatch: str, tail: Tail | None):
    torch.compiler.reset()
    rule = TopK(density=0.3)

    def run(query, key, value, partition) -> torch.Tensor:
        options = {} if tail is None or dispatch == "dense" else {"tail": tail}
        return vmoba_attention(query, key, value, partition, rule, dispatch=dispatch, **options)

    graph = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for grid in [(2, 4, 6), (3, 8, 6), (4, 4, 9)]:
        partition = BlockPartition(grid, (2, 3, 2), suffix=1)
        query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 8)
        torch.testing.assert_close(graph(query, key, value, partition), run(query, key, value, partition))


def test_packed_in_a_graph_needs_a_bound():
    case = problem("spatial", Threshold(0.25), batch=1)
    with pytest.raises(Exception, match=r"rule must bound its pairs for dispatch='packed' inside torch\.compile"):
        torch.compile(through_attention("packed"), backend="eager", fullgraph=True)(case)


def test_running_out_of_kernels_is_an_error_and_never_eager(monkeypatch):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    ours = torch.compile(compiled._attend, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(compiled, "_compiled", lambda: ours)
    monkeypatch.setattr(compiled, "_MAX_KERNELS", 10)

    def attend(tokens: int, run) -> None:
        query = torch.randn(1, 1, tokens, 8)
        mask = group_mask(torch.ones(1, 1, tokens, 1, dtype=torch.bool), torch.zeros(tokens, dtype=torch.int64))
        run(query, query, query, block_mask=mask)

    # A user who compiles flex_attention for more shapes than torch allows makes it run eagerly, but not for us.
    users = torch.compile(flex_attention, backend="eager", dynamic=False)
    for tokens in range(16, 26):
        attend(tokens, users)
    for tokens in range(16, 26):
        attend(tokens, compiled.compiled_flex_attention)
    assert counter.frame_count == 10
    with pytest.raises(FailOnRecompileLimitHit):
        attend(26, compiled.compiled_flex_attention)
