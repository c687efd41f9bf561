"""What each stage costs as tokens grow: time linear in tokens at a fixed number of blocks, and no S x S tensor.

`pytest tests/test_stage_costs.py` also prints the times, by pytest-benchmark; under xdist that is off, and the
assertions remain. Stages are called with the arguments that one packed call gave them, whatever these are.
"""

import ast
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.attention import stages
from bench.attention.profiles import CALL_STAGES
from bench.attention.stages import STAGES, watched
from tests.test_bench import ROOT
from vmoba_flex import BlockPartition, Threshold, TopK, vmoba_attention, vmoba_mask, vmoba_selection
from vmoba_flex.rules import POOLS, Rule

FEW, MANY = (8, 16, 16), (8, 32, 32)  # four times the tokens, both in 16 windows
GROWTH = 4
# Fixed costs make growth smaller, sorts a little larger; quadratic growth would be 16. The rest is for busy machines.
SLACK = 2.5
RULES = [TopK(4), *(TopK(4, pool=pool) for pool in ("head", "global")), *(Threshold(0.25, pool=p) for p in POOLS)]
CAPPED = Threshold(0.25, max_density=0.25)

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPartition]:
    partition = BlockPartition.spatial(grid, (grid[1] // 4, grid[2] // 4))
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, partition.num_tokens, 16, generator=generator)
    return query, key, value, partition


def stage_calls(run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The first call of each stage in ``run``, to be made again."""
    calls: dict[str, Callable[[], Any]] = {}

    def around(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(stage, functools.partial(function, *args, **kwargs))
            return function(*args, **kwargs)

        return recorded

    with watched(around):
        run()
    return calls


@functools.cache
def packed_calls(grid: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    query, key, value, partition = problem(grid)
    leaf = query.requires_grad_()
    return stage_calls(lambda: vmoba_attention(leaf, key, value, partition, CAPPED, dispatch="packed").sum().backward())


def select_call(grid: tuple[int, int, int], rule: Rule) -> Callable[[], Any]:
    query, key, _, partition = problem(grid)
    return stage_calls(lambda: vmoba_selection(query, key, partition, rule))["select"]


def mask_call(grid: tuple[int, int, int]) -> Callable[[], Any]:
    query, key, _, partition = problem(grid)
    return lambda: vmoba_mask(query, key, partition, CAPPED, token_order="block")


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def growth(few: Callable[[], Any], many: Callable[[], Any], limit: float, least: int = 5) -> float:
    """Time of ``many`` over that of ``few``, each the best of ``least`` rounds, and up to 30 while above the limit."""
    with torch.no_grad():
        few()
        many()
        best = [float("inf")] * 2
        for rounds in range(30):
            best = [min(*pair) for pair in zip(best, (seconds(few), seconds(many)), strict=True)]
            if rounds + 1 >= least and best[1] <= limit * best[0]:
                break
    return best[1] / best[0]


def largest_allocation(call: Callable[[], Any]) -> int:
    """The most bytes that one op within the call took, in registered ops too."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.events()
    return max(event.self_cpu_memory_usage for event in events)


def assert_linear(benchmark: Any, few: Callable[[], Any], many: Callable[[], Any]) -> None:
    limit = GROWTH * SLACK
    grown = growth(few, many, limit)
    benchmark.extra_info["growth"] = grown
    with torch.no_grad():
        benchmark.pedantic(many, rounds=5)
    assert grown <= limit, f"{grown:.1f} times the time for {GROWTH} times the tokens"
    # A bool for each pair of tokens, without heads.
    assert largest_allocation(many) < problem(MANY)[0].shape[2] ** 2


def test_each_stage_has_a_function():
    assert packed_calls(FEW).keys() == STAGES.keys()


@pytest.mark.parametrize("place", [place for places in CALL_STAGES.values() for place in places])
def test_each_function_of_a_stage_exists(place: str):
    # By its source: modules of kernels can be imported only where Triton is.
    module, _, name = place.rpartition(".")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    assert name in names


@pytest.mark.parametrize(
    ("place", "error"),
    [("block_masks.plans.rows.no_such", AttributeError), ("block_masks.no_such.plan_rows", ModuleNotFoundError)],
)
def test_a_stage_whose_function_is_missing_is_an_error(place: str, error: type[Exception], monkeypatch):
    monkeypatch.setitem(STAGES, "plan", [place])
    with pytest.raises(error, match="no_such"), watched(lambda stage, function: function):
        pass


def test_only_modules_of_kernels_are_left_out_and_only_without_triton(monkeypatch):
    monkeypatch.setattr(stages, "STAGES", {"attention": ["block_masks.no_such_kernels.forward"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with watched(lambda stage, function: function):
        pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModuleNotFoundError, match="no_such_kernels"), watched(lambda stage, function: function):
        pass


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "select" and "attention" not in stage])
def test_stage_is_linear_in_tokens(benchmark, stage: str):
    assert_linear(benchmark, packed_calls(FEW)[stage], packed_calls(MANY)[stage])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{rule.pool}")
def test_select_is_linear_in_tokens(benchmark, rule: Rule):
    assert_linear(benchmark, select_call(FEW, rule), select_call(MANY, rule))


def test_mask_is_linear_in_tokens(benchmark):
    assert_linear(benchmark, mask_call(FEW), mask_call(MANY))


@pytest.mark.parametrize("stage", ["attention", "attention backward"])
def test_attention_over_rows_costs_the_density(benchmark, stage: str):
    # Rows times keys of a block: the density's share of S x S. Its memory is FlexAttention's; see tests/test_gpu.py.
    limit = GROWTH**2 * SLACK
    grown = growth(packed_calls(FEW)[stage], packed_calls(MANY)[stage], limit, least=1)
    benchmark.extra_info["growth"] = grown
    benchmark.pedantic(packed_calls(MANY)[stage], rounds=1)
    assert grown <= limit


def test_the_guards_see_what_is_quadratic():
    few, many = (torch.randn(problem(grid)[0].shape[2], 16) for grid in (FEW, MANY))

    def square(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.T).sum()

    assert growth(lambda: square(few), lambda: square(many), float("inf")) > GROWTH * SLACK
    assert largest_allocation(lambda: square(many)) >= len(many) ** 2
