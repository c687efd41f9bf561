"""The file of results: rows by id, what follows from them, and the table for reading."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

Row = dict[str, Any]

FORMULAS = {
    "TFLOP/s": "forward: 4 * head_dim * (query, key) pairs attended, over all heads; forward + backward: 3.5 times "
    "that. For dense attention all pairs. Divided by the time.",
    "density": "chosen (query, block) pairs / (tokens * blocks), mean over heads",
    "speed-up": "time of the fastest dense peer on the same shape / time",
    "floor": "time / (density * time of the fastest dense peer on the same shape)",
    "memory": "most bytes allocated during forward + backward, without query, key, value, output and their four "
    "gradients; for forward, during it, without query, key, value and output",
    "error x": "||output - truth|| / ||truth|| over sampled rows / the same of dense FlexAttention on these rows",
    "gradients x": "the like for the gradients of one head, the worst of query, key and value",
}
# What is not measured again when a process goes on for one that died.
FINAL = ("ok", "wrong", "forward only", "unsupported", "failed", "out of memory")
MODES = ("forward", "forward_backward")
# The exit status of a process whose GPU no longer answers; another one can go on.
DEVICE_LOST = 75


class Report:
    """Results of one or several runs of the script; the file is whole after each ``save``."""

    formulas = FORMULAS

    def __init__(self, path: Path, data: dict[str, Any] | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = data or {"runs": [], "formulas": self.formulas, "rows": []}
        self.rows: dict[str, Row] = {row["id"]: row for row in self.data["rows"]}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a report."""
        return cls(path, json.loads(path.read_text()))

    @classmethod
    def begin(cls, path: Path, add: bool, only: Sequence[str] = ()) -> None:
        """Clears the way for a run: without the rows of the one before, or to measure again what went wrong in it.

        Args:
            path: of the file.
            add: whether to keep the rows that are there.
            only: rows asked for, as in ``is_wanted``; a failure among the others is kept.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if add:
            cls.load(path).reopen(only)
        else:
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Writes the file, and the table beside it; an interrupted write leaves the file before."""
        self.data["rows"] = list(self.rows.values())
        self.derive()
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), self.markdown())

    def reopen(self, only: Sequence[str]) -> None:
        """Lets a new run measure again what went wrong in the one before, of the rows asked for."""
        for row in self.rows.values():
            if row["status"] != "ok" and is_wanted(row["id"], only):
                row["status"] = "not run"
        self.save()

    def start_run(self, facts: Row) -> int:
        """The index of a run with these facts."""
        if facts not in self.data["runs"]:
            self.data["runs"].append(facts)
        self.save()
        return self.data["runs"].index(facts)

    def take(self, other: Self) -> None:
        """Takes over the rows that another report has measured."""
        for row in other.rows.values():
            if row["id"] not in self.rows or row["status"] not in ("not run", "running"):
                self.rows[row["id"]] = row | {"run": self.start_run(other.data["runs"][row["run"]])}

    def has(self, row_id: str) -> bool:
        """Whether a row need not be measured again."""
        return row_id in self.rows and self.rows[row_id]["status"] in FINAL

    def fill(
        self, rows: Iterable[tuple[Row, Callable[[Row], bool]]], deadline: float, line: Callable[[Row], str]
    ) -> int:
        """Measures rows one after another, and starts none past the deadline; the exit status.

        Args:
            rows: rows, and what measures each: it fills it in, and says whether the device still works.
            deadline: by ``time.monotonic``.
            line: a row for the terminal.
        """
        for row, measure in rows:
            self.rows[row["id"]] = row
            if time.monotonic() > deadline:
                row["status"] = "not run"
                continue
            self.save()
            usable = measure(row)
            self.save()
            print(line(row), flush=True)
            if not usable:
                return DEVICE_LOST
        self.save()
        return 0

    def bury(self, reason: str) -> bool:
        """Turns the row that a dead process left behind into a failed one; whether there was one."""
        running = [row for row in self.rows.values() if row["status"] == "running"]
        for row in running:
            row["status"], row["error"] = "failed", reason
        self.save()
        return bool(running)

    def fastest_backend(self, attention: str, tokens: int, heads: int) -> str:
        """The fastest backend of a dispatch on windows, by forward + backward where there is one; else "auto"."""
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

    def head(self) -> list[str]:
        """The lines above the tables: devices, versions, commands and formulas."""
        lines = []
        for index, run in enumerate(self.data["runs"]):
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            lines.append(f"Run {index}: {run['device']}, {run['date']}, {versions}. `{run['command']}`\n")
        return lines + [f"- {name}: {formula}" for name, formula in self.data["formulas"].items()]

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


def is_wanted(row_id: str, only: Sequence[str]) -> bool:
    """Whether a row is asked for: all words, split at commas, of one of ``only`` occur in its id, or there are none."""
    return not only or any(all(word in row_id for word in words.split(",")) for words in only)


def table(names: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of Markdown."""
    names = list(names)
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


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
        name + ", smooth" * (row["inputs"] == "smooth"),
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
    """One row for the terminal; stages below it."""
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


def write_whole(path: Path, text: str) -> None:
    """Writes a file; an interrupted write leaves the one before."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    os.replace(draft, path)


def number(value: float | None, digits: int) -> str:
    """Empty if it was not measured."""
    return "" if value is None else f"{value:.{digits}f}"
