"""Calls shared out over the ranks of a process group, held to the same call on one process."""

import dataclasses
import functools
import inspect
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.paths import attend
from tests.ranks import RankPool
from tests.strategies import Problem
from vmoba_flex import BlockPartition, Tail, Threshold, TopK, collectives, vmoba_attention, vmoba_selection
from vmoba_flex.collectives import Ranks
from vmoba_flex.distributed import RankGroup, TokenShards
from vmoba_flex.distributed.exchange import Layout
from vmoba_flex.warmup import WarmedThreshold

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.usefixtures("one_thread")]  # one pool of processes

ROOT = Path(__file__).parent.parent
RULES = [
    TopK(2),
    TopK(2, pool="head"),
    TopK(density=0.4, pool="global", gate="cells"),
    Threshold(0.3, pool="query"),
    Threshold(0.3, pool="block", max_density=0.5),
    Threshold(0.25, pool="head"),
    Threshold(0.25, pool="head", max_density=0.3),
    Threshold(0.3, pool="global"),
    Threshold(0.9, pool="global", max_density=0.4),
    Threshold(0.6, pool="global", normalize="softmax", gate="exact"),
    WarmedThreshold(0.1, pool="block", gate="spread", now=torch.tensor([0.5], dtype=torch.float64)),
]
DISPATCHES = ["tiles", "packed", "shared", "dense"]
PARTITION = BlockPartition((5, 6, 7), (2, 3, 4), prefix=3, suffix=5)


@functools.cache
def group_of(size: int) -> DeviceMesh:
    """This rank's group of ``size`` ranks: 0 and 1, or 2 and 3, for two."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return init_device_mesh(device, (dist.get_world_size() // size, size), mesh_dim_names=("copies", "ranks"))["ranks"]


def problem(
    rule: Any,
    heads: int,
    key_heads: int | None = None,
    partition: BlockPartition = PARTITION,
    head_dim: int = 8,
    **options: Any,
) -> Problem:
    """A problem of integers, block means included: scores are exact however they are added up, and many tie."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, key_heads or heads, partition.num_tokens, head_dim)
    common = math.lcm(*partition.block_sizes().tolist())
    query = torch.randint(-2, 3, (2, heads, *shape[2:]), generator=generator).float()
    key = torch.randint(-1, 2, shape, generator=generator).float() * common
    value = torch.randn(shape, generator=generator)
    return Problem(query, key, value, partition, rule, scale=0.3 / common, **options)


def here(x: Tensor, shards: TokenShards | None, partition: BlockPartition, group: Any) -> Tensor:
    """This rank's tokens."""
    spans = Layout.of(Ranks.of(group), shards, partition).here
    return torch.cat([x[:, :, start : start + length] for start, length in spans], 2)


