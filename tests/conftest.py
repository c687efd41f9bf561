"""Hypothesis profiles, and the device that each test runs on."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.ranks import RankPool
from vmoba_flex.dispatch.machine import HOPPER

# What "auto" takes must not depend on what this machine has measured.
os.environ["VMOBA_FLEX_MACHINE"] = "built-in"

_SHARED = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors],
}
settings.register_profile("default", max_examples=40, **_SHARED)
settings.register_profile("ci", max_examples=40, derandomize=True, **_SHARED)
settings.register_profile("thorough", max_examples=1000, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure() -> None:
    """Spreads the workers of pytest-xdist over the GPUs of a machine."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and torch.cuda.is_available():
        torch.cuda.set_device(int(worker) % torch.cuda.device_count())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "targets" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("targets") is None]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword may be the name of a folder
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Four ranks on CPUs, for all tests that take some."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def flash_at_any_size() -> Iterator[None]:
    """FlashAttention-4 for small problems too, where ``backend="auto"`` prefers kernels with fewer launches."""
    with mock.patch("vmoba_flex.dispatch.machine._chosen", dataclasses.replace(HOPPER, flash_from=(1e-9, 1e-9))):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as each of the ranks has: more may cut a sum elsewhere, and so round it otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def heeds_sigint() -> Iterator[None]:
    """Undoes, for a test, what nohup or a shell that starts the tests in the background has them ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
