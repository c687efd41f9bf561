"""Fills the numbers of the README and the pages in from the files of results, so that they cannot drift.

    python -m bench.pages     # rewrites what stands between the marks

A mark names what goes there and the file in bench/results/ that it is taken from:

    <!-- results: dense h200_2026-11-24_attention -->...<!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from bench.attention import tables as attention
from bench.common.report import Row, table
from bench.distributed import tables as distributed
from bench.models import tables as models
from bench.quality import denoise_report
from bench.quality import tables as quality

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
_MARK = re.compile(r"(<!-- results: (\w+) ([\w.-]+) -->).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with the marks filled in.

    Raises:
        KeyError: if a mark names no part of ``_PARTS``.
        FileNotFoundError: if a mark names a file that is missing.
    """
    return _MARK.sub(_fill, page)


def _fill(mark: re.Match[str]) -> str:
    start, name, file, end = mark.groups()
    text = _PARTS[name](json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text()))
    if isinstance(text, list):
        text = "\n\n" + "\n".join(text) + "\n\n"
    return start + text + end


_PARTS: dict[str, Callable[[Row], str | list[str]]] = {
    "where": attention.where,
    "speed_ups": attention.speed_ups,
    "densities": attention.densities,
    "errors": attention.errors,
    "short": attention.short,
    "dense": attention.dense,
    "ours": attention.ours,
    "by_density": attention.by_density,
    "low_densities": attention.low,
    "by_tokens": attention.by_tokens,
    "paper": attention.paper,
    "smooth": attention.smooth,
    "models": models.wan,
    "large_models": models.others,
    "distributed": distributed.calls,
    "distributed_steps": distributed.steps,
    "training_where": quality.where,
    "training": quality.summary,
    "training_aims": quality.aims,
    "training_runs": lambda data: table(*quality.runs(data)),
    "training_swapped": lambda data: table(*quality.swapped(data)),
    "training_tiles": lambda data: table(*quality.tiles(data)),
    "training_times": lambda data: table(*quality.times(data)),
    "denoises": lambda data: table(*denoise_report.fidelity(data)),
    "denoises_fewer_pairs": lambda data: table(*denoise_report.fewer_pairs(data)),
    "denoises_chosen_by": lambda data: table(*denoise_report.chosen_by(data)),
    "denoises_tuned": lambda data: table(*denoise_report.tuned(data)),
    "conditioning": lambda data: table(*quality.conditioning(data)),
}


def main() -> None:
    """Rewrites the pages."""
    texts = {page: filled(page.read_text()) for page in PAGES}  # all before any is written
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
