"""The results over several GPUs as the pages show them: tables in Markdown."""

from bench.common.report import Row, number, table
from bench.distributed.cost import MODES

_ATTENTIONS = ("packed", "shared", "dense")


def calls(data: Row) -> list[str]:
    """Attention on each number of tokens and GPUs."""
    lines = []
    for row in _over_gpus(data, steps=False):
        cells = [f"{row[f'{mode}_ms']:.1f} ({row[f'{mode}_speed_up']:.2f}x)" for mode in MODES]
        parts = [number(row.get(f"forward_backward_{name}_ms"), 1) for name in ("compute", "exchange", "predicted")]
        what = f"`{row['attention']}`" + ", density 0.125 + tail" * row.get("tail", False)
        lines.append([what, f"{row['tokens']:,}", str(row["gpus"]), *cells, *parts])
    names = ["dispatch", "tokens", "GPUs", "forward ms", "forward + backward ms", "compute", "exchange", "predicted"]
    return table(names, lines)


def steps(data: Row) -> list[str]:
    """A training step on each number of tokens and GPUs."""
    lines = [
        [f"`{row['attention']}`", f"{row['tokens']:,}", str(row["gpus"]), f"{row['forward_backward_ms'] / 1000:.2f}"]
        + [number(row.get(f"forward_backward_{name}"), 2) for name in ("speed_up", "over_dense")]
        for row in _over_gpus(data, steps=True)
    ]
    return table(["dispatch", "tokens", "GPUs", "s", "speed-up", "against full attention"], lines)


def _over_gpus(data: Row, steps: bool) -> list[Row]:
    """The good rows: training steps, or attention."""
    rows = [row for row in data["rows"] if row["status"] == "ok" and bool(row["model"]) == steps]
    return sorted(
        rows, key=lambda row: (_ATTENTIONS.index(row["attention"]), row.get("tail", False), row["tokens"], row["gpus"])
    )
