"""TopK and Threshold: what they keep, and the values that they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import rules
from vmoba_flex import BlockPartition, Threshold, TopK
from vmoba_flex.rules import Rule, check_rule_fits
from vmoba_flex.warmup import WarmedThreshold, rule_of_flat, warmed

FOUR = BlockPartition((4, 1, 1), (1, 1, 1))


@pytest.mark.parametrize(
    ("blocks", "k"), [(7, 2), (24, 6), (72, 18), (40, 10), (36, 9), (8, 2), (1, 1), (2, 1), (10, 3)]
)
def test_density_is_a_rounded_share_of_the_blocks(blocks, k):
    assert TopK(density=0.25).blocks_per_query(blocks) == k


def test_budgets_count_pairs():
    assert TopK(3, pool="head").max_pairs(pool_pairs=100 * 8, num_blocks=8) == 300
    assert TopK(3).max_pairs(pool_pairs=8, num_blocks=8) == 3
    assert Threshold(0.25, max_density=0.5).max_pairs(pool_pairs=5, num_blocks=5) == 3
    assert Threshold(0.25).max_pairs(pool_pairs=5, num_blocks=5) is None


@given(rules(12), st.booleans())
def test_the_flat_form_gives_the_rule_back(rule: Rule, warm: bool):
    if warm and isinstance(rule, Threshold):
        warm_rule = warmed(rule, 0.25)
        back = rule_of_flat(*warm_rule.flat)
        assert isinstance(back, WarmedThreshold)
        assert back.now is warm_rule.now and vars(back) == vars(warm_rule)
    else:
        assert rule_of_flat(*rule.flat) == rule


def test_rules_are_values():
    assert TopK(2) == TopK(2, pool="query") != TopK(2, pool="head")
    assert len({Threshold(0.25), Threshold(0.25, pool="head")}) == 1
    assert TopK(2, always=[3, 0, 3]) == TopK(2, always=(0, 3)) != TopK(2)
    assert repr(warmed(Threshold(0.2, always=(1,)), 0.5)) == repr(Threshold(0.6, always=(1,)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(), ValueError, "exactly one of k and density must be given, got k=None, density=None"),
        (lambda: TopK(2, density=0.5), ValueError, "exactly one of k and density must be given, got k=2, density=0.5"),
        (lambda: TopK(0), ValueError, "k must lie in 1..num_blocks, got 0"),
        (lambda: TopK(2.0), TypeError, "k must be an int, got 2.0"),
        (lambda: TopK(True), TypeError, "k must be an int, got True"),
        (lambda: TopK(5).blocks_per_query(4), ValueError, "k must lie in 1..num_blocks = 1..4, got 5"),
        (lambda: TopK(density=0.0), ValueError, r"density must lie in \(0, 1\], got 0.0"),
        (lambda: TopK(density=1.01), ValueError, r"density must lie in \(0, 1\], got 1.01"),
        (lambda: TopK(density=float("nan")), ValueError, r"density must lie in \(0, 1\], got nan"),
        (lambda: TopK(density="0.5"), TypeError, "density must be a number, got '0.5'"),
        (lambda: TopK(2, pool="block"), ValueError, "pool must be 'query', 'head' or 'global' for TopK, got 'block'"),
        (lambda: TopK(2, pool="row"), ValueError, "pool must be one of .* got 'row'"),
        (lambda: TopK(2, gate="exakt"), ValueError, "gate must be one of .* got 'exakt'"),
        (lambda: Threshold(0.5, gate=None), ValueError, "gate must be one of .* got None"),
        (lambda: TopK(2, always=5), TypeError, r"always must be a tuple of ints, got 5: one id is \(5,\)"),
        (lambda: TopK(2, always="05"), TypeError, "always must be a tuple of ints, got '05'"),
        (lambda: TopK(2, always=(0, 1.0)), TypeError, r"always must hold ints, got \(0, 1.0\)"),
        (lambda: Threshold(0.5, always=[True]), TypeError, r"always must hold ints, got \[True\]"),
        (lambda: Threshold(0.5, always=(3, -1)), ValueError, r"always must be at least 0 everywhere, got \(3, -1\)"),
        (
            lambda: check_rule_fits(Threshold(0.5, always=(4, 1)), FOUR),
            ValueError,
            r"always must lie in 0..num_blocks - 1 = 0..3",
        ),
        (lambda: check_rule_fits(TopK(5), FOUR), ValueError, "k must lie in 1..num_blocks = 1..4, got 5"),
        (lambda: Threshold(0), ValueError, r"tau must lie in \(0, 1\], got 0"),
        (lambda: Threshold(1.5), ValueError, r"tau must lie in \(0, 1\], got 1.5"),
        (lambda: Threshold(None), TypeError, "tau must be a number, got None"),
        (lambda: Threshold(0.5, max_density=0), ValueError, r"max_density must lie in \(0, 1\], got 0"),
        (lambda: Threshold(0.5, pool=["head"]), ValueError, "pool must be one of"),
        (
            lambda: Threshold(0.5, normalize="sum"),
            ValueError,
            r"normalize must be one of .* got 'sum'",
        ),
    ],
)
def test_bad_values(make, error, message):
    with pytest.raises(error, match=message):
        make()
