"""The benchmark of kept selections, tried out on a CPU."""

from bench.attention import kept


def test_a_small_run_compares_each_call_with_itself():
    rows = kept.measure("cpu", small=True)
    assert len(rows) == 1 + 2 * len(kept.WAYS) * len(kept.DENSITIES)
    assert all(row["equal"] and row["rule_ms"] > 0 and row["plan_mb"] > 0 for row in rows[1:])
    facts = {"command": "command", "device": "device", "date": "date", "versions": {"torch": "2"}}
    text = kept.markdown(facts, rows)
    assert text.count("| yes |\n") == len(rows) - 1
    assert text.count("\n| 256 | packed |") == 8
