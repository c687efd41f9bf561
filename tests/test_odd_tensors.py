"""Tensors and modes that are not the usual ones: meta and inference tensors, autocast, default dtypes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vmoba_flex import BlockPartition, Tail, Threshold, TopK, vmoba_attention, vmoba_inputs, vmoba_mask, vmoba_selection

PARTITION = BlockPartition((2, 4, 4), (1, 2, 2), suffix=2)
RULES = [TopK(2), TopK(2, pool="global"), Threshold(0.3), Threshold(0.3, max_density=0.5, normalize="softmax")]
WAYS = [
    (dispatch, tail)
    for dispatch in ("auto", "packed", "tiles", "shared", "dense")
    for tail in (None, Tail(2))
    if dispatch != "dense" or tail is None
]


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("dispatch", "tail"), WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_meta_tensors_have_the_shapes_of_real_ones(rule, dispatch: Any, tail: Tail | None, training: bool):
    shapes = []
    for device in ("cpu", "meta"):
        query = torch.zeros(2, 4, 34, 8, dtype=torch.bfloat16, device=device, requires_grad=training)
        value = torch.zeros(2, 4, 34, 4, dtype=torch.bfloat16, device=device)
        lengths = torch.zeros(2, dtype=torch.int64, device=device)
        output, lse, stats = vmoba_attention(
            query, query, value, PARTITION, rule, dispatch=dispatch, tail=tail, return_lse=True, return_stats=True,
            text_lengths=lengths,
        )  # fmt: skip
        if training:
            output.sum().backward()
            assert query.grad is not None and query.grad.device.type == device
        assert output.device.type == device
        shapes.append([(x.shape, x.dtype) for x in (output, lse, *stats)])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("token_order", ["raster", "block"])
def test_masks_and_inputs_of_meta_tensors(token_order: Any):
    x = torch.zeros(2, 4, 34, 8, device="meta")
    assert vmoba_selection(x, x, PARTITION, TopK(2)).shape == (2, 4, 32, 8)
    mask = vmoba_mask(x, x, PARTITION, TopK(2), token_order=token_order)
    assert mask.shape == (2, 4, 34, 34) and mask.kv_indices.is_meta
    key, *_ = vmoba_inputs(x, x, x, PARTITION, TopK(2), tail=Tail((1, 2, 2)), token_order=token_order)
    assert key.shape == (2, 4, 42, 8)


@pytest.mark.parametrize(("dispatch", "tail"), WAYS)
@pytest.mark.parametrize("grad_mode", [False, True])
def test_inference_tensors_give_what_others_do(dispatch: Any, tail: Tail | None, grad_mode: bool):
    with torch.inference_mode():
        query, key, value = torch.randn(3, 2, 4, 34, 8)
    copies = [torch.from_numpy(x.numpy().copy()) for x in (query, key, value)]
    with torch.set_grad_enabled(grad_mode):
        actual = vmoba_attention(query, key, value, PARTITION, TopK(2), dispatch=dispatch, tail=tail)
        expected = vmoba_attention(*copies, PARTITION, TopK(2), dispatch=dispatch, tail=tail)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dispatch", ["packed", "tiles", "shared", "dense"])
def test_stats_are_float32_whatever_the_default(dispatch: Any, default_dtype: torch.dtype):
    partition = BlockPartition((6, 16, 16), (1, 16, 16))
    query = torch.randn(1, 2, 1536, 8, dtype=torch.float32)
    _, stats = vmoba_attention(query, query, query, partition, TopK(2), dispatch=dispatch, return_stats=True)
    assert stats.density.dtype == stats.tile_density.dtype == torch.float32
    expected = 1.0 if dispatch == "dense" else torch.tensor(2 / 6, dtype=torch.float32).item()
    assert stats.density.tolist() == [[expected] * 2]
    assert stats.pairs.dtype == stats.cut.dtype == torch.int64


def test_autocast_chooses_the_same_blocks_everywhere():
    dtype = torch.bfloat16
    torch.manual_seed(0)
    partition, rule, tail = BlockPartition((4, 8, 8), (2, 2, 2)), TopK(4), Tail(2)
    query, key, value = torch.randn(3, 1, 2, 256, 64)
    cast = [x.to(dtype) for x in (query, key, value)]
    expected = vmoba_selection(*cast[:2], partition, rule)
    assert not torch.equal(expected, vmoba_selection(query, key, partition, rule))
    expected_mask, expected_inputs = (
        vmoba_mask(*cast[:2], partition, rule),
        vmoba_inputs(*cast, partition, rule, tail=tail),
    )
    expected_output = vmoba_attention(*cast, partition, rule)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(vmoba_selection(query, key, partition, rule), expected)
        mask, inputs = (
            vmoba_mask(query, key, partition, rule),
            vmoba_inputs(query, key, value, partition, rule, tail=tail),
        )
        assert torch.equal(vmoba_attention(query, key, value, partition, rule), expected_output)
        plain = flex_attention(query, key, value, block_mask=mask)
        assert isinstance(plain, torch.Tensor)
        assert (plain.float() - expected_output.float()).abs().max() < 0.02
    assert torch.equal(mask.to_dense(), expected_mask.to_dense())
    assert torch.equal(mask.kv_indices, expected_mask.kv_indices)
    assert torch.equal(inputs.key, expected_inputs.key) and torch.equal(inputs.value, expected_inputs.value)
    assert torch.equal(inputs.block_mask.kv_indices, expected_inputs.block_mask.kv_indices)
