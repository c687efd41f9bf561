"""The file of results: rows by id, what follows from them, and the table."""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

Row = dict[str, Any]

# Statuses of rows that a process does not measure again when it takes over from one that died.
FINAL = ("ok", "wrong", "forward only", "unsupported", "failed", "out of memory")
# The exit status of a process whose GPU no longer answers; another process can go on.
DEVICE_LOST = 75


class Report(ABC):
    """Results of one or several runs of a command; the file is whole after each ``save``."""

    formulas: ClassVar[dict[str, str]]
    """What the columns mean, by name."""

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
        """Prepares the file for a run: removes it, or lets the run measure again what went wrong before.

        Args:
            path: of the file.
            add: whether to keep the file's rows.
            only: the rows asked for, as in ``is_wanted``; failures of others are kept.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if add:
            cls.load(path).reopen(only)
        else:
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Writes the file, and the table next to it; an interrupted write leaves the old file."""
        self.data["rows"] = list(self.rows.values())
        self.derive()
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), self.markdown())

    def reopen(self, only: Sequence[str]) -> None:
        """Lets a new run measure again those of the rows asked for that went wrong."""
        for row in self.rows.values():
            if row["status"] != "ok" and is_wanted(row["id"], only):
                row["status"] = "not run"
        self.save()

    def start_run(self, facts: Row) -> int:
        """Enters a run with these facts; returns its index."""
        if facts not in self.data["runs"]:
            self.data["runs"].append(facts)
        self.save()
        return self.data["runs"].index(facts)

    def take(self, other: Self) -> None:
        """Takes over the measured rows of another report."""
        for row in other.rows.values():
            if row["id"] not in self.rows or row["status"] not in ("not run", "running"):
                self.rows[row["id"]] = row | {"run": self.start_run(other.data["runs"][row["run"]])}

    def has(self, row_id: str) -> bool:
        """Whether a row need not be measured again."""
        return row_id in self.rows and self.rows[row_id]["status"] in FINAL

    def fill(
        self, rows: Iterable[tuple[Row, Callable[[Row], bool]]], deadline: float, line: Callable[[Row], str]
    ) -> int:
        """Measures rows one after another, and starts none past the deadline; returns the exit status.

        Args:
            rows: each row with what measures it: fills it in and returns whether the device still works.
            deadline: by ``time.monotonic``.
            line: makes the row's line for the terminal.
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
        """Marks the row that a dead process was at as failed; returns whether it was at one."""
        running = [row for row in self.rows.values() if row["status"] == "running"]
        for row in running:
            row["status"], row["error"] = "failed", reason
        self.save()
        return bool(running)

    @abstractmethod
    def derive(self) -> None:
        """Adds to each row what follows from it and the others."""

    @abstractmethod
    def markdown(self) -> str:
        """The tables."""

    def head(self) -> list[str]:
        """The lines above the tables: devices, versions, commands and formulas."""
        lines = []
        for index, run in enumerate(self.data["runs"]):
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            lines.append(f"Run {index}: {run['device']}, {run['date']}, {versions}. `{run['command']}`\n")
        return lines + [f"- {name}: {formula}" for name, formula in self.data["formulas"].items()]


def is_wanted(row_id: str, only: Sequence[str]) -> bool:
    """Whether a row is asked for: ``only`` is empty, or its id has all words, split at commas, of one of ``only``."""
    return not only or any(all(word in row_id for word in words.split(",")) for words in only)


def table(names: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    """A table as lines of Markdown."""
    names = list(names)
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def write_whole(path: Path, text: str) -> None:
    """Writes a file; an interrupted write leaves the old one."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    os.replace(draft, path)


def number(value: float | None, digits: int) -> str:
    """A number as text; empty if it was not measured."""
    return "" if value is None else f"{value:.{digits}f}"
