"""What a whole denoise with an attention takes in a real model: the times of its steps, from results of bench.models.

A run has the study's steps. Dense ones take the fastest full attention's forward, sparse ones that of their dispatch
and tail at their density, interpolated between the densities that were measured.
"""

from collections.abc import Sequence
from itertools import pairwise

from bench.common.report import Row
from bench.models.report import FORWARD, NO_ATTENTION
from bench.quality.variants import DENSE_STEPS, Variant

MODEL, TOKENS = "Wan 1.3B", 75_600
_FIELDS = Variant._fields

RECORDING = 0.5
"""What recording adds to a dense step, as a share of its attention: one of its two products, once more."""


class Times:
    """Milliseconds of a forward of one model on one number of tokens.

    Args:
        data: results of bench.models.
        model: its name there.
        tokens: of the video.

    Raises:
        ValueError: if the results lack full attention or the forward without any.
    """

    def __init__(self, data: Row, model: str = MODEL, tokens: int = TOKENS) -> None:
        rows = [row for row in data["rows"] if (row["model"], row["tokens"], row["mode"]) == (model, tokens, FORWARD)]
        rows = [row for row in rows if row["status"] == "ok"]
        dense = [row["ms"] for row in rows if row["dense"]]
        none = [row["ms"] for row in rows if row["attention"] == NO_ATTENTION]
        if not dense or not none:
            raise ValueError(f"data must have forwards of {model} at {tokens} tokens with full attention and without")
        self.model, self.tokens, self.dense, self.rest = model, tokens, min(dense), min(none)
        self._points: dict[tuple[str, bool, bool], dict[float, float]] = {}
        for row in rows:
            if row.get("density", 1.0) < 1:
                dispatch = "shared" if row["dispatch"] == "shared" else "packed"
                kind = dispatch, bool(row.get("tail")), bool(row.get("remembered"))
                points = self._points.setdefault(kind, {})
                points[row["density"]] = min(row["ms"], points.get(row["density"], row["ms"]))

    def step_ms(self, variant: Variant, density: float) -> float | None:
        """Of a sparse step; None where too few densities were measured.

        Where the same with remembered choices was not measured, a step that chooses stands for it: it takes longer.
        """
        for remembers in dict.fromkeys((variant.remembers, False)):
            points = self._points.get((variant.dispatch, variant.tail, remembers))
            if points:
                return _between(sorted(points.items()), density)
        return None

    def speed_up(self, variant: Variant, asked: float, steps: int) -> float | None:
        """Of a whole run, over full attention in all steps; None where a step's time is not known."""
        total = 0.0
        for step in range(steps):
            if variant.is_dense(step):
                recorded = variant.remembers and step + 1 < steps and not variant.is_dense(step + 1)
                ms = self.dense + recorded * RECORDING * (self.dense - self.rest)
            else:
                ms = self.step_ms(variant, variant.density(asked, step, steps))
            if ms is None:
                return None
            total += ms
        return steps * self.dense / total


def variant_of(row: Row) -> Variant:
    """The variant of a row, also of results that state its name only."""
    if "dispatch" in row:
        return Variant(*(row[name] for name in _FIELDS))
    words = row["attention"].split(", ")
    return Variant("shared" if "shared" in words else "packed", "tail" in words, dense=DENSE_STEPS)


def _between(points: Sequence[tuple[float, float]], density: float) -> float | None:
    """The time at a density, on the line through the two measured ones around it, or next to it."""
    for (low, fast), (high, slow) in pairwise(points):
        if density <= high or high == points[-1][0]:
            return fast + (density - low) / (high - low) * (slow - fast)
    return points[0][1] if abs(points[0][0] - density) < 0.02 else None
