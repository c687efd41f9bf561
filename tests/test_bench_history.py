"""The benchmark of one new chunk against a history, tried out on a CPU."""

from bench.attention import history


def test_a_small_run_times_each_length_and_checks_the_first():
    rows = history.measure("cpu", small=True)
    assert [row["keys"] for row in rows] == [512, 1024, 2048, 4096]
    assert all(row["ms"] > 0 and row["dense_ms"] > 0 for row in rows), rows
    assert rows[0]["error"] < 1e-5
    facts = {"command": "command", "device": "device", "date": "date", "versions": {"torch": "2"}}
    rows = [{"keys": 5000, "ms": 2.0, "dense_ms": 5.0, "error": 1e-6, "gigabytes": 3.0}, {"keys": 9, "failed": "no"}]
    text = history.markdown(facts, rows)
    assert "| 5,000 | 5.00 | 2.00 | 2.50 | 3.0 | 1.0e-06 |" in text and "| 9 |" in text
