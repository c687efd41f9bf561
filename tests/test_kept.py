"""What follows from a partition alone is made once on a GPU, which is made believe here."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vmoba_flex.kept import _MOST, kept

GPU = torch.device("cuda", 0)


class Machine(SimpleNamespace):
    """What is asked of torch.cuda."""

    stream = 1
    capturing = False


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    with mock.patch.multiple(
        "torch.cuda",
        device=lambda device: contextlib.nullcontext(),
        current_device=lambda: 0,
        current_stream=lambda: SimpleNamespace(cuda_stream=machine.stream),
        is_current_stream_capturing=lambda: machine.capturing,
    ):
        yield machine


@kept
def count(first: int, device: torch.device, step: int = 1) -> torch.Tensor:
    return torch.arange(0, first, step)


def test_made_once_for_the_same_arguments_and_stream(machine: Machine):
    made = count(5, GPU)
    assert count(5, GPU) is made
    assert count(6, GPU) is not made
    assert torch.equal(count(5, GPU, 2), torch.tensor([0, 2, 4]))
    machine.stream = 2
    assert count(5, GPU) is not made
    machine.stream = 1
    assert count(5, GPU) is made


def test_made_anew_where_it_must_not_outlive_its_call(machine: Machine):
    made = count(7, GPU)
    machine.capturing = True
    assert count(7, GPU) is not made
    assert count(8, GPU) is not count(8, GPU)
    machine.capturing = False
    with FakeTensorMode():
        assert count(7, GPU) is not made
    assert count(7, GPU) is made
    assert count(7, torch.device("cpu")) is not count(7, torch.device("cpu"))


def test_fit_for_gradients_whatever_mode_it_was_made_in(machine: Machine):
    with torch.inference_mode():
        made = count(9, GPU)
    assert not made.is_inference()


def test_the_oldest_goes_first(machine: Machine):
    first = count(1000, GPU)
    for n in range(1001, 1000 + _MOST):
        count(n, GPU)
    assert count(1000, GPU) is first
    count(1000 + _MOST, GPU)
    assert count(1000, GPU) is not first
