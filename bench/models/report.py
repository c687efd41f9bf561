"""The file of results of the benchmark of whole models, and its table."""

from typing import Any

from bench.common.report import Report, Row, number, table

# The modes.
CHECKPOINTED, PLAIN, FORWARD = "training step, checkpointing", "training step", "inference forward"
MODES = (CHECKPOINTED, PLAIN, FORWARD)
# The attention whose output is its values.
NO_ATTENTION = "none"
FORMULAS = {
    "weights": "random: times, memory and density say nothing about the quality of what a model generates",
    "ms": "median time of a step or a forward, batch 1, blocks compiled by compile_repeated_blocks. Where a few layers "
    "of a kind are measured, their time is multiplied by the model's layers of that kind / those, embedders included. "
    "HunyuanVideo goes without the refiner of its text",
    "training step": "forward, backward, fused AdamW on the weights as they are (bfloat16, a few small ones float32; "
    "its two moments alike); learning rate 0, so that all rows have the same weights",
    "speed-up": "time of the fastest dense attention on the same model, tokens and mode / time",
    "in attention": "1 - time of the same step with attention 'none', which returns its values / time",
    "density": "attended (query, block) pairs / (tokens * blocks), mean over samples, heads and layers; 1 where 'auto' "
    "took full attention",
    "peak, above": "most bytes allocated in a step; of them, what was not allocated before it: all but weights, "
    "optimizer state and inputs. Of the measured layers, not scaled",
    "dense error": "||output - stock|| / ||stock||, uncompiled, of the model switched to full attention; in brackets "
    "what it may be at most: twice the same of another dense backend, plus the dtype's epsilon",
    "sparse - dense": "||output - stock|| / ||stock||, uncompiled, of the model as it is timed",
    "compiled error": "||compiled - uncompiled|| / ||uncompiled||, same attention",
    "dense attention": "cuDNN is diffusers' own processors with attention backend '_native_cudnn'; FlashAttention-4 is "
    "an op in place of their call, since diffusers can only download it. Both run without masks of text "
    "padding: all text tokens are valid",
}


class ModelReport(Report):
    """Results of one or several runs of ``bench.models.run``."""

    formulas = FORMULAS

    def derive(self) -> None:
        """Adds speed-ups and the shares of the time in attention."""
        rows = [row for row in self.data["rows"] if "ms" in row]
        fastest: dict[tuple[Any, ...], tuple[float, str]] = {}
        for row in rows:
            if row["dense"]:
                candidate = row["ms"], row["attention"]
                fastest[_case(row)] = min(fastest.get(_case(row), candidate), candidate)
        rest = {_case(row): row["ms"] for row in rows if row["attention"] == NO_ATTENTION}
        for row in rows:
            dense, other = fastest.get(_case(row)), rest.get(_case(row))
            if row["attention"] == NO_ATTENTION:
                continue
            if dense:
                row["speed_up"], row["fastest_dense"] = dense[0] / row["ms"], dense[1]
            if other:
                row["attention_share"] = 1 - other / row["ms"]

    def markdown(self) -> str:
        """A table for each mode."""
        lines = self.head()
        for mode in MODES:
            rows = [row for row in self.data["rows"] if row["mode"] == mode]
            # Rows of one case stand together, whenever they were measured.
            cases = list(dict.fromkeys(_case(row) for row in rows))
            rows.sort(key=lambda row: cases.index(_case(row)))
            if rows:
                lines += ["", f"## {mode}", "", *table([name for name, _ in _COLUMNS], map(cells, rows))]
        return "\n".join(lines) + "\n"


def _case(row: Row) -> tuple[Any, ...]:
    return row["model"], row["tokens"], row["mode"]


_COLUMNS = (
    ("model", 34),
    ("tokens", 6),
    ("attention", 28),
    ("ms", 8),
    ("speed-up", 8),
    ("over", 16),
    ("in attention", 8),
    ("density", 7),
    ("peak GB", 7),
    ("above GB", 8),
    ("dense error", 19),
    ("sparse - dense", 8),
    ("compiled error", 8),
    ("run", 3),
    ("status", 0),
)
HEADER = " ".join(f"{name[: width or None]:<{width}}" for name, width in (("mode", 10), *_COLUMNS))
_SHORT_MODES = {CHECKPOINTED: "step, chk", FORWARD: "forward"}


def cells(row: Row) -> list[str]:
    """One row of a table."""
    layers = " + ".join(
        f"{part['layers']}" + f" for {part['of']}" * (part["of"] != part["layers"]) for part in row["parts"]
    )
    checks = [row.get(name) for name in ("dense_error", "dense_budget")]
    return [
        f"{row['model']}, {layers} layers",
        str(row["tokens"]),
        row["attention"],
        number(row.get("ms"), 1),
        number(row.get("speed_up"), 2),
        row.get("fastest_dense", ""),
        number(row.get("attention_share"), 2),
        number(row.get("density"), 3),
        number(row.get("peak_gb"), 1),
        number(row.get("extra_gb"), 1),
        "" if checks[0] is None else f"{checks[0]:.1e} ({checks[1]:.1e})",
        "" if row.get("difference") is None else f"{row['difference']:.1e}",
        "" if row.get("compiled_error") is None else f"{row['compiled_error']:.1e}",
        str(row["run"]),
        row["status"] + (f": {row['error'][:80].replace('|', '/')}" if "error" in row else ""),
    ]


def line(row: Row) -> str:
    """One row for the terminal."""
    padded = (f"{cell:<{width}}" for cell, (_, width) in zip(cells(row), _COLUMNS, strict=True))
    mode = _SHORT_MODES.get(row["mode"], "step")
    seconds = f"[{row['wall_s']:.0f} s, of which {row.get('warm_up_s', 0):.0f} to warm up]"
    return " ".join([f"{mode:<10}", *padded, seconds])
