"""The whole demo, from video file to table and picture."""

from pathlib import Path

import torch

from vmoba_flex import Threshold, TopK
from vmoba_flex.demo.clip import BUNNY, read_clip
from vmoba_flex.demo.model import PATCH, VideoProjection
from vmoba_flex.demo.picture import Story, draw
from vmoba_flex.demo.run import LayerResult, attention_of, check_toolchain, layer_kinds, run_layers, sdpa_seconds
from vmoba_flex.user_error import UserError, check_extra, new_file

HEAD = 1
"""The head that the picture shows."""

BUNNY_FACE = (0.44, 0.53, 0.39)
"""Where the query lies in the clip that ships, as shares of time, height and width."""

BUNNY_CREDIT = "Clip: Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0."


def show(
    output: Path,
    *,
    video: Path | None = None,
    grid: tuple[int, int, int] = (8, 18, 32),
    rule: Threshold | TopK | None = None,
    token: tuple[int, int, int] | None = None,
) -> str:
    """Run the demo: show progress, write the picture, return the report.

    Args:
        output: the PNG to write; it appears whole or not at all.
        video: any video file; the clip that ships if None.
        grid: latent video size (frames, height, width) in tokens of 4 frames x 16 x 16 pixels.
        rule: how blocks are chosen; the paper's training rule if None.
        token: the query that the picture follows, (t, y, x); the bunny's face, or the middle of other videos, if None.

    Returns:
        Text: a table with a line per layer kind, and how to read it.

    Raises:
        UserError: something is missing, or cannot be read or written.
    """
    check_extra("demo", "av", "matplotlib", "tqdm")
    check_toolchain()
    if token is None:
        shares = (0.5, 0.5, 0.5) if video else BUNNY_FACE
        t, y, x = (int(share * size) for share, size in zip(shares, grid, strict=True))
        token = (t, y, x)
    if any(not 0 <= place < size for place, size in zip(token, grid, strict=True)):
        raise UserError(f"the query {token} lies outside the grid {grid}: each number must be below the grid's")
    with new_file(output, ".png", "the picture is a PNG") as path:
        results, sdpa = _run(path, video, grid, rule or Threshold(0.25), token)
    return "\n".join(
        (
            table(results),
            f"full: the same compiled FlexAttention, every tile run; scaled_dot_product_attention takes {sdpa:.3f} s.",
            "recall: of full attention with random projections of the pixels; a trained model's will differ.",
            "Times are of this CPU, the choice of blocks included; they say little about speed on a GPU.",
            f"Picture: {output}",
        )
    )


def _run(
    path: Path, video: Path | None, grid: tuple[int, int, int], rule: Threshold | TopK, token: tuple[int, int, int]
) -> tuple[list[LayerResult], float]:
    from tqdm import tqdm

    kinds = layer_kinds(grid)
    # One step each to read, project, time torch's attention and draw, and three per layer kind.
    total, form = 4 + 3 * len(kinds), "{desc:<32}|{bar}| {n_fmt}/{total_fmt}, {elapsed}"
    with tqdm(total=total, bar_format=form, leave=False) as bar:
        # A step is counted when the next begins, so that the words always name what is going on.
        def step(words: str) -> None:
            bar.update(bar.desc != "")
            bar.set_description_str(words)

        step("read the clip")
        pixels = [patch * size for patch, size in zip(PATCH, grid, strict=True)]
        frames = read_clip(video or BUNNY, *pixels)
        step("project query, key, value")
        with torch.no_grad():
            query, key, value = VideoProjection()(frames)
        results = run_layers(query, key, value, kinds, rule, step)
        step("time torch's own attention")
        sdpa = sdpa_seconds(query, key, value)
        step("draw the picture")
        _, height, width = grid
        story = Story(
            frames=frames[PATCH[0] // 2 :: PATCH[0]],
            token=token,
            attention=attention_of(query, key, (token[0] * height + token[1]) * width + token[2], HEAD),
            head=HEAD,
            results=results[1:],
            rule=_in_words(rule),
            credit="" if video else BUNNY_CREDIT,
        )
        draw(story, path)
        step("done")
        bar.leave = True  # a bar that fails makes room for the error
    return results, sdpa


def _in_words(rule: Threshold | TopK) -> str:
    if isinstance(rule, Threshold):
        return f"in each head, until {100 * rule.tau:g} % of all similarity is covered"
    return f"{100 * rule.density:g} % of all blocks" if rule.density else f"{rule.k} blocks in all"


def table(results: list[LayerResult]) -> str:
    """The results as text, a line per layer kind."""
    lines = ["layer   blocks  density  tile density  recall  largest error      time"]
    for r in results:
        shares = f"{r.density:>9.3f}{r.tile_density:>14.3f}{r.recall:>8.3f}"
        lines.append(f"{r.kind:<6}{r.partition.num_blocks:>8}{shares}{r.error:>15.1e}{r.seconds:>8.3f} s")
    return "\n".join(lines)
