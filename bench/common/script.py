"""A benchmark in one process: its options, and the JSON file and page that it writes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common.machine import run_facts
from bench.common.report import write_whole

Facts = dict[str, Any]
Rows = list[dict[str, Any]]


def output_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with ``--output``, ``--device`` and ``--small``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny inputs, to try it out")
    return parser


def facts_of(module: str, args: argparse.Namespace, options: str = "") -> Facts:
    """The facts of a run, with the command to state next to its results."""
    return run_facts(args.device, f"python -m {module}{options} --output bench/results/{args.output.name}")


def head(facts: Facts, unit: str = "; milliseconds") -> list[str]:
    """The first lines of a page: the command, and where and when it ran."""
    told = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [f"`{facts['command']}`", "", f"{facts['device']}, {told}, {facts['date']}{unit}", ""]


def write_results(output: Path, results: Facts, page: str) -> None:
    """Writes the JSON file and the page next to it."""
    write_whole(output, json.dumps(results, indent=1) + "\n")
    write_whole(output.with_suffix(".md"), page)


def run(
    module: str, description: str | None, measure: Callable[[str, bool], Rows], markdown: Callable[[Facts, Rows], str]
) -> None:
    """Measures, writes the JSON file and the page, and prints the page."""
    args = output_parser(description).parse_args()
    facts, rows = facts_of(module, args), measure(args.device, args.small)
    page = markdown(facts, rows)
    write_results(args.output, facts | {"rows": rows}, page)
    print(page)