def upstream(x: Tensor) -> Tensor:
    """An upstream gradient for outputs, the same at each call."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def whole(problem: Problem, **options: Any) -> tuple[list[Tensor], Any]:
    """Output, gradients and stats on one process."""
    problem = problem.with_leaves()
    output, stats = attend(problem, return_stats=True, **options)
    leaves = (problem.query, problem.key, problem.value)
    grads = torch.autograd.grad(output, leaves, upstream(output).to(output))
    return [output.detach(), *grads], stats


def shared_out(problem: Problem, size: int, device: str, shards: TokenShards | None, options: dict[str, Any]) -> Any:
    """Output, gradients and stats of this rank, on a rank."""
    group, partition = group_of(size), problem.partition
    full = problem.to(torch.device(device))
    local = [here(x, shards, partition, group) for x in (full.query, full.key, full.value)]
    part = dataclasses.replace(full, **dict(zip(("query", "key", "value"), local, strict=True))).with_leaves()
    output, stats = attend(part, return_stats=True, group=RankGroup(group, shards=shards, check=True), **options)
    wanted = upstream(torch.empty(*problem.query.shape[:3], problem.value.shape[-1]))
    if shards is not None and shards.text == "replicated":  # as many losses as ranks see the text
        wanted[:, :, : partition.prefix] /= size
        wanted[:, :, partition.prefix + partition.num_video_tokens :] /= size
    grads = torch.autograd.grad(
        output, (part.query, part.key, part.value), here(wanted.to(output), shards, partition, group)
    )
    return [x.detach().cpu() for x in (output, *grads)], [x.cpu() for x in stats]


def put_together(parts: list[Tensor], shards: TokenShards | None, partition: BlockPartition, add: bool) -> Tensor:
    """The whole of what ranks hold; ``add``: replicated tokens are added up."""
    result = torch.zeros(*parts[0].shape[:2], partition.num_tokens, parts[0].shape[3])
    spans = (shards or TokenShards()).spans(partition, len(parts))
    for part, of_rank in zip(parts, spans, strict=True):
        at = 0
        for start, length in of_rank:
            piece = part[:, :, at : at + length]
            result[:, :, start : start + length] = piece + result[:, :, start : start + length] if add else piece
            at += length
        assert at == part.shape[2]
    return result


def assert_equals_one_process(
    pool: RankPool,
    problem: Problem,
    size: int,
    shards: TokenShards | None = None,
    exact: bool = True,
    **options: Any,
) -> None:
    expected, expected_stats = whole(problem, **options)
    results = pool.run(shared_out, problem, size, "cpu", shards, options)
    for _, stats in results:
        for x, y in zip(stats, expected_stats, strict=True):
            assert torch.equal(x, y)
    for copy in range(0, len(results), size):
        ranks = [tensors for tensors, _ in results[copy : copy + size]]
        for i, (name, *parts) in enumerate(zip(("output", "dquery", "dkey", "dvalue"), *ranks, strict=True)):
            # Each rank's text has its own share of the gradient where text is replicated.
            actual = put_together(parts, shards, problem.partition, add=i > 0)
            if exact:
                assert torch.equal(actual, expected[i]), (name, (actual - expected[i]).abs().max())
            else:
                torch.testing.assert_close(actual, expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_each_rule_and_dispatch_equals_one_process(rank_pool, rule, dispatch):
    # 5 heads on 4 and on 2 ranks, and tokens that do not divide.
    assert_equals_one_process(rank_pool, problem(rule, 5), 4, dispatch=dispatch)
    assert_equals_one_process(rank_pool, problem(rule, 5), 2, dispatch=dispatch)


SHARDS = [
    TokenShards(sizes=(100, 1, 70, 47)),
    TokenShards(text="split"),
    TokenShards(text="replicated"),
    TokenShards(sizes=(60, 9, 140, 1), text="replicated"),
    TokenShards(sizes=(0, 70, 0, 140), text="split"),
]


@pytest.mark.parametrize("shards", SHARDS, ids=repr)
@pytest.mark.parametrize("rule", [RULES[4], RULES[6], RULES[7]], ids=lambda rule: rule.pool)
def test_shards_of_any_size_and_text_anywhere(rank_pool, rule, shards):
    for dispatch in ("packed", "shared"):
        assert_equals_one_process(rank_pool, problem(rule, 4), 4, shards, dispatch=dispatch)
    assert_equals_one_process(rank_pool, problem(rule, 3), 4, shards, exact=False, dispatch="tiles")


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(8, 4, 4), (12, 6, 4), (9, 3, 2), (8, 2, 4), (6, 1, 4), (5, 5, 4)], ids=repr
)
def test_key_heads_go_with_their_query_heads(rank_pool, heads, key_heads, size, dispatch):
    lengths = torch.tensor([8, 2])
    for rule in (RULES[4], RULES[6], RULES[8]):
        # Where a key head goes to several ranks, its gradients are added up in another order.
        case = problem(rule, heads, key_heads, text_lengths=lengths)
        assert_equals_one_process(rank_pool, case, size, exact=key_heads >= size, dispatch=dispatch)


@pytest.mark.parametrize(
    ("rule", "dispatch"), [*itertools.product(RULES, ["tiles", "packed"]), (RULES[0], "dense")], ids=repr
)
def test_more_ranks_than_heads(rank_pool, rule, dispatch):
    lengths = torch.tensor([3, 8])
    for heads, key_heads in ((2, 1), (3, 3)):
        case = problem(rule, heads, key_heads, text_lengths=lengths)
        assert_equals_one_process(rank_pool, case, 4, exact=False, dispatch=dispatch)


@pytest.mark.parametrize("dispatch", ["tiles", "packed", "shared"])
def test_a_tail_equals_one_process(rank_pool, dispatch):
    lengths = torch.tensor([3, 8])
    for heads, key_heads in ((5, 5), (8, 4), (2, 1)):
        if heads < 4 and dispatch == "shared":
            continue
        case = problem(TopK(2), heads, key_heads, text_lengths=lengths, tail=Tail((1, 2, 3)))
        assert_equals_one_process(rank_pool, case, 4, exact=False, dispatch=dispatch)


def log_sum_exp(problem: Problem, shards: TokenShards | None, options: dict[str, Any]) -> Tensor:
    """The log-sum-exp of this rank's tokens, on a rank."""
    group = RankGroup(group_of(4), shards=shards, check=True)
    local = [here(x, shards, problem.partition, group_of(4)) for x in (problem.query, problem.key, problem.value)]
    part = dataclasses.replace(problem, **dict(zip(("query", "key", "value"), local, strict=True)))
    return attend(part, return_lse=True, group=group, **options)[1]


