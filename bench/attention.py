"""Times ours beside dense attention by others, on the same tensors; prints and saves the table, and draws it.

    python bench/attention.py --output bench/results/<gpu>_<date>_attention.json --plot docs/speed.png

Each row is one attention on one shape. Its output is checked before it is timed (checks.py), then forward and
forward + backward are timed and their memory is taken (timing.py). The most urgent rows come first, over all sections:

    main     55,296 tokens, 12 heads: all peers, all dispatches and backends, 8 slabs, 48 windows and 72 cubes
    density  packed at densities 0.05 to 0.5
    tokens   2K to 110K tokens at one density
    paper    the paper's four shapes, 12 and 40 heads, 1D, 2D and 3D
    stages   what each stage of packed takes (stages.py)
    auto     what "auto" takes beside the dispatches that it chooses from, on inputs whose neighbours agree, too

A row that fails is recorded with its error, and the others go on. The file is rewritten after each row; `--budget-s`
stops starting rows, and `--add` keeps the good rows of a file, if the code is still the same, and measures the others:
those that failed or were not run, and peers that were not installed. FlashAttention-4 and xformers do not go into one
environment: run again in the other one with `--sections main --peers xformers --add`.
The rows are measured by a second process, so that one that dies or hangs costs its row alone.

    python bench/attention.py --output x.json --device cpu --small     # tries all of it out in seconds, without a GPU
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from report import DEVICE_LOST, Report

SECTIONS = ("main", "density", "tokens", "paper", "stages", "auto")
PEERS = ("FlashAttention-4", "cuDNN", "FlexAttention", "FlashAttention-2", "memory-efficient", "xformers")


def main() -> int:
    """Runs the table; the exit status."""
    args = parse(sys.argv[1:])
    if args.worker:
        from worker import work  # the supervising process loads no torch

        return work(args)
    if not args.plot_only:
        Report.begin(args.output, args.add)
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        status = supervise(command, args.output, args.budget_s, args.row_limit_s)
        if status:
            return status
        print(f"table: {args.output.with_suffix('.md')}")
    if args.plot:
        from plot import draw  # matplotlib may be absent

        draw(args.output, args.plot)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the one to state beside the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the JSON file; the table is written beside it as .md")
    add("--sections", type=_list_of(SECTIONS), default=list(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    add("--peers", type=_list_of(PEERS), default=list(PEERS), help=f"some of {','.join(PEERS)}")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="tiny shapes in float32, to try the script out")
    add("--budget-s", type=float, default=float("inf"), help="start no more rows after this many seconds")
    add("--row-limit-s", type=float, default=240, help="give a row up after this many seconds (default 240)")
    add("--error-factor", type=float, help="times FlexAttention's error that an output may have")
    add("--add", action="store_true", help="keep the good rows of an existing file and measure the others")
    add("--plot", type=Path, help="draw the speed-ups into this file")
    add("--plot-only", action="store_true", help="draw from an existing file")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    options = [("--sections", args.sections, SECTIONS), ("--peers", args.peers, PEERS)]
    shown = [f"{name} {','.join(given)}" for name, given, default in options if given != list(default)]
    shown += ["--device cpu"] * (args.device == "cpu") + ["--small"] * args.small
    args.command = " ".join([f"python bench/attention.py --output bench/results/{args.output.name}", *shown])
    return args


def supervise(
    command: list[str], output: Path, budget_s: float, row_limit_s: float, kind: type[Report] = Report
) -> int:
    """Runs ``command`` until it ends well; a run that dies or hangs costs the row it was at. The exit status."""
    started = time.monotonic()
    while True:
        left = budget_s - (time.monotonic() - started)
        status = _watch(subprocess.Popen([*command, "--budget-s", str(left)]), output, row_limit_s)
        if status == 0:
            return 0
        reason = "the process " + (f"was stopped after {row_limit_s:g} s" if status is None else f"ended with {status}")
        if not output.exists() or not (kind.load(output).bury(reason) or status == DEVICE_LOST):
            return status or 1  # not at a row: starting again would not help
        print(f"{reason}; going on with the next row", file=sys.stderr)
        command = [*command, "--add"]


def _watch(process: subprocess.Popen[bytes], output: Path, row_limit_s: float) -> int | None:
    """The exit status; None if the file did not change for so long that the process was stopped."""
    began = time.time()
    try:
        while process.poll() is None:
            time.sleep(0.05)
            changed = os.path.getmtime(output) if output.exists() else began
            if time.time() - max(began, changed) > row_limit_s:
                return None
        return process.returncode
    finally:
        process.kill()
        process.wait()


def _list_of(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(choices)
        if unknown:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(choices)}, got {text!r}")
        return [name for name in choices if name in text.split(",")]

    return parse_list


if __name__ == "__main__":
    sys.exit(main())
