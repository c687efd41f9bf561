"""The end-to-end benchmark's results as the pages show them: tables in Markdown."""

from collections.abc import Iterable

from bench.common.report import Row, number, table

_FULL, _OURS = ("cuDNN", "FlashAttention-4"), ("exact", "shared")
_TAILED = tuple(f"{name}, density 0.125 + tail" for name in _OURS)


def wan(data: Row) -> list[str]:
    """The whole Wan 1.3B."""
    cases, lines = _cases(row for row in data["rows"] if row["model"] == "Wan 1.3B"), []
    names = _columns(cases)
    for (_, mode, tokens), rows in cases:
        memory = (number(rows.get(name, {}).get("peak_gb"), 1) for name in ("cuDNN", *_OURS))
        lines.append([mode, tokens, *_seconds(rows, names), " / ".join(memory)])
    return table(["Wan 1.3B", "tokens", *(f"{name} s" for name in names), "peak GB"], lines)


def others(data: Row) -> list[str]:
    """The other models, without memory: only a few of their layers were measured."""
    cases = _cases(row for row in data["rows"] if row["model"] != "Wan 1.3B")
    names = _columns(cases)
    lines = [[*case, *_seconds(rows, names)] for case, rows in cases]
    return table(["model", "mode", "tokens", *(f"{name} s" for name in names)], lines)


def _cases(rows: Iterable[Row]) -> list[tuple[tuple[str, str, str], dict[str, Row]]]:
    """Each model, mode and number of tokens that has a row of ours, with its good rows by attention."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["model"], row["mode"], row["tokens"]), {})[row["attention"]] = row
    ordered = sorted(found.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2]))
    return [((model, mode, f"{n:,}"), case) for (model, mode, n), case in ordered if not case.keys().isdisjoint(_OURS)]


def _columns(cases: list[tuple[tuple[str, str, str], dict[str, Row]]]) -> tuple[str, ...]:
    """The attentions to show: those with a tail where one was measured."""
    return (*_FULL, *_OURS, *(name for name in _TAILED if any(name in rows for _, rows in cases)))


def _seconds(rows: dict[str, Row], names: tuple[str, ...]) -> list[str]:
    """Seconds with each attention; for ours also the speed-up over each full attention."""
    ms = {name: row["ms"] for name, row in rows.items()}
    cells = {name: f"{time / 1000:.2f}" for name, time in ms.items()}
    for name in ms.keys() & {*_OURS, *_TAILED}:
        gains = ", ".join(f"{ms[full] / ms[name]:.2f}x" for full in _FULL if full in ms)
        cells[name] += f" ({gains})"
    return [cells.get(name, "") for name in names]