@pytest.mark.parametrize(("dispatch", "rule"), [("packed", RULES[4]), ("packed", RULES[0]), ("tiles", RULES[5])])
@pytest.mark.parametrize("heads", [5, 2])  # ranks hold heads, or queries
def test_each_rank_takes_its_part_of_a_selection(rank_pool, heads, dispatch, rule):
    one = problem(rule, heads)
    kept = vmoba_selection(one.query, one.key, PARTITION, rule, as_bits=True)
    assert_equals_one_process(rank_pool, one, 4, exact=heads == 5, dispatch=dispatch, selection=kept)


def test_tiles_that_chose_before_on_several_ranks(rank_pool):
    one = problem(RULES[0], 5)
    kept = vmoba_selection(one.query, one.key, PARTITION, RULES[0], choice="tile", as_bits=True)
    assert_equals_one_process(rank_pool, one, 4, TokenShards(text="replicated"), dispatch="shared", selection=kept)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("heads", [5, 2])  # ranks hold heads, or queries
def test_each_rank_gets_the_log_sum_exp_of_its_tokens(rank_pool, dispatch, heads):
    if heads < 4 and dispatch == "shared":
        return
    for shards in (None, TokenShards(text="replicated")):
        for tail in (None,) if dispatch == "dense" else (None, Tail(4)):
            case = problem(TopK(2), heads, tail=tail)
            _, expected = attend(case, dispatch=dispatch, return_lse=True)
            parts = rank_pool.run(log_sum_exp, case, shards, {"dispatch": dispatch})
            actual = put_together([x[..., None] for x in parts], shards, case.partition, add=False)[..., 0]
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_ranks_of_text_only(rank_pool):
    partition = BlockPartition((2, 2, 3), (1, 2, 3), prefix=50, suffix=40)
    for heads in (4, 2):
        for rule, dispatch in ((RULES[6], "tiles"), (RULES[8], "packed")):
            case = problem(rule, heads, partition=partition)
            assert_equals_one_process(rank_pool, case, 4, exact=False, dispatch=dispatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [4, 2])
