"""Fills the numbers of the README and of the pages in from the files of results, so that they cannot drift.

    python bench/pages.py            # rewrites what stands between the marks

A mark names what goes there and the file in bench/results/ that it is taken from:

    <!-- results: dense h200_2026-11-24_attention -->...<!-- end -->
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from quality import tables
from report import MODES, Row, number, table

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
_MARK = re.compile(r"(<!-- results: (\w+) ([\w.-]+) -->).*?(<!-- end -->)", re.DOTALL)
_KINDS = {"1D": "slabs (1D)", "2D": "windows (2D)", "3D": "cubes (3D)"}
_DISPATCHES = ["packed", "shared", "tiles", "dense"]
_BACKENDS = {"flash": "FlashAttention-4", "triton": "Triton"}


def filled(page: str) -> str:
    """The page with what its marks name between them.

    Raises:
        KeyError: if a mark names what there is not.
        FileNotFoundError: if a mark names a file that there is not.
    """
    return _MARK.sub(_fill, page)


def _fill(mark: re.Match[str]) -> str:
    start, name, file, end = mark.groups()
    text = _PARTS[name](json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text()))
    if isinstance(text, list):
        text = "\n\n" + "\n".join(text) + "\n\n"
    return start + text + end


def _where(data: Row) -> str:
    run = data["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"one {run['device']}, {versions}, {run['date']}"


def _speed_ups(data: Row) -> str:
    return _range((row[f"{mode}_speed_up"] for row in _packed(data) for mode in MODES), 1)


def _densities(data: Row) -> str:
    return _range((row["density"] for row in _packed(data)), 2)


def _errors(data: Row) -> str:
    """Of all dispatches, over all shapes."""
    return _range((row["error_ratio"] for row in data["rows"] if row["blocks"] and "error_ratio" in row), 2)


def _range(values: Iterable[float], digits: int) -> str:
    values = list(values)
    return f"{number(min(values), digits)} to {number(max(values), digits)}"


def _short(data: Row) -> list[str]:
    dense = [row for row in _rows(data, "main") if row["attention"] in ("FlashAttention-4", "cuDNN")]
    sparse = [row for row in _packed(data) if row["backend"] == "flash"]
    lines = [[f"full attention, {row['attention']}", *_times(row)] for row in _by_time(dense)]
    lines += [[f"`packed`, {_blocks(row)}", *_times(row)] for row in _by_time(sparse)]
    return table(["attention", "forward", "forward + backward"], lines)


def _dense(data: Row) -> list[str]:
    rows = [row for row in _rows(data, "main") if not row["blocks"]]
    lines = [[row["attention"], *_times(row), _memory(row)] for row in _by_time(rows)]
    return table(["full attention", "forward ms", "forward + backward ms", "GB"], lines)


def _ours(data: Row) -> list[str]:
    rows = [row for row in _rows(data, "main") if _paper_rule(row) and row["backend"] in _BACKENDS]
    rows.sort(key=lambda row: (_DISPATCHES.index(row["attention"]), row["backend"], row["blocks"]))
    lines = [
        [f"`{row['attention']}`, {_BACKENDS[row['backend']]}", _blocks(row), *_density_and_times(row), _memory(row)]
        for row in rows
    ]
    return table(["dispatch, kernels", "blocks", "density", "forward ms", "forward + backward ms", "GB"], lines)


def _by_density(data: Row) -> list[str]:
    rows = [row for row in _rows(data, "density") if row["attention"] == "packed"]
    lines = [[*_density_and_times(row), _memory(row)] for row in sorted(rows, key=lambda row: row["density"])]
    return table(["density", "forward ms", "forward + backward ms", "GB"], lines)


def _by_tokens(data: Row) -> list[str]:
    rows = _rows(data, "tokens")
    names = ("FlashAttention-4", "cuDNN", "packed", "auto")
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        times = {row["attention"]: _plain_times(row) for row in rows if row["tokens"] == tokens}
        lines.append([f"{tokens:,}", *(times.get(name, "") for name in names)])
    return table(["tokens", "FlashAttention-4", "cuDNN", "`packed`, FlashAttention-4", "`auto`"], lines)


def _paper(data: Row) -> list[str]:
    rows = [row for row in _rows(data, "paper") if row["attention"] == "packed"]
    rows.sort(key=lambda row: (row["tokens"], row["heads"], row["blocks"]))
    lines = [
        [_shape(row), _blocks(row), _rule(row), *_density_and_times(row), _dense_times(row), _memory(row)]
        for row in rows
    ]
    names = [
        "grid, tokens x heads",
        "blocks",
        "rule",
        "density",
        "forward ms",
        "forward + backward ms",
        "dense ms",
        "GB",
    ]
    return table(names, lines)


def _smooth(data: Row) -> list[str]:
    tokens = _rows(data, "main")[0]["tokens"]
    rows = [row for row in _rows(data, "auto", inputs="smooth") if row["attention"] in ("packed", "tiles")]
    rows = sorted((row for row in rows if row["tokens"] == tokens), key=lambda row: (row["attention"], row["blocks"]))
    lines = [[f"`{row['attention']}`", _blocks(row), *_density_and_times(row)] for row in rows]
    return table(["dispatch", "blocks", "density", "forward ms", "forward + backward ms"], lines)


def _models(data: Row) -> list[str]:
    """Wan 1.3B, whole."""
    lines = []
    for (_, mode, tokens), rows in _cases(row for row in data["rows"] if row["model"] == "Wan 1.3B"):
        memory = (number(rows.get(name, {}).get("peak_gb"), 1) for name in ("cuDNN", *_OURS))
        lines.append([mode, tokens, *_seconds(rows), " / ".join(memory)])
    return table(["Wan 1.3B", "tokens", *_SECONDS, "peak GB"], lines)


def _large_models(data: Row) -> list[str]:
    """Without memory, which is that of the few layers measured."""
    cases = _cases(row for row in data["rows"] if row["model"] != "Wan 1.3B")
    lines = [[*case, *_seconds(rows)] for case, rows in cases]
    return table(["model", "mode", "tokens", *_SECONDS], lines)


_FULL, _OURS = ("cuDNN", "FlashAttention-4"), ("exact", "shared")
_SECONDS = [f"{name} s" for name in (*_FULL, *_OURS)]


def _cases(rows: Iterable[Row]) -> list[tuple[tuple[str, str, str], dict[str, Row]]]:
    """Each model, mode and number of tokens for which ours was measured, with its rows by attention."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["model"], row["mode"], row["tokens"]), {})[row["attention"]] = row
    ordered = sorted(found.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2]))
    return [((model, mode, f"{n:,}"), case) for (model, mode, n), case in ordered if not case.keys().isdisjoint(_OURS)]


