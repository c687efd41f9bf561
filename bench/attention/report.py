"""The file of results of the attention benchmark, what follows from its rows, and its table."""

from typing import Any

from bench.common.report import Report, Row, number, table

FORMULAS = {
    "TFLOP/s": "forward: 4 * head_dim * (query, key) pairs attended, over all heads; forward + backward: 3.5 times "
    "that. For dense attention all pairs. Divided by the time.",
    "density": "chosen (query, block) pairs / (tokens * blocks), mean over heads",
    "speed-up": "time of the fastest dense peer on the same shape / time",
    "floor": "time / (density * time of the fastest dense peer on the same shape)",
    "memory": "most bytes allocated during forward + backward, without query, key, value, output and their four "
    "gradients; for forward, during it, without query, key, value and output",
    "error x": "||output - truth|| / ||truth|| over sampled rows / the same of dense FlexAttention on these rows",
    "gradients x": "the same for the gradients of one head, the worst of query, key and value",
}
MODES = ("forward", "forward_backward")


class AttentionReport(Report):
    """Results of one or several runs of ``bench.attention.run``."""

    formulas = FORMULAS

    def fastest_backend(self, attention: str, tokens: int, heads: int) -> str:
        """The fastest backend of a dispatch on windows, by forward + backward where it was measured; else "auto"."""
        rows = [
            row
            for row in self.rows.values()
            if (row["attention"], row["tokens"], row["heads"], row["kind"]) == (attention, tokens, heads, "2D")
            if not row["compiled"] and "forward_ms" in row and row["status"] in ("ok", "forward only")
        ]
        rows = [row for row in rows if row["backend"] != "auto" and row["rule"] == rows[0]["rule"]]
        times = {row["backend"]: row.get("forward_backward_ms", 1e3 * row["forward_ms"]) for row in rows}
        return min(times, key=times.__getitem__, default="auto")

    def derive(self) -> None:
        """Adds to each row what follows from it and the others."""
        derive(self.data["rows"])

    def markdown(self) -> str:
        """The table."""
        lines = self.head()
        rows = [row for row in self.data["rows"] if "stages" not in row]
        for section in dict.fromkeys(name for row in rows for name in row["sections"]):
            chosen = (cells(row) for row in rows if section in row["sections"])
            lines += ["", f"## {section}", "", *table([name for name, _ in _COLUMNS], chosen)]
        for row in self.data["rows"]:
            if row.get("stages"):
                lines += ["", f"## {row['id']}", "", *(f"- {text}" for text in _stages(row))]
        return "\n".join(lines) + "\n"


def derive(rows: list[Row]) -> None:
    """Adds to each row what follows from its numbers and from the fastest dense peer on its shape."""
    fastest: dict[tuple[Any, ...], tuple[float, str]] = {}
    for row in rows:
        if not row["blocks"]:
            for mode in MODES:
                if f"{mode}_ms" in row:
                    key = row["tokens"], row["heads"], mode
                    candidate = row[f"{mode}_ms"], row["attention"]
                    fastest[key] = min(fastest.get(key, candidate), candidate)
    flex = {row["heads"]: row for row in rows if row["attention"] == "FlexAttention" and row.get("gradient_errors")}
    for row in rows:
        if row.get("gradient_errors") and row["heads"] in flex:
            pairs = zip(row["gradient_errors"], flex[row["heads"]]["gradient_errors"], strict=True)
            row["gradient_ratio"] = max(error / budget for error, budget in pairs)
        for mode, factor in zip(MODES, (1.0, 3.5), strict=True):
            time, pairs = row.get(f"{mode}_ms"), row.get("key_pairs")
            if not time:
                continue
            if pairs:
                row[f"{mode}_tflops"] = factor * 4 * row["head_dim"] * pairs / time / 1e9
            dense = fastest.get((row["tokens"], row["heads"], mode))
            if dense:
                row[f"{mode}_fastest_dense"] = dense[1]
                row[f"{mode}_speed_up"] = dense[0] / time
                if row["blocks"] and row.get("density"):
                    row[f"{mode}_times_floor"] = time / (row["density"] * dense[0])


_COLUMNS = (
    ("attention", 28),
    ("tokens x heads", 12),
    ("blocks", 6),
    ("rule", 20),
    ("density", 7),
    ("forward ms", 8),
    ("TFLOP/s", 7),
    ("speed-up", 8),
    ("x floor", 7),
    ("GB", 5),
    ("forward + backward ms", 8),
    ("TFLOP/s", 7),
    ("speed-up", 8),
    ("x floor", 7),
    ("GB", 5),
    ("error x", 7),
    ("gradients x", 7),
    ("status", 0),
)
_SHORT = {"forward ms": "fwd ms", "forward + backward ms": "f+b ms", "gradients x": "grads x"}
HEADER = " ".join(f"{_SHORT.get(name, name)[: width or None]:<{width}}" for name, width in _COLUMNS)


def cells(row: Row) -> list[str]:
    """One row of the table."""
    name = row["attention"] + f"/{row['backend']}" * bool(row["backend"]) + ", compiled" * row["compiled"]
    rule = row["rule"].replace("Threshold(tau=", "Thr(").replace("max_density=", "max ").replace("pool='head', ", "")
    for noise in ("k=None, ", ", density=None", ", pool='query'"):
        rule = rule.replace(noise, "")
    result = [
        name + ", smooth" * (row["inputs"] == "smooth") + ", tail" * bool(row.get("tail")),
        f"{row['tokens']} x {row['heads']}",
        f"{row['kind']} {row['blocks']}" if row["blocks"] else "",
        rule,
        number(row.get("density"), 3),
    ]
    for mode in MODES:
        result += [
            number(row.get(f"{mode}_ms"), 2),
            number(row.get(f"{mode}_tflops"), 0),
            number(row.get(f"{mode}_speed_up"), 2),
            number(row.get(f"{mode}_times_floor"), 2),
            number(row.get(f"{mode}_extra_gb"), 2),
        ]
    result += [number(row.get("error_ratio"), 2), number(row.get("gradient_ratio"), 2)]
    status = row["status"] + (f" ({row['check']})" if "check" in row else "")
    return [*result, f"{status}: {row['error'][:80].replace('|', '/')}" if "error" in row else status]


def line(row: Row) -> str:
    """One row for the terminal, its stages below it."""
    padded = (f"{cell:<{width}}" for cell, (_, width) in zip(cells(row), _COLUMNS, strict=True))
    return "\n    ".join([f"{' '.join(padded)} [{row['wall_s']:.0f} s]", *_stages(row)])


def _stages(row: Row) -> list[str]:
    return [
        f"{mode}, {what}: {_times(times)}"
        for mode, stages in row.get("stages", {}).items()
        for what, times in stages.items()
        if times
    ]


def _times(times: Any) -> str:
    if isinstance(times, dict):
        return ", ".join(f"{name} {time:.2f}" for name, time in times.items() if time >= 0.005) + " ms"
    return ", ".join(f"{kernel['name'][:40]} {kernel['ms']:.2f} ms in {kernel['calls']}" for kernel in times)
