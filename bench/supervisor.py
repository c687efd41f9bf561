"""What scripts that measure row by row share: their command line, and the process that watches over the measuring."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from report import DEVICE_LOST, Report

# FlashAttention-4 keeps its compiled kernels on disk only where this is set, and each process compiles them otherwise.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def script_parser(description: str | None, row_limit_s: int, only: bool = True) -> argparse.ArgumentParser:
    """The options that all of them take.

    Args:
        description: of the script.
        row_limit_s: how long a row may take by default.
        only: whether rows can be chosen by words of their names.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the JSON file; the table is written beside it as .md")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="tiny shapes in float32, to try the script out")
    add("--budget-s", type=float, default=float("inf"), help="start no more rows after this many seconds")
    limit = f"give a row up after this many seconds (default {row_limit_s})"
    add("--row-limit-s", type=float, default=row_limit_s, help=limit)
    add("--add", action="store_true", help="keep the good rows of an existing file and measure the others")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    if only:
        words = "rows named by all of these, split at commas"
        add("--only", action="append", default=[], metavar="WORDS", help=words)
    return parser


def shown(args: argparse.Namespace) -> list[str]:
    """Of these options those that tell what was measured, as they were given."""
    only = [f'--only "{words}"' for words in getattr(args, "only", [])]
    return only + ["--device cpu"] * (args.device == "cpu") + ["--small"] * args.small


def stated_command(script: str, output: str, options: list[str]) -> str:
    """The command to state beside the results."""
    return " ".join([f"python bench/{script}.py --output bench/results/{output}", *options])


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
