"""Padding reaches no valid token, whatever it holds."""

import pytest
import torch
from torch import Tensor

from vmoba_flex import BlockPartition, Tail, TopK, vmoba_attention

PARTITION = BlockPartition((2, 4, 4), (1, 2, 2), prefix=2, suffix=3)
LENGTHS = torch.tensor([1, 4])


@pytest.mark.parametrize("dispatch", ["auto", "packed", "tiles", "shared", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"tail": Tail(2)}, {"return_lse": True}], ids=str)
def test_what_padding_holds_does_not_show(dispatch: str, bad: float, options: dict):
    if dispatch == "dense" and "tail" in options:
        options = {}
    text = torch.arange(5) < LENGTHS[:, None]
    valid = torch.cat([text[:, :2], text.new_ones(2, 32), text[:, 2:]], 1)[:, None, :, None]
    clean = [x * valid for x in torch.randn(3, 2, 4, PARTITION.num_tokens, 8)]
    upstream = torch.randn_like(clean[0]) * valid

    def results(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = vmoba_attention(*leaves, PARTITION, TopK(2), dispatch=dispatch, text_lengths=LENGTHS, **options)
        output = output if isinstance(output, Tensor) else output[0]
        return [x.where(valid, 0) for x in (output, *torch.autograd.grad(output, leaves, upstream))]

    expected = results(*clean)
    assert all(x.isfinite().all() for x in expected)
    query, key, value = (x.where(valid, bad) for x in clean)
    for actual, x in zip(results(clean[0], key, value), expected, strict=True):
        torch.testing.assert_close(actual, x)
    torch.testing.assert_close(results(query, key, value)[0], expected[0])
