"""Draws the pictures next to this file: python -m docs.pictures.draw.

Marks in docs/concepts.md are told apart by lightness and pattern only, and the same versions draw the same bytes. The
README's is a part of docs/demo.png that is readable in the width of a column.
"""

import sys
from pathlib import Path

import matplotlib as mpl
from PIL import Image

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
DEMO = Path(__file__).parent.parent / "demo.png"
CHOICE = (398, 898, 1094, 1640)  # left, top, right, bottom of what one query chooses, in pixels of DEMO


def main(folder: Path) -> None:
    """Writes all pictures to a folder."""
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 10, "svg.hashsalt": "vmoba_flex", "hatch.linewidth": 0.6})
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    Image.open(DEMO).crop(CHOICE).save(folder / "demo_choice.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
