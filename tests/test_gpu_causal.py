"""Causal partitions and queries of some frames on a CUDA GPU."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.paths import assert_equals_dense_masked_attention, attend, expected_mask, full_mask, through_attention
from tests.strategies import Problem
from tests.test_causal import changed_after, of_frames
from tests.test_gpu_tail import assert_equals_reference
from tests.test_tail import upstream_of
from vmoba_flex import BlockPartition, Tail, Threshold, TopK
from vmoba_flex.rules import Rule

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_at_any_size")]

RULES: dict[str, Rule] = {
    "top-k": TopK(5),
    "spread": TopK(density=0.3, gate="spread"),
    "exact": Threshold(0.6, normalize="softmax", pool="query", gate="exact", max_density=0.6),
    "head": Threshold(0.3, pool="head"),
}
WAYS = [("tiles", "auto"), ("packed", "triton"), ("packed", "auto")]


def causal(rule: str, prefix: int = 5) -> Problem:
    """Blocks that the grid cuts short, in chunks of 4 frames of which the last has 2."""
    partition = BlockPartition((10, 11, 16), (2, 6, 8), prefix=prefix, causal_frames=4)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, partition.num_tokens, 128, generator=generator).bfloat16().cuda()
    return Problem(query, key[:, :2], value[:, :2], partition, RULES[rule])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dispatch", "backend"), WAYS)
def test_equals_dense_masked_attention_with_gradients(rule: str, dispatch: str, backend: str):
    case = causal(rule)
    upstream = upstream_of(case).to(case.query)
    path = through_attention(dispatch, backend)
    assert_equals_dense_masked_attention(path, case, upstream, expected_mask(case))


@pytest.mark.parametrize(("dispatch", "backend"), WAYS)
def test_a_tail_equals_the_reference_with_gradients(dispatch: str, backend: str):
    case = dataclasses.replace(causal("top-k"), tail=Tail((1, 4, 4)))
    assert_equals_reference(case, through_attention(dispatch, backend), None)


def test_full_attention_is_causal():
    case = causal("top-k")
    assert_equals_dense_masked_attention(
        through_attention("dense"), case, upstream_of(case).to(case.query), full_mask(case)
    )


@pytest.mark.parametrize("tail", [None, Tail((1, 4, 4))])
@pytest.mark.parametrize("dispatch", ["tiles", "packed", "dense"])
def test_the_future_changes_nothing_and_frames_are_rows(dispatch: Any, tail: Tail | None):
    case = dataclasses.replace(causal("top-k"), tail=None if dispatch == "dense" else tail)
    output = attend(case, dispatch=dispatch)
    other = {name: changed_after(case, 4, getattr(case, name)) for name in ("query", "key", "value")}
    past = ~changed_after(case, 4, output).isnan()
    assert torch.equal(attend(dataclasses.replace(case, **other), dispatch=dispatch)[past], output[past])
    part = dataclasses.replace(case, query=of_frames(case, (4, 10), case.query))
    rows = attend(part, dispatch=dispatch, query_frames=(4, 10))
    torch.testing.assert_close(rows, of_frames(case, (4, 10), output), rtol=2e-2, atol=2e-2)
