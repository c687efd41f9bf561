"""Results JSON -> Markdown beside it, the picture, and what docs/quality.md says of them.

python -m bench.quality.report bench/results/<gpu>_<date>_quality.json --plot docs/quality.png --page docs/quality.md
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean

from bench.quality.plot import draw
from bench.quality.results import Log, finished, last_loss, loss, step_ms, tokens
from bench.quality.runs import LONG, MAIN

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
"""Between these lines of a page the command writes its summary."""

_WITHIN = 0.01


class ReportError(Exception):
    """A file is missing or not what it should be; the message says what to do, in one line."""


def summary(data: Log) -> list[str]:
    """What was asked, and the answer, as a list in Markdown."""
    lines = []
    full, exact = finished(data, "full", MAIN), finished(data, "exact", MAIN)
    if full and exact:
        a, b = mean(map(last_loss, full)), mean(map(last_loss, exact))
        ends = [last_loss(log) for log in full]
        spread = f" Between seeds of full attention lie {100 * (max(ends) - min(ends)) / a:.1f} %." if ends[1:] else ""
        lines.append(
            f"- **At equal steps** ({tokens(data, MAIN):,} tokens, {full[0]['steps']:,} steps, mean of {len(full)} and "
            f"{len(exact)} seeds): held-out loss {b:.4f} with VMoBA exact, {a:.4f} with full attention: "
            f"{100 * (b / a - 1):+.1f} % (asked for: within 1 %: {_verdict(b <= (1 + _WITHIN) * a)}).{spread}"
        )
        x, y = mean(map(step_ms, full)), mean(map(step_ms, exact))
        lines.append(
            f"- **Time of a training step** there: {y:.1f} ms with VMoBA exact, {x:.1f} ms with full attention."
        )
    full, exact = finished(data, "full", LONG), finished(data, "exact", LONG)
    if full and exact:
        a, b = last_loss(full[0]), last_loss(exact[0])
        lines.append(
            f"- **At equal GPU time** ({tokens(data, LONG):,} tokens, {full[0]['seconds']:.0f} and "
            f"{exact[0]['seconds']:.0f} s): held-out loss {b:.4f} with VMoBA exact after {exact[0]['steps']:,} steps, "
            f"{a:.4f} with full attention after {full[0]['steps']:,}: {100 * (b / a - 1):+.1f} % (asked for: lower: "
            f"{_verdict(b < a)})."
        )
    return lines or ["- No pair of runs to compare has ended."]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def markdown(data: Log) -> str:
    """The whole report."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# Training quality: {machine['device']}, {machine['date']}",
        f"{machine['gpus']} GPU(s), {data['seconds']} s in all; {versions}. How it was done: docs/quality.md.",
        "\n".join(summary(data)),
        _runs(data),
        _levels(data),
        _swapped(data),
        _layers(data),
        *(_probe(log) for log in data["runs"] if "probe" in log),
        _unfinished(data),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A section with a table; nothing if it would be empty."""
    if not rows:
        return ""
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    return f"## {title}\n\n" + "\n".join(f"| {line} |" for line in lines)


def _runs(data: Log) -> str:
    rows = []
    for log in data["runs"]:
        if not log.get("held_out"):
            continue
        run, layers = log["run"], log.get("layers", [])
        rivals = [
            last_loss(other) for other in finished(data, "full", run["size"]) if other["run"]["seed"] == run["seed"]
        ]
        full = run["variant"] == "full"
        rows.append(
            [
                run["variant"],
                f"{tokens(data, run['size']):,}",
                f"{log['parameters'] / 1e6:.1f} M",
                str(run["seed"]),
                f"{log['step']:,}",
                f"{step_ms(log):.1f}",
                f"{log['seconds']:.0f}",
                f"{last_loss(log):.4f}",
                f"{100 * (last_loss(log) / rivals[0] - 1):+.1f} %" if rivals and not full else "",
                "1" if full else f"{mean(layer['density'] for layer in layers):.3f}" if layers else "",
                f"{log['gradient_error']['all']:.0e}" if "gradient_error" in log else "",
            ]
        )
    header = ["attention", "tokens", "parameters", "seed", "steps", "ms a step", "s of training", "held-out loss"]
    note = (
        "\n\nHeld-out loss: mean over clips and noise levels, of the averaged weights, with the attention of their "
        "training. Against full: the run with full attention of the same seed and size. Gradients off: relative "
        "difference, at the end, of gradients as trained with (compiled, in a CUDA graph) from those without either."
    )
    return _table("Runs", [*header, "against full", "density", "gradients off"], rows) + note * bool(rows)


def _levels(data: Log) -> str:
    rows = []
    for log in data["runs"]:
        for clip, levels in (log["held_out"][-1]["loss"] if log.get("held_out") else {}).items():
            rows.append([log["name"], clip, *(f"{each:.3f}" for each in levels)])
    return _table("Held-out loss by noise level", ["run", "clip", *(f"{level:g}" for level in data["levels"])], rows)


def _swapped(data: Log) -> str:
    rows = [
        [log["name"], f"{last_loss(log):.4f}", "exact" if log["run"]["variant"] == "full" else "full", f"{swapped:.4f}"]
        for log in data["runs"]
        if "swapped" in log
        for swapped in [loss(log["swapped"])]
    ]
    header = ["run", "loss with its own attention", "other attention", "loss with the other, without training"]
    return _table("The same weights under the other attention", header, rows)


def _layers(data: Log) -> str:
    rows = []
    for log in data["runs"]:
        if log["run"]["variant"] in ("full", "exact", "MoBA") and log["run"]["seed"] == 0:
            for index, layer in enumerate(log.get("layers", [])):
                shares = (f"{layer[name]:.3f}" for name in ("density", "tile_density", "recall"))
                rows.append([log["name"], str(index), layer["kind"], str(layer["blocks"]), *shares])
    header = ["run", "layer", "kind", "blocks", "density", "tile density", "recall"]
    note = "\n\nRuns with full attention are looked at as the paper's rule would have it."
    return _table("Layers", header, rows) + note * bool(rows)


def _probe(log: Log) -> str:
    header = ["layer", "kind", "density", "tiles: raster", "block", "sorted", "error: dense", "tiles", "packed"]
    timed = ["dense", "packed", "shared", "auto", "tiles"]
    rows = []
    for row in log["probe"]:
        cells = [str(row["layer"]), row["kind"], f"{row['density']:.3f}"]
        cells += [f"{row['tile_density'][order]:.3f}" for order in ("raster", "block", "sorted")]
        cells += [f"{error:.1e}" for error in row.get("relative_error", {}).values()]
        for name in timed:
            both = row.get("times", {}).get(name, {})
            cells.append(
                " / ".join(f"{both[mode]:.2f}" for mode in ("forward_ms", "forward_backward_ms") if mode in both)
            )
        rows.append(cells)
    return _table(
        f"The trained model's own query and key: {log['name']}, {log['probe'][0]['tokens']:,} tokens",
        [*header, *(f"{name}, ms" for name in timed)],
        rows,
    ) + (
        "\n\nTiles: share of 128 x 128 tiles with a pair in them, by the order of the tokens. Error: relative, against "
        "float64 on sampled rows; dense: of full attention, what rounding costs. Times: forward / forward + backward, "
        "called from Python."
    )


def _unfinished(data: Log) -> str:
    odd = [log for log in data["runs"] if log["status"] != "ok" or "error" in log or log.get("eager")]
    return "\n".join(
        ["## Not as planned", ""]
        + [
            f"- {log['name']}: {log['status']}"
            + ", not compiled" * log.get("eager", False)
            + f" {log.get('error', '')}"
            for log in odd
        ]
        if odd
        else []
    )


def write(source: Path, plot: Path | None, page: Path | None) -> None:
    """Reads results and writes what is asked for; each file whole or not at all.

    Raises:
        ReportError: if a file cannot be read or written.
    """
    try:
        data = json.loads(source.read_text())
        texts = {source.with_suffix(".md"): markdown(data)}
        if page:
            before, _, rest = page.read_text().partition(BEGIN)
            _, end, after = rest.partition(END)
            if not end:
                raise ReportError(f"{page} must have the lines {BEGIN} and {END}: put them where the summary goes")
            texts[page] = f"{before}{BEGIN}\n{page_text(data, source)}\n{END}{after}"
        if plot:
            draw(data, plot)
        for path, text in texts.items():
            draft = path.with_name(path.name + ".part")
            draft.write_text(text)
            os.replace(draft, path)
    except OSError as error:
        raise ReportError(f"cannot read or write {error.filename} ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{source} holds no results of bench.quality.run ({error!r}): give another file") from error


def page_text(data: Log, source: Path) -> str:
    """What a page says of results."""
    machine = data["machine"]
    return "\n".join(
        [
            f"{machine['gpus']} x {machine['device']}, torch {machine['versions']['torch']}, {machine['date']} "
            f"([all rows](../bench/results/{source.with_suffix('.md').name})):",
            "",
            *summary(data),
            "",
            _runs(data).partition("\n\n")[2],
        ]
    )


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what bench.quality.run wrote")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where the picture goes")
    parser.add_argument("--page", type=Path, metavar="MD", help="a page whose summary is renewed")
    args = parser.parse_args()
    try:
        write(args.results, args.plot, args.page)
    except ReportError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
