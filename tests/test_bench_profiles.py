"""The benchmark of a call's stages, tried out on a CPU."""

import pytest

from bench.attention import profiles
from bench.attention.floors import Sizes, floors

# Only kernels have these steps; and a CPU does not attend in slots.
NOT_EAGER = {"packed": {"gather", "tail: words"}, "shared": profiles.CALL_STAGES.keys() - {"gate", "select"}}


def test_each_stage_with_a_floor_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profiles, "DENSITIES", (0.125,))
    monkeypatch.setattr(profiles, "WAYS", profiles.WAYS[:2])
    rows = profiles.measure("cpu", small=True)
    assert [row["call"] for row in rows] == ["forward", "backward"] * 4
    for row in rows:
        missing = {stage for stage, found in row["stages"].items() if found["ms"] is None}
        assert missing <= NOT_EAGER[row["dispatch"]], row["dispatch"]
        assert missing <= profiles.CALL_STAGES.keys()
        assert row["wall_ms"] > 0 and row["host_ms"] > 0 and row["busy_ms"] > 0
    facts = {"command": "command", "device": "device", "date": "date", "versions": {"torch": "2"}}
    text = profiles.markdown(facts, rows)
    assert text.count("\n## ") == 4  # each call with a tail
    assert "\n| packed, flash, 0.125, forward | yes |" in text


@pytest.mark.parametrize(("tile", "density"), [(1, 0.0625), (128, 0.125)])
def test_products_are_counted_once(tile: int, density: float):
    heads, tokens, cells, dim = 12, 55_296, 864, 128
    forward, backward = (floors(Sizes(heads, tokens, 72, cells, dim, 2, density, tile), way) for way in (False, True))
    assert forward["attention"].flop == pytest.approx(density * 4 * heads * tokens**2 * dim)
    assert backward["attention backward"].flop == pytest.approx(2.5 * forward["attention"].flop)
    assert forward["tail: merge"].flop == 4 * heads * tokens * cells * dim
    assert backward["tail: gradients"].flop == 14 * heads * tokens * cells * dim
    # Compute-bound: 0.29 TFLOP at 790 TFLOP/s.
    assert forward["tail: merge"].ms == pytest.approx(0.37, abs=0.01)