def _seconds(rows: dict[str, Row]) -> list[str]:
    """Of each attention; of ours, how many times as fast as each full attention, too."""
    ms = {name: row["ms"] for name, row in rows.items()}
    cells = {name: f"{time / 1000:.2f}" for name, time in ms.items()}
    for name in ms.keys() & set(_OURS):
        gains = ", ".join(f"{ms[full] / ms[name]:.2f}x" for full in _FULL if full in ms)
        cells[name] += f" ({gains})"
    return [cells.get(name, "") for name in (*_FULL, *_OURS)]


def _distributed(data: Row) -> list[str]:
    lines = []
    for row in _over_gpus(data, steps=False):
        cells = [f"{row[f'{mode}_ms']:.1f} ({row[f'{mode}_speed_up']:.2f}x)" for mode in MODES]
        parts = [number(row.get(f"forward_backward_{name}_ms"), 1) for name in ("compute", "exchange", "predicted")]
        lines.append([f"`{row['attention']}`", f"{row['tokens']:,}", str(row["gpus"]), *cells, *parts])
    names = ["dispatch", "tokens", "GPUs", "forward ms", "forward + backward ms", "compute", "exchange", "predicted"]
    return table(names, lines)


def _distributed_steps(data: Row) -> list[str]:
    lines = [
        [f"`{row['attention']}`", f"{row['tokens']:,}", str(row["gpus"]), f"{row['forward_backward_ms'] / 1000:.2f}"]
        + [number(row.get(f"forward_backward_{name}"), 2) for name in ("speed_up", "over_dense")]
        for row in _over_gpus(data, steps=True)
    ]
    return table(["dispatch", "tokens", "GPUs", "s", "speed-up", "against full attention"], lines)


