"""Checks of single values, and that numbers of NumPy become plain ones where an object or a call takes them."""

import numpy as np
import pytest
import torch

from vmoba_flex import BlockPartition, Threshold, TopK, vmoba_attention, vmoba_selection
from vmoba_flex.attention import attend
from vmoba_flex.call import Call
from vmoba_flex.checks import (
    check_bool,
    check_choice,
    check_count,
    check_int,
    check_number,
    check_positive,
    check_share,
    check_sizes,
)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_int("n", True), TypeError, "n must be an int, got True"),
        (lambda: check_int("n", np.float64(1)), TypeError, r"n must be an int, got np\.float64\(1\.0\)"),
        (lambda: check_positive("n", False), TypeError, "n must be an int, got False"),
        (lambda: check_positive("n", 0), ValueError, "n must be at least 1, got 0"),
        (lambda: check_count("n", -1), ValueError, "n must be at least 0, got -1"),
        (lambda: check_count("n", 3, 3, "steps"), ValueError, r"n must lie in 0\.\.steps - 1 = 0\.\.2, got 3"),
        (lambda: check_sizes("n", 3), TypeError, "n must be a tuple of 3 ints, got 3"),
        (lambda: check_sizes("n", (1, True, 1)), TypeError, r"n must hold ints, got \(1, True, 1\)"),
        (lambda: check_sizes("n", (1, 1)), ValueError, r"n must have 3 sizes, got \(1, 1\)"),
        (lambda: check_sizes("n", [1, 0], 2), ValueError, r"n must be at least 1 everywhere, got \[1, 0\]"),
        (lambda: check_number("x", True), TypeError, "x must be a number, got True"),
        (lambda: check_number("x", "1", "a number or None"), TypeError, "x must be a number or None, got '1'"),
        (lambda: check_share("x", 0), ValueError, r"x must lie in \(0, 1\], got 0"),
        (lambda: check_share("x", float("nan")), ValueError, r"x must lie in \(0, 1\], got nan"),
        (lambda: check_bool("b", 1), TypeError, "b must be a bool, got 1"),
        (lambda: check_choice("c", "x", ("y", "z")), ValueError, r"c must be one of \('y', 'z'\), got 'x'"),
    ],
)
def test_bad_values(check, error, message):
    with pytest.raises(error, match=message):
        check()


def test_good_values_come_back_as_they_are():
    assert check_sizes("n", [1, 2], 2) == (1, 2)
    for value in (1, 0.5):
        assert check_share("x", value) is value


def test_numbers_of_numpy_become_plain_ones():
    share = np.float64(0.25)
    threshold = Threshold(share, max_density=share)
    for number in (threshold.tau, threshold.max_density, TopK(density=share).density, check_number("x", share)):
        assert type(number) is float and number == 0.25
    assert repr(threshold) == repr(Threshold(0.25, max_density=0.25))


PARTITION = BlockPartition.spatial((2, 6, 6), (3, 3))
TENSORS = torch.randn(3, 1, 2, PARTITION.num_tokens, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [lambda x: Threshold(x, max_density=x), lambda x: TopK(density=x)])
def test_rules_with_numbers_of_numpy_compile(make):
    """A ``float64`` of NumPy is a float to Python, but not to the ops of a graph."""

    def choose(rule: Threshold | TopK) -> torch.Tensor:
        return vmoba_selection(*TENSORS[:2], PARTITION, rule)

    torch.compiler.reset()
    compiled = torch.compile(choose, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(make(np.float64(0.5))), choose(make(0.5)))


def test_a_scale_of_numpy_becomes_a_plain_one():
    attended = attend(*TENSORS, Call(PARTITION, TopK(2), np.float64(0.3)), "tiles", "auto")
    assert type(attended.call.scale) is float
    assert torch.equal(attended.output, vmoba_attention(*TENSORS, PARTITION, TopK(2), scale=0.3, dispatch="tiles"))
