"""A comparison -> its files: an MP4, a PNG, JSON, and a page that holds the MP4 and needs no network."""

from pathlib import Path

from vmoba_flex.fidelity.comparison import Comparison
from vmoba_flex.fidelity.movie import write_movie
from vmoba_flex.fidelity.page import page
from vmoba_flex.fidelity.picture import draw
from vmoba_flex.fidelity.progress import Progress
from vmoba_flex.user_error import new_file

MOVIE, PICTURE, RESULTS, PAGE = "videos.mp4", "frames.png", "results.json", "index.html"


def write_report(found: Comparison, folder: Path, fps: int, bar: Progress) -> None:
    """Writes the files into a folder that exists; each appears whole or not at all.

    Raises:
        UserError: if one cannot be written.
    """
    pairs = found.pairs()
    bar.begin("videos")
    with new_file(folder / MOVIE, ".mp4", "this is an MP4") as draft:
        layout = write_movie(pairs, draft, fps, bar.step)
    bar.begin("picture")
    with new_file(folder / PICTURE, ".png", "this is a PNG") as draft:
        draw(pairs, draft)
    with new_file(folder / RESULTS, ".json", "this is JSON") as draft:
        draft.write_text(found.to_json() + "\n")
    bar.begin("page")
    with new_file(folder / PAGE, ".html", "this is a page") as draft:
        draft.write_text(page(found, layout, (folder / MOVIE).read_bytes(), fps), encoding="utf-8")