def _over_gpus(data: Row, steps: bool) -> list[Row]:
    """Whole training steps, or attention alone, over several GPUs."""
    rows = [row for row in data["rows"] if row["status"] == "ok" and bool(row["model"]) == steps]
    return sorted(rows, key=lambda row: (_DISPATCHES.index(row["attention"]), row["tokens"], row["gpus"]))


_PARTS: dict[str, Callable[[Row], str | list[str]]] = {
    "where": _where,
    "speed_ups": _speed_ups,
    "densities": _densities,
    "errors": _errors,
    "short": _short,
    "dense": _dense,
    "ours": _ours,
    "by_density": _by_density,
    "by_tokens": _by_tokens,
    "paper": _paper,
    "smooth": _smooth,
    "models": _models,
    "large_models": _large_models,
    "distributed": _distributed,
    "distributed_steps": _distributed_steps,
    "training_where": tables.where,
    "training": tables.summary,
    "training_aims": tables.aims,
    "training_runs": lambda data: table(*tables.runs(data)),
    "training_swapped": lambda data: table(*tables.swapped(data)),
    "training_tiles": lambda data: table(*tables.tiles(data)),
    "training_times": lambda data: table(*tables.times(data)),
    "conditioning": lambda data: table(*tables.conditioning(data)),
}


def _rows(data: Row, section: str, inputs: str = "random") -> list[Row]:
    """What was measured for a section, called from Python."""
    return [
        row
        for row in data["rows"]
        if section in row["sections"] and row["status"] == "ok" and not row["compiled"] and row["inputs"] == inputs
    ]


def _packed(data: Row) -> list[Row]:
    return [row for row in _rows(data, "main") if row["attention"] == "packed" and _paper_rule(row)]


def _paper_rule(row: Row) -> bool:
    return row["rule"].startswith("Threshold")


def _rule(row: Row) -> str:
    return "threshold" if _paper_rule(row) else row["rule"].partition(",")[0].replace("TopK(k=", "top ")


def _blocks(row: Row) -> str:
    return f"{row['blocks']} {_KINDS[row['kind']]}"


def _shape(row: Row) -> str:
    return f"{'x'.join(map(str, row['grid']))}, {row['tokens']:,} x {row['heads']}"


def _by_time(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["forward_ms"])


def _times(row: Row) -> list[str]:
    """Milliseconds of each mode; where blocks are chosen, how many times as fast as the fastest dense peer."""
    sparse = bool(row["blocks"])
    return [f"{row[f'{mode}_ms']:.1f}" + f" ({row[f'{mode}_speed_up']:.1f}x)" * sparse for mode in MODES]


def _density_and_times(row: Row) -> list[str]:
    return [number(row["density"], 3), *_times(row)]


def _plain_times(row: Row) -> str:
    return " / ".join(f"{row[f'{mode}_ms']:.{1 if row[f'{mode}_ms'] >= 10 else 2}f}" for mode in MODES)


def _dense_times(row: Row) -> str:
    """Of the fastest dense peer on the same shape, from what the row has of it."""
    return " / ".join(f"{row[f'{mode}_ms'] * row[f'{mode}_speed_up']:.1f}" for mode in MODES)


def _memory(row: Row) -> str:
    return number(max(row[f"{mode}_extra_gb"] for mode in MODES), 1)


def main() -> None:
    """Rewrites the pages."""
    texts = {page: filled(page.read_text()) for page in PAGES}  # all before any is written
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
