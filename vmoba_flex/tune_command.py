"""The command tune; ``arguments`` has its options."""

import argparse
import sys

from vmoba_flex.compare_command import load_requested, mendable
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.compare import check_installed
from vmoba_flex.tuning import tune
from vmoba_flex.tuning.report import report, save


def run_tune(arguments: argparse.Namespace) -> str:
    """Finds settings, writes them and what was tried, and returns the report."""
    check_installed()
    base = None if arguments.config is None else VMoBAConfig.load(arguments.config)
    with mendable(arguments.output):
        prompts, call, pipe = load_requested(arguments)
        tuned = tune(
            pipe, prompts=prompts, seeds=arguments.seeds, fidelity=arguments.fidelity, speed_up=arguments.speed_up,
            base=base, call=call, folder=arguments.output / "denoises", progress=_say,
        )  # fmt: skip
        paths = save(tuned, arguments.output)
    return "\n".join([report(tuned), *(f"Written: {path}" for path in paths)])


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
