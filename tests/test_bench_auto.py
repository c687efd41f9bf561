"""The benchmark of auto: what it counts as slower."""

from bench.attention import auto
from vmoba_flex.dispatch.machine import HOPPER, HOPPER_LAUNCH, scaled


def test_what_auto_takes_is_compared_with_the_better_one():
    row = {"heads": 12, "head_dim": 128, "asked": 0.125, "density": 0.125, "backward": False}
    short = row | {"tokens": 4096, "dense": 2e-3, "sparse": 1e-3}  # auto expects 3.5 ms of launches
    long = row | {"tokens": 55_296, "dense": 30e-3, "sparse": 10e-3}
    slow_host = scaled(HOPPER.dense_rate, 2 * HOPPER_LAUNCH)
    assert auto.slower([short, long], HOPPER) == [1.0, 0.0]
    assert auto.slower([short, long], slow_host, 2.0) == [0.0, 0.0]  # 2 ms of launches at least: equal
    never = scaled(1e20, HOPPER_LAUNCH)
    assert auto.slower([short, long], never) == [1.0, 2.0]


def test_the_page_says_the_worst():
    facts = {"command": "command", "device": "device", "date": "date"}
    row = {"heads": 12, "tokens": 4096, "asked": 0.125, "dense": 2e-3, "sparse": 1e-3, "backward": True}
    text = auto.markdown(facts, [row], {"an H200": [1.0]})
    assert "an H200: at most 100.0% slower" in text
    assert "| 12 | 4,096 | 0.125 | forward + backward | 2.00 | 1.00 | 100% |" in text
