"""What the commands that measure row by row share: their options, and the process that watches the measuring one."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.common.report import DEVICE_LOST, Report

# Without this, FlashAttention-4 keeps no compiled kernels on disk, and each process compiles them again.
_FLASH_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"


def script_parser(description: str | None, row_limit_s: int, only: bool = True) -> argparse.ArgumentParser:
    """The options that all of these commands take.

    Args:
        description: of the command.
        row_limit_s: how long a row may take by default.
        only: whether rows can be chosen by words of their names.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the JSON file; the table is written next to it as .md")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="tiny shapes in float32, to try the command out")
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
    """Those of these options that tell what was measured, as they were given."""
    only = [f'--only "{words}"' for words in getattr(args, "only", [])]
    return only + ["--device cpu"] * (args.device == "cpu") + ["--small"] * args.small


def stated_command(module: str, output: str, options: list[str]) -> str:
    """The command to state with the results.

    Args:
        module: that ``python -m`` runs.
        output: name of the file of results.
        options: the other options.
    """
    return " ".join([f"python -m {module} --output bench/results/{output}", *options])


def worker_environment() -> dict[str, str]:
    """The environment for a process that measures: this one's, with a cache on disk for FlashAttention-4's kernels."""
    return {_FLASH_CACHE: "1"} | os.environ


def supervise(command: list[str], output: Path, budget_s: float, row_limit_s: float, kind: type[Report]) -> int:
    """Runs ``command`` until it ends well; a process that dies or hangs costs the row it was at.

    Args:
        command: measures the rows that ``output`` lacks; gets ``--budget-s``, and ``--add`` when it is started again.
        output: the file of results, which changes with each row.
        budget_s: seconds for all rows.
        row_limit_s: seconds for one row.
        kind: what reads ``output``.

    Returns:
        The exit status.
    """
    started = time.monotonic()
    while True:
        left = budget_s - (time.monotonic() - started)
        process = subprocess.Popen([*command, "--budget-s", str(left)], env=worker_environment())
        status = _watch(process, output, row_limit_s)
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
