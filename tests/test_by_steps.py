"""Which value holds at a step."""

import copy
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import by_steps
from vmoba_flex import BySteps


@given(by_steps(st.integers()), st.integers(1, 60), st.data())
@example(BySteps({0: 0, 0.07: 1}), 100, None)  # 0.07 * 100 is 7.000000000000001 in floats
def test_the_last_entry_that_has_started_holds(changes: BySteps[int], num_steps: int, data: st.DataObject | None):
    step = 7 if data is None else data.draw(st.integers(0, num_steps - 1))
    value = None
    for start, later in changes.pairs:
        if (step / num_steps if isinstance(start, float) else step) >= start:
            value = later
    assert changes.at(step, num_steps) == value
    for same in (copy.deepcopy(changes), pickle.loads(pickle.dumps(changes)), BySteps(changes.entries)):
        assert (same, hash(same), repr(same)) == (changes, hash(changes), repr(changes))


@pytest.mark.parametrize(("step", "num_steps"), [(-1, 4), (4, 4), (True, 4), (0.5, 4), (0, 0), (0, "4"), (0, 1.5)])
def test_steps_out_of_range_are_refused(step: Any, num_steps: Any):
    with pytest.raises((TypeError, ValueError), match=r"^(step|num_steps) must .*, got (-1|4|True|0.5|0|'4'|1.5)$"):
        BySteps({0: "a", 0.5: "b"}).at(step, num_steps)


def test_steps_need_no_total():
    changes = BySteps({0.0: "a", 2: "b"})
    assert [changes.at(step) for step in range(4)] == ["a", "a", "b", "b"]
    assert repr(changes) == "BySteps({0: 'a', 2: 'b'})"


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({}, ValueError, "entries of BySteps must have 0 as their first start, got {}"),
        ({1: "a"}, ValueError, "entries of BySteps must have 0 as their first start, got {1: 'a'}"),
        ({0: "a", 4: "b", 2: "c"}, ValueError, r"entries of BySteps must have steps that rise, .*, got \[0, 4, 2\]"),
        (
            {0: "a", 0.5: "b", 0.25: "c"},
            ValueError,
            r"entries .* must have .* shares that rise, got \[0.5, 0.25\]",
        ),
        ([(0, "a"), (0, "b")], ValueError, r"entries of BySteps must have steps that rise, .*, got \[0, 0\]"),
        (
            {0: "a", 1.0: "b"},
            ValueError,
            r"a start in entries .* must be .* a share in \[0, 1\) \(float\), got 1.0",
        ),
        ({0: "a", float("nan"): "b"}, ValueError, "a start in entries .* must be .*, got nan"),
        ({-1: "a"}, ValueError, "a start in entries .* must be .*, got -1"),
        (
            {0: "a", True: "b"},
            TypeError,
            r"a start in entries .* must be a step \(int\) or a share \(float\), got True",
        ),
        ({"0": "a"}, TypeError, "a start in entries .* must be a step .*, got '0'"),
        ("0a", TypeError, "entries of BySteps must be a mapping from start to value, got '0a'"),
        ([0, 1], TypeError, r"entries of BySteps must be a mapping from start to value, got \[0, 1\]"),
        (3, TypeError, "entries of BySteps must be a mapping from start to value, got 3"),
    ],
)
def test_bad_entries(entries: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        BySteps(entries)
