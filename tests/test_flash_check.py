"""The check of FlashAttention-4: what it asks for, and that it comes out the same wherever the first call stands."""

import logging
import warnings
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from block_masks.attention import flash_check
from block_masks.attention.flash_check import undisturbed
from block_masks.attention.flash_warning import ignore_its_warning


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


@pytest.fixture
def a_hopper_gpu():
    """With the version that was tried."""
    with (
        mock.patch.object(flash_check, "_version", return_value=flash_check.VERSION),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        yield


@pytest.mark.usefixtures("a_hopper_gpu")
@pytest.mark.parametrize("backward", [False, True])
def test_only_gradients_are_not_deterministic(backward: bool):
    with mock.patch.object(flash_check, "_worst_error", return_value=1.0) as check:
        assert flash_check.refusal(0, torch.bfloat16, 64, 64, True, backward) is None
        check.assert_called_with(0, torch.bfloat16, 64, 64, True, backward)
        torch.use_deterministic_algorithms(True)
        try:
            refused = flash_check.refusal(0, torch.bfloat16, 64, 64, True, backward)
        finally:
            torch.use_deterministic_algorithms(False)
    assert refused == ("its backward is not deterministic" if backward else None)


@pytest.mark.usefixtures("a_hopper_gpu")
@pytest.mark.parametrize(
    ("error", "words"),
    [(2.0, None), (2.1, "2.1 times"), (float("inf"), "inf times"), ("KeyError: x", "KeyError: x")],
)
def test_it_is_refused_where_it_is_off_and_the_log_says_why_once(
    error: float | str, words: str | None, caplog: pytest.LogCaptureFixture
):
    flash_check._log.cache_clear()
    with mock.patch.object(flash_check, "_worst_error", return_value=error), caplog.at_level(logging.INFO):
        said = [flash_check.refusal(0, torch.float16, 128, 128, False, True) for _ in range(2)]
    assert said[0] == said[1]
    assert len(caplog.records) == (words is not None)
    if words is None:
        assert said[0] is None
    else:
        assert said[0] is not None
        assert words in said[0]
        assert said[0] in caplog.text
        assert caplog.records[0].levelno == logging.WARNING


def test_that_it_is_not_installed_is_no_warning(caplog: pytest.LogCaptureFixture):
    flash_check._log.cache_clear()
    with mock.patch.object(flash_check, "_version", return_value=None), caplog.at_level(logging.INFO):
        assert flash_check.refusal(0, torch.float16, 128, 128, False, True) == "flash-attn-4 is not installed"
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_its_warning_of_each_kernel_does_not_reach_users():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_its_warning.__wrapped__()
        warnings.warn("Argument aux_data (position 19) cannot be converted to a JitArgument", UserWarning, stacklevel=1)
        warnings.warn("Argument of ours", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["Argument of ours"]
