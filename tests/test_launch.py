"""``QuickLaunch`` with a stand-in for Triton: when a kernel's compiled form is taken again, and how it is launched."""

from typing import Any
from unittest import mock

import pytest
import torch

from block_masks.launching.launch import QuickLaunch


class Kernel:
    """Counts what is asked of it; ``compiled`` is what a launch returns, as Triton does."""

    arg_names = ("x", "count", "factor", "BLOCK", "FLAG")

    def __init__(self, interpreted: bool = False) -> None:
        self.launches, self.quick = 0, []
        self.compiled = None if interpreted else self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            if constants:
                self.launches += 1
                return self.compiled
            self.quick.append((grid, args))
            return None

        return launch


X = torch.zeros(64)
CONSTANTS = {"FLAG": True, "BLOCK": 16, "num_warps": 4}


def launch(quick: QuickLaunch, *args: Any, grid: tuple[int, ...] = (5,), **changed: Any) -> None:
    quick[grid](*args, **CONSTANTS | changed)


def test_the_compiled_form_is_found_once():
    kernel = Kernel()
    quick = QuickLaunch(kernel)
    launch(quick, X, 7, 0.5)
    launch(quick, torch.ones(3), 9, 2.5)
    launch(quick, X, 7, 0.5, grid=(2, 3))
    assert kernel.launches == 1
    # Constants stand in the kernel's order, options of Triton's are no arguments.
    assert [(grid, args[1:]) for grid, args in kernel.quick] == [
        ((5, 1, 1), (9, 2.5, 16, True)),
        ((2, 3, 1), (7, 0.5, 16, True)),
    ]


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        ((X.double(), 7, 0.5), {}),
        ((X[1:], 7, 0.5), {}),  # no longer a multiple of 16 bytes
        ((X, 1, 0.5), {}),
        ((X, 32, 0.5), {}),
        ((X, 2**31, 0.5), {}),
        ((X, 2**63, 0.5), {}),
        ((X, -(2**31) - 1, 0.5), {}),
        ((X, True, 0.5), {}),
        ((X, 7, 3), {}),
        ((X, 7, None), {}),
        ((X, 7, 0.5), {"BLOCK": 32}),
        ((X, 7, 0.5), {"num_warps": 8}),
    ],
)
def test_what_triton_compiles_anew_is_launched_by_triton(args, changed):
    kernel = Kernel()
    quick = QuickLaunch(kernel)
    launch(quick, X, 7, 0.5)
    launch(quick, *args, **changed)
    assert (kernel.launches, kernel.quick) == (2, [])


def test_tritons_interpreter_compiles_nothing():
    kernel = Kernel(interpreted=True)
    quick = QuickLaunch(kernel)
    for _ in range(3):
        launch(quick, X, 7, 0.5)
    assert (kernel.launches, kernel.quick) == (3, [])


@pytest.mark.parametrize(("amd", "launches"), [(True, 2), (False, 1)])
def test_a_buffer_of_two_gigabytes_takes_another_kernel_on_amd_only(amd: bool, launches: int):
    kernel = Kernel()
    quick = QuickLaunch(kernel)
    with mock.patch("block_masks.launching.launch._SEES_BUFFERS", amd):
        for size in (2**31 - 1, 2**31):
            launch(quick, torch.empty(size, dtype=torch.uint8, device="meta"), 7, 0.5)
    assert kernel.launches == launches
