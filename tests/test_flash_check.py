"""The check of FlashAttention-4 comes out the same wherever the first call stands."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from block_masks.flash_check import undisturbed


def gradient() -> Tensor:
    """A gradient, found while the caller computes something else."""
    x = torch.ones(3, requires_grad=True)
    return torch.autograd.grad((x.matmul(x) * x).sum(), x)[0]


@torch.library.custom_op("vmoba_tests::find_gradient", mutates_args=())
def find_gradient(x: Tensor) -> Tensor:
    return x + undisturbed(gradient)


@find_gradient.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_inside_an_op_nothing_else_differentiates():
    expected = gradient()
    assert torch.equal(find_gradient(torch.zeros(3)), expected)
    with torch.inference_mode():
        assert torch.equal(find_gradient(torch.zeros(3)), expected)


def test_inside_a_checkpoint_nothing_is_counted():
    calls = []

    def block(x: Tensor) -> Tensor:
        if not calls:  # recomputed, it is known
            calls.append(undisturbed(gradient))
        return (x * x).sin()

    x = torch.ones(3, requires_grad=True)
    output = checkpoint(block, x, use_reentrant=False)
    assert isinstance(output, Tensor)
    output.sum().backward()
    assert torch.equal(calls[0], gradient())


def test_autocast_and_a_default_device_do_not_reach_it():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert undisturbed(gradient).dtype == torch.float32
        assert undisturbed(gradient).device.type == "cpu"
