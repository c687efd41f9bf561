"""Results JSON -> Markdown next to it, and the picture.

python -m bench.quality.report bench/results/<gpu>_<date>_quality.json --plot docs/quality.png
"""

import argparse
import json
import sys
from pathlib import Path

from bench.common.report import table, write_whole
from bench.quality import tables
from bench.quality.plot import draw
from bench.quality.results import Log

# Below the tables.
_NOTES = {
    "Runs": "Held-out loss: mean over clips and noise levels, of the averaged weights, with the attention of their "
    "training. Against full: the run with full attention of the same seed and size. Gradients off: relative "
    "difference, at the end, of gradients as trained with (compiled, in a CUDA graph) from those without either.",
    "Layers": "Means over heads and three noise levels. Runs with full attention are probed with the paper's rule.",
    "Tiles": "Share of 128 x 128 tiles with a pair in them, by the order of the tokens. Errors: relative, against "
    "float64, on sampled rows; dense is full attention and shows what rounding costs.",
    "Times": "Milliseconds forward / forward + backward, called from Python.",
}


class ReportError(Exception):
    """A file is missing or damaged; the message says what to do, in one line."""


def markdown(data: Log) -> str:
    """The whole report."""
    parts = [
        f"# Training quality: {data['machine']['device']}, {data['machine']['date']}",
        f"{tables.where(data)}; {data['seconds']} s in all; `{data['machine']['command']}`",
        "\n".join(tables.summary(data)),
    ]
    for title, (names, rows) in {
        "Runs": tables.runs(data),
        "Held-out loss by noise level": tables.levels(data),
        "The same weights under both attentions": tables.swapped(data),
        "Layers": tables.layers(data),
        "Tiles": tables.tiles(data),
        "Times": tables.times(data),
    }.items():
        if rows:
            parts += [f"## {title}", "\n".join(table(names, rows)), _NOTES.get(title, "")]
    parts += ["## Not as planned", "\n".join(odd)] if (odd := unfinished(data)) else []
    return "\n\n".join(part for part in parts if part) + "\n"


def unfinished(data: Log) -> list[str]:
    """Runs that did not go as planned, as a list in Markdown."""
    lines = []
    for log in data["runs"]:
        what = {"ok": [], "trained": ["the probe of its query and key was cut off"]}.get(log["status"], [log["status"]])
        what += ["not compiled"] * log.get("eager", False)
        what += [log["error"]] if "error" in log else []
        lines += [f"- {log['name']}: {', '.join(what)}"] if what else []
    return lines


def write(source: Path, plot: Path | None) -> None:
    """Reads results and writes the report next to them, and the picture; each whole or not at all.

    Raises:
        ReportError: if a file cannot be read or written.
    """
    try:
        data = json.loads(source.read_text())
        text = markdown(data)
        if plot:
            draw(data, plot)
        write_whole(source.with_suffix(".md"), text)
    except OSError as error:
        raise ReportError(f"cannot read or write {error.filename} ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{source} holds no results of bench.quality.run ({error!r}): give another file") from error


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what bench.quality.run wrote")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where the picture goes")
    args = parser.parse_args()
    try:
        write(args.results, args.plot)
    except ReportError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
