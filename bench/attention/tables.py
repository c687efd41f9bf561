"""The attention benchmark's results as the pages show them: numbers, and tables in Markdown."""

from collections.abc import Iterable

from bench.attention.report import MODES
from bench.common.report import Row, number, table

_KINDS = {"1D": "slabs (1D)", "2D": "windows (2D)", "3D": "cubes (3D)"}
_DISPATCHES = ["packed", "shared", "tiles", "dense"]
_BACKENDS = {"flash": "FlashAttention-4", "triton": "Triton"}


def where(data: Row) -> str:
    """The machine, its software and the date."""
    run = data["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"one {run['device']}, {versions}, {run['date']}"


def speed_ups(data: Row) -> str:
    """The range of ``packed``'s speed-ups over the fastest dense attention, in the main section."""
    return _range((row[f"{mode}_speed_up"] for row in _packed(data) for mode in MODES), 1)


def densities(data: Row) -> str:
    """The range of the densities of the same rows."""
    return _range((row["density"] for row in _packed(data)), 2)


def errors(data: Row) -> str:
    """The range of the error over FlexAttention's, over all dispatches and shapes."""
    return _range((row["error_ratio"] for row in data["rows"] if row["blocks"] and "error_ratio" in row), 2)


def _range(values: Iterable[float], digits: int) -> str:
    values = list(values)
    return f"{number(min(values), digits)} to {number(max(values), digits)}"


def short(data: Row) -> list[str]:
    """The fastest dense attentions, and ``packed`` on FlashAttention-4."""
    dense = [row for row in _rows(data, "main") if row["attention"] in ("FlashAttention-4", "cuDNN")]
    sparse = [row for row in _packed(data) if row["backend"] == "flash"]
    lines = [[f"full attention, {row['attention']}", *_times(row)] for row in _by_time(dense)]
    lines += [[f"`packed`, {_blocks(row)}", *_times(row)] for row in _by_time(sparse)]
    return table(["attention", "forward", "forward + backward"], lines)


def dense(data: Row) -> list[str]:
    """All dense attentions, the fastest first."""
    rows = [row for row in _rows(data, "main") if not row["blocks"]]
    lines = [[row["attention"], *_times(row), _memory(row)] for row in _by_time(rows)]
    return table(["full attention", "forward ms", "forward + backward ms", "GB"], lines)


def ours(data: Row) -> list[str]:
    """All dispatches and backends with the paper's rule."""
    rows = [row for row in _rows(data, "main") if _paper_rule(row) and row["backend"] in _BACKENDS]
    rows.sort(key=lambda row: (_DISPATCHES.index(row["attention"]), row["backend"], row["blocks"]))
    lines = [
        [f"`{row['attention']}`, {_BACKENDS[row['backend']]}", _blocks(row), *_density_and_times(row), _memory(row)]
        for row in rows
    ]
    return table(["dispatch, kernels", "blocks", "density", "forward ms", "forward + backward ms", "GB"], lines)


def by_density(data: Row) -> list[str]:
    """``packed`` at each density."""
    rows = [row for row in _rows(data, "density") if row["attention"] == "packed"]
    lines = [[*_density_and_times(row), _memory(row)] for row in sorted(rows, key=lambda row: row["density"])]
    return table(["density", "forward ms", "forward + backward ms", "GB"], lines)


def low(data: Row) -> list[str]:
    """``packed`` and ``shared`` at low densities, without and with a tail, and tiles by others."""
    cases: dict[tuple[str, str, float], dict[bool, Row]] = {}
    for row in _rows(data, "low"):
        if row["blocks"]:
            asked = float(row["rule"].partition("density=")[2].partition(",")[0])
            cases.setdefault((row["attention"], row["backend"], asked), {})[bool(row["tail"])] = row
    order = [*_DISPATCHES, *sorted({name for name, _, _ in cases} - {*_DISPATCHES})]
    lines = []
    for name, backend, asked in sorted(cases, key=lambda case: (case[2], order.index(case[0]), case[1])):
        rows = cases[name, backend, asked]
        what = f"`{name}`, {_BACKENDS.get(backend, backend)}" if backend else f"{name}, choice not timed"
        both = [_plain_times(rows[tail]) if tail in rows else "" for tail in (False, True)]
        lines.append([number(asked, 4), what, number(next(iter(rows.values()))["density"], 3), *both])
    return table(["density asked", "attention", "density", "forward / with backward ms", "with a tail ms"], lines)


def by_tokens(data: Row) -> list[str]:
    """Dense attention, ``packed`` and ``auto`` at each number of tokens."""
    rows = _rows(data, "tokens")
    names = ("FlashAttention-4", "cuDNN", "packed", "auto")
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        times = {row["attention"]: _plain_times(row) for row in rows if row["tokens"] == tokens}
        lines.append([f"{tokens:,}", *(times.get(name, "") for name in names)])
    return table(["tokens", "FlashAttention-4", "cuDNN", "`packed`, FlashAttention-4", "`auto`"], lines)


def paper(data: Row) -> list[str]:
    """``packed`` at the paper's sizes."""
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


def smooth(data: Row) -> list[str]:
    """``packed`` and ``tiles`` where neighbouring queries agree."""
    tokens = _rows(data, "main")[0]["tokens"]
    rows = [row for row in _rows(data, "auto", inputs="smooth") if row["attention"] in ("packed", "tiles")]
    rows = sorted((row for row in rows if row["tokens"] == tokens), key=lambda row: (row["attention"], row["blocks"]))
    lines = [[f"`{row['attention']}`", _blocks(row), *_density_and_times(row)] for row in rows]
    return table(["dispatch", "blocks", "density", "forward ms", "forward + backward ms"], lines)


def _rows(data: Row, section: str, inputs: str = "random") -> list[Row]:
    """A section's good rows, called from Python and not from a compiled graph."""
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
    """Milliseconds of each mode; for a sparse row also the speed-up over the fastest dense peer."""
    sparse = bool(row["blocks"])
    return [f"{row[f'{mode}_ms']:.1f}" + f" ({row[f'{mode}_speed_up']:.1f}x)" * sparse for mode in MODES]


def _density_and_times(row: Row) -> list[str]:
    return [number(row["density"], 3), *_times(row)]


def _plain_times(row: Row) -> str:
    return " / ".join(f"{row[f'{mode}_ms']:.{1 if row[f'{mode}_ms'] >= 10 else 2}f}" for mode in MODES)


def _dense_times(row: Row) -> str:
    """Milliseconds of the fastest dense peer on the same shape, from the row's own speed-up."""
    return " / ".join(f"{row[f'{mode}_ms'] * row[f'{mode}_speed_up']:.1f}" for mode in MODES)


def _memory(row: Row) -> str:
    return number(max(row[f"{mode}_extra_gb"] for mode in MODES), 1)
