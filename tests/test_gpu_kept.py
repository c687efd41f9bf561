"""A kept selection and its plan on a CUDA GPU: the bits of the call that chose it, without a host read, in graphs."""

import dataclasses
import functools
from typing import Any

import pytest
import torch

from tests.paths import attend, outputs_and_gradients
from tests.strategies import Problem
from tests.test_gpu import problem
from vmoba_flex import Selection, Tail, TopK, vmoba_selection

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_at_any_size")]

# Dispatch, what chooses, and backend: "auto" is FlashAttention-4 where it is installed.
WAYS: list[tuple[Any, Any, Any]] = [
    ("packed", "token", "triton"),
    ("packed", "token", "auto"),
    ("tiles", "token", "auto"),
    ("shared", "tile", "triton"),
    ("shared", "tile", "auto"),
]


def kept(case: Problem, choice: Any) -> Selection:
    return vmoba_selection(case.query, case.key, case.partition, case.rule, choice=choice, as_bits=True)


def planned(case: Problem, choice: Any, backend: str) -> Selection:
    return kept(case, choice).planned(case.query, "triton" if backend == "triton" else "flash")


@pytest.mark.parametrize("tail", [None, Tail(30)])
@pytest.mark.parametrize("case", ["temporal-gqa", "spatial", "padded-gqa", "padded-slabs", "many-blocks"])
@pytest.mark.parametrize(("dispatch", "choice", "backend"), WAYS)
def test_the_call_that_chose_it_bit_for_bit(dispatch: Any, choice: Any, backend: Any, case: str, tail: Tail | None):
    torch.compiler.reset()  # a worker may get more cases of one path than PyTorch keeps graphs of a function
    one = dataclasses.replace(problem(case), tail=tail)
    upstream = torch.randn_like(one.query)
    options = {"dispatch": dispatch, "backend": backend}

    def results(**more: Any) -> list[torch.Tensor]:
        return outputs_and_gradients(lambda one: attend(one, **options, **more), one, upstream)

    expected = results()
    for selection in (kept(one, choice), planned(one, choice, backend)):
        # FlashAttention-4 sums the gradient of query by atomics.
        count = 4 if backend == "triton" else 1
        for x, y in zip(results(selection=selection)[:count], expected[:count], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("dispatch", "choice", "backend"), WAYS)
def test_no_host_reads(dispatch: Any, choice: Any, backend: Any):
    one = dataclasses.replace(problem("many-blocks"), tail=Tail(30), rule=TopK(5))

    def run() -> None:
        for selection in (kept(one, choice), planned(one, choice, backend)):
            path = functools.partial(attend, dispatch=dispatch, backend=backend, selection=selection)
            outputs_and_gradients(path, one, one.query)

    run()  # compiles, which may read the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dispatch", "choice", "backend"), WAYS)
def test_graphs_replay_with_new_selections(dispatch: Any, choice: Any, backend: Any):
    torch.compiler.reset()
    one = dataclasses.replace(problem("many-blocks"), rule=TopK(5))

    def call(one: Problem, selection: Selection) -> torch.Tensor:
        return attend(one, dispatch=dispatch, backend=backend, selection=selection)

    fast = torch.compile(call, mode="reduce-overhead", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for seed in range(4):
            selection = planned(dataclasses.replace(problem("many-blocks", seed), rule=TopK(5)), choice, backend)
            torch.compiler.cudagraph_mark_step_begin()
            output, expected = fast(one, selection), call(one, selection)
            assert (output - expected).norm() <= 1e-2 * expected.norm()