def test_dtypes_and_value_dims(rank_pool, dtype, heads):
    for rule in (RULES[5], RULES[8]):
        case = problem(rule, heads)
        case = dataclasses.replace(case, value=torch.cat([case.value, case.value], 3)).to(dtype)
        expected, _ = whole(case, dispatch="packed")
        parts = [tensors for tensors, _ in rank_pool.run(shared_out, case, 4, "cpu", None, {"dispatch": "packed"})]
        tolerance = {} if heads == 4 else {"rtol": 0.05, "atol": 0.05}
        for one, *of_ranks in zip(expected, *parts, strict=True):
            torch.testing.assert_close(torch.cat(of_ranks, 2), one, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("heads", [4, 2])
def test_scores_that_are_not_finite(rank_pool, heads, bad):
    for rule in (RULES[1], RULES[2], RULES[4], RULES[6], RULES[7]):
        case = problem(rule, heads)
        case.query[0, 0, 40, 0] = bad
        _, expected = whole(case, dispatch="tiles")
        for _, stats in rank_pool.run(shared_out, case, 4, "cpu", None, {"dispatch": "tiles"}):
            assert all(map(torch.equal, stats, expected)), rule


def largest_reduction(problem: Problem) -> int:
    """Entries of the largest tensor that a call reduces, on a rank."""
    reduced: list[int] = []
    inner = collectives.functional.all_reduce

    def counting(x: Tensor, *args: Any) -> Tensor:
        reduced.append(x.numel())
        return inner(x, *args)

    collectives.functional.all_reduce = counting
    try:
        local = [here(x, None, problem.partition, group_of(4)) for x in (problem.query, problem.key, problem.value)]
        vmoba_attention(*local, problem.partition, problem.rule, dispatch="tiles", group=group_of(4))
    finally:
        collectives.functional.all_reduce = inner
    return max(reduced, default=0)


def test_no_scores_travel(rank_pool):
    partition = BlockPartition((8, 16, 16), (4, 8, 8))
    scores = 2 * partition.num_video_tokens * partition.num_blocks
    for rule, pools in ((RULES[4], 2 * partition.num_blocks), (RULES[8], 2)):
        # A bin for each of 256 digits and each of two criteria.
        assert rank_pool.run(largest_reduction, problem(rule, 4, partition=partition)) == [pools * 256 * 2] * 4
        assert pools * 256 * 2 < 4 * scores
    assert rank_pool.run(largest_reduction, problem(RULES[6], 4)) == [0] * 4


def called_on_one_rank(problem: Problem) -> bool:
    """Whether a group of one rank changes nothing, on a rank."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    tensors = (problem.query, problem.key, problem.value, problem.partition, problem.rule)
    return torch.equal(vmoba_attention(*tensors, group=groups[dist.get_rank()]), vmoba_attention(*tensors))


def test_a_group_of_one(rank_pool):
    assert all(rank_pool.run(called_on_one_rank, problem(RULES[5], 2)))


def eager_and_compiled(
    problem: Problem, size: int, device: str, backend: str, options: dict[str, Any]
) -> tuple[int, list[list[Tensor]]] | None:
    """How many graphs two calls took, and output and gradients of an eager call and of these, on a rank."""
    group, shards, options = group_of(size), options.get("shards"), {**options}
    if dist.get_rank() >= size:
        return None
    options.pop("shards", None)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        fixed: dict[str, Any] = {"scale": problem.scale, "group": RankGroup(group, shards=shards), **options}
        return vmoba_attention(query, key, value, problem.partition, problem.rule, **fixed)

    graph = torch.compile(call, backend=counter, fullgraph=True, dynamic=False)
    full = problem.to(torch.device(device))
    tensors = (full.query, full.key, full.value)
    local = [here(x, shards, problem.partition, group).requires_grad_() for x in tensors]
    results = []
    for one in (call, graph, graph):
        output = one(*local)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), local)])
    return counter.frame_count, results


def compiled(problem: Problem, size: int, backend: str, options: dict[str, Any]) -> tuple[int, bool] | None:
    """How many graphs two calls with gradients took, and whether they equal eager ones, on a rank."""
    found = eager_and_compiled(problem, size, "cpu", backend, options)
    if found is None:
        return None
    graphs, (eager, _, second) = found
    return graphs, all(map(torch.equal, eager, second))


@pytest.mark.parametrize(("rule", "dispatch"), [(RULES[6], "packed"), (RULES[8], "tiles")], ids=["head", "global"])
@pytest.mark.parametrize(("heads", "shards"), [(5, None), (5, TokenShards(text="replicated")), (2, None)])
def test_one_graph_equals_eager(rank_pool, heads, shards, rule, dispatch):
    results = rank_pool.run(compiled, problem(rule, heads), 4, "aot_eager", {"dispatch": dispatch, "shards": shards})
    assert results == [(1, True)] * 4


def test_inductor(rank_pool):
    options = {"dispatch": "packed"}
    assert rank_pool.run(compiled, problem(RULES[8], 3), 2, "inductor", options, limit_s=300)[:2] == [(1, True)] * 2


def test_torchs_collectives_are_what_they_were():
    """Only ``collectives.py`` uses this private module of torch."""
    functional = collectives.functional
    assert list(inspect.signature(functional.all_to_all_single).parameters) == [
        "self", "output_split_sizes", "input_split_sizes", "group", "tag",
    ]  # fmt: skip
    assert list(inspect.signature(functional.all_reduce).parameters) == ["self", "reduceOp", "group", "tag"]
    assert list(inspect.signature(functional.wait_tensor).parameters) == ["tensor"]
    users = [
        path.name
        for folder in ("vmoba_flex", "block_masks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"import .*_functional_collectives|distributed_c10d", path.read_text())
    ]
    assert users == ["collectives.py"]
