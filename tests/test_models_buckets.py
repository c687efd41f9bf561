"""Compiled models at many resolutions, as aspect-ratio buckets bring them, with no setting of the compiler."""

# pyright: reportPrivateImportUsage=false
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from torch._dynamo.testing import CompileCounterWithBackend

from tests.video_models import BLOCKS, FAMILIES, Family, assert_close, compile_blocks, run
from vmoba_flex import TopK
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba

CONFIG = VMoBAConfig(*BLOCKS, TopK(2), dense_steps=1)
BUCKETS = [(frames, height, width) for frames in (3, 4) for height in (3, 4) for width in (3, 4, 5, 6)]
assert len(BUCKETS) == 16


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_model(model: Any, family: Family) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("eager")
    model.compile(fullgraph=True, dynamic=False, backend=counter)
    return counter


@pytest.mark.parametrize(("name", "compile_it"), [("wan2.1", compile_blocks), ("ltx", compile_model)])
def test_sixteen_buckets_with_and_without_gradients(name: str, compile_it: Any):
    family = FAMILIES[name]
    model, eager = family.build(), family.build()
    handles = [apply_vmoba(each, CONFIG) for each in (model, eager)]
    counter = compile_it(model, family)
    limit, graphs = torch._dynamo.config.recompile_limit, []
    for step in (0, 1):
        for handle in handles:
            handle.set_step(step, 2)
        for grid in BUCKETS:
            inputs = family.inputs(grid, batch=1)
            with torch.no_grad():
                assert_close(run(model, inputs), run(eager, inputs))
            if step:
                assert_close(run(model, inputs), run(eager, inputs))
        graphs.append(counter.frame_count)
    assert graphs[1] == 2 * graphs[0]  # those with gradients: without them dense and sparse steps share their graphs
    assert torch._dynamo.config.recompile_limit == limit
