"""Compiled models at many resolutions, as aspect-ratio buckets bring them, with no setting of the compiler."""

# pyright: reportPrivateImportUsage=false
import dataclasses
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


@pytest.mark.parametrize(
    ("name", "compile_it", "training", "graphs"),
    [("wan2.1", compile_blocks, True, 3 * len(BUCKETS)), ("ltx", compile_model, False, len(BUCKETS))],
)
def test_sixteen_buckets(name: str, compile_it: Any, training: bool, graphs: int):
    family = FAMILIES[name]
    model, eager = family.build(), family.build()
    handles = [apply_vmoba(each, CONFIG) for each in (model, eager)]
    counter = compile_it(model, family)
    limit = torch._dynamo.config.recompile_limit
    for step in (1,) if training else (1, 0):  # with gradients dense layers have graphs of their own
        for handle in handles:
            handle.set_step(step, 2)
        for grid in BUCKETS:
            inputs = family.inputs(grid, batch=1)
            with torch.set_grad_enabled(training):
                assert_close(run(model, inputs), run(eager, inputs))
    assert counter.frame_count == graphs
    assert torch._dynamo.config.recompile_limit == limit


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_text_sizes_than_the_limit_of_graphs():
    """Text that is not padded to one size: each size is a partition of its own, and so a graph."""
    family = FAMILIES["cogvideox"]
    model, eager = family.build(num_layers=1), family.build(num_layers=1)
    for each in (model, eager):
        apply_vmoba(each, dataclasses.replace(CONFIG, dense_steps=0))
    counter = compile_blocks(model, family)
    inputs = family.inputs((3, 3, 4), batch=1)
    for tokens in range(1, 5):
        changed = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :tokens]}
        assert_close(run(model, changed), run(eager, changed))
        assert counter.frame_count == tokens
