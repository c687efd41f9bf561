"""Draws the pictures of docs/concepts.md next to this file: python -m docs.pictures.draw.

Everything is told apart by lightness and pattern alone. The same versions draw the same bytes.
"""

import sys
from pathlib import Path

import matplotlib as mpl

from docs.pictures.choices import draw_pools, draw_threshold
from docs.pictures.cuts import draw_blocks, draw_order
from docs.pictures.runs import draw_packed, draw_tiles

PICTURES = {
    "blocks": draw_blocks,
    "order": draw_order,
    "pools": draw_pools,
    "threshold": draw_threshold,
    "tiles": draw_tiles,
    "packed": draw_packed,
}


def main(folder: Path) -> None:
    """Writes all pictures to a folder."""
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 10, "svg.hashsalt": "vmoba_flex", "hatch.linewidth": 0.6})
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
