"""The file of results over several GPUs, its table, and what the model of the cost predicts."""

import math
from typing import Any

from bench.common.report import Report, Row, number, table
from bench.distributed.cost import MODES, Call, call_of, exchange_s, fit, predict_s

STEP = "step"
FORMULAS = {
    "ms": "median time of a call on the slowest rank, exchange included; a step is forward, backward with gradient "
    "checkpointing, the sum of gradients over ranks, and fused AdamW, of Wan 1.3B's shape, not compiled",
    "compute": "the same attention of as many heads as the busiest rank has, on tensors of its own",
    "exchange": "query, key, value and output; backward also their gradients; nothing overlaps it",
    "speed-up": "time of the same on one GPU / time",
    "against dense": "time of full attention on as many GPUs, under the same exchange / time",
    "per GPU": "4 * head_dim * (query, key) pairs attended, times 3.5 with backward, / time / GPUs, in TFLOP/s: it "
    "stays constant if GPUs grow with the work",
    "error": "||x - y|| / ||y|| of a rank's output and gradients, the worst of them, where y is one GPU's; for a step "
    "of the model's output",
    "predicted": "by bench/distributed/cost.py: rates from the rows on one GPU, the link from the largest exchange on "
    "the fewest others",
}
# Predicted in addition to what was measured: the paper's largest video, and up to a million tokens.
_TOKENS = (55_296, 110_592, 221_184, 1_048_576)
_GPUS = (1, 2, 4, 8, 16, 32, 64)


class DistributedReport(Report):
    """Results of one or several runs of ``bench.distributed.run``."""

    formulas = FORMULAS

    def derive(self) -> None:
        """Adds speed-ups, rates and predicted times."""
        done = [row for row in self.data["rows"] if row["status"] == "ok"]
        times = {_key(row): row for row in done}
        for row in done:
            for mode in _modes(row):
                single = times.get((row["attention"], row.get("tail", False), row["model"], row["tokens"], 1))
                dense = times.get(("dense", False, row["model"], row["tokens"], row["gpus"]))
                for name, other in (("speed_up", single), ("over_dense", dense)):
                    if other is not None:
                        row[f"{mode}_{name}"] = other[f"{mode}_ms"] / row[f"{mode}_ms"]
                if row["model"] == STEP:
                    continue
                pairs = row["density"] * row["tokens"] ** 2 * row["heads"] * (3.5 if mode == "forward_backward" else 1)
                row[f"{mode}_tflops_each"] = 4 * row["head_dim"] * pairs / row[f"{mode}_ms"] / 1e9 / row["gpus"]
        # The model of the cost knows no tail.
        calls = [row for row in done if row["model"] != STEP and not row.get("tail")]
        if not any(row["gpus"] == 1 for row in calls):
            return
        machine = fit(calls)
        for row in calls:
            for mode in MODES:
                if (row["attention"], mode) in machine.rates:
                    row[f"{mode}_predicted_ms"] = 1e3 * predict_s(call_of(row), row["gpus"], mode, machine)

    def markdown(self) -> str:
        """The measured rows, and the predicted ones."""
        lines = self.head()
        rows = self.data["rows"]
        lines += ["", "## Measured", "", *table([name for name, _ in _COLUMNS], map(cells, rows))]
        calls = [row for row in rows if row["status"] == "ok" and row["model"] != STEP and not row.get("tail")]
        if any(row["gpus"] == 1 for row in calls):
            lines += ["", "## Predicted", "", *_predictions(calls)]
        return "\n".join(lines) + "\n"


def _key(row: Row) -> tuple[Any, ...]:
    return row["attention"], row.get("tail", False), row["model"], row["tokens"], row["gpus"]


def _modes(row: Row) -> tuple[str, ...]:
    return tuple(mode for mode in MODES if f"{mode}_ms" in row)


def _predictions(rows: list[Row]) -> list[str]:
    machine = fit(rows)
    lines = [
        f"Link {machine.link / 1e9:.0f} GB/s measured; {machine.network / 1e9:.0f} GB/s between nodes of "
        f"{machine.node} assumed. Forward + backward in ms, of that the exchange in brackets.",
        "",
    ]
    largest = {row["attention"]: row for row in sorted(rows, key=lambda row: row["tokens"]) if row["gpus"] == 1}
    cases = []
    for attention, row in largest.items():
        for tokens in dict.fromkeys([row["tokens"], *_TOKENS]):
            call = Call(tokens, row["heads"], row["head_dim"], row["density"], attention, row["bytes_each"])
            times = []
            for gpus in _GPUS:
                total, exchange = (f(call, gpus, "forward_backward", machine) for f in (predict_s, exchange_s))
                times.append(f"{1e3 * total:.3g} ({1e3 * exchange:.2g})")
            cases.append([attention, str(tokens), f"{row['density']:.2f}", *times])
    return lines + table(["attention", "tokens", "density", *(f"{gpus} GPUs" for gpus in _GPUS)], cases)


_COLUMNS = (
    ("what", 10),
    ("tokens", 7),
    ("GPUs", 4),
    ("density", 7),
    ("forward ms", 8),
    ("compute", 8),
    ("exchange", 8),
    ("speed-up", 8),
    ("against dense", 8),
    ("predicted ms", 9),
    ("forward + backward ms", 8),
    ("compute", 8),
    ("exchange", 8),
    ("speed-up", 8),
    ("against dense", 8),
    ("predicted ms", 9),
    ("per GPU", 7),
    ("error", 8),
    ("status", 0),
)
_SHORT = {
    "forward ms": "fwd ms",
    "forward + backward ms": "f+b ms",
    "predicted ms": "pred ms",
    "against dense": "x dense",
}
HEADER = " ".join(f"{_SHORT.get(name, name)[: width or None]:<{width}}" for name, width in _COLUMNS)


def cells(row: Row) -> list[str]:
    """One row of the table."""
    what = f"step, {row['attention']}" if row["model"] == STEP else row["attention"] + ", tail" * row.get("tail", False)
    result = [what, str(row["tokens"]), str(row["gpus"]), number(row.get("density"), 3)]
    for mode in MODES:
        result += [
            number(row.get(f"{mode}_ms"), 2),
            number(row.get(f"{mode}_compute_ms"), 2),
            number(row.get(f"{mode}_exchange_ms"), 2),
            number(row.get(f"{mode}_speed_up"), 2),
            number(row.get(f"{mode}_over_dense"), 2),
            number(row.get(f"{mode}_predicted_ms"), 2),
        ]
    error = row.get("difference")
    shown = "" if error is None else "0" if error == 0 else f"{error:.1e}" if math.isfinite(error) else str(error)
    status = row["status"] + (f": {row['error'][:80].replace('|', '/')}" if "error" in row else "")
    return [*result, number(row.get("forward_backward_tflops_each"), 0), shown, status]


def line(row: Row) -> str:
    """One row for the terminal."""
    padded = (f"{cell:<{width}}" for cell, (_, width) in zip(cells(row), _COLUMNS, strict=True))
    return f"{' '.join(padded)} [{row['wall_s']:.0f} s]"
