"""Reading the results of the runs."""

from statistics import mean
from typing import Any

Log = dict[str, Any]
"""The facts of a run, or of all runs."""


def measured(data: Log, size: str) -> dict[str, list[Log]]:
    """The runs of a size that have a held-out loss, by variant."""
    logs: dict[str, list[Log]] = {}
    for log in data["runs"]:
        if log["run"]["size"] == size and log.get("held_out"):
            logs.setdefault(log["run"]["variant"], []).append(log)
    return logs


def finished(data: Log, variant: str, size: str) -> list[Log]:
    """The runs of a variant that took all of their steps."""
    return [log for log in measured(data, size).get(variant, []) if log["status"] in ("ok", "trained")]


def loss(held_out: dict[str, list[float]]) -> float:
    """The mean of a held-out loss over clips and levels."""
    return mean(mean(levels) for levels in held_out.values())


def last_loss(log: Log) -> float:
    """The held-out loss at the end of a run."""
    return loss(log["held_out"][-1]["loss"])


def step_ms(log: Log) -> float:
    """Milliseconds of a training step after the first point of the curve; nan if the curve has one point."""
    first, last = log["curve"][0], log["curve"][-1]
    return 1e3 * (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else float("nan")


def tokens(data: Log, size: str) -> int:
    """Tokens of a video."""
    t, y, x = data["sizes"][size]["grid"]
    return t * y * x
