"""The whole demo, from video file to table and picture."""

import argparse
import dataclasses
from pathlib import Path

import torch

from vmoba_flex import Threshold, TopK, VMoBAConfig
from vmoba_flex.demo import checkpoint
from vmoba_flex.demo.clip import BUNNY, read_clip
from vmoba_flex.demo.denoise import LEVEL, STEPS, add_noise, denoise, frames_of, psnr
from vmoba_flex.demo.model import Grid, VideoTransformer
from vmoba_flex.demo.picture import draw
from vmoba_flex.demo.run import (
    NAMES,
    LayerResult,
    PlainAttention,
    attention_of,
    check_toolchain,
    layer_inputs,
    run_layers,
    sdpa_seconds,
)
from vmoba_flex.demo.story import Story
from vmoba_flex.demo.tailed import TAILED, attention_with_tail
from vmoba_flex.user_error import UserError, check_extra, new_file

HEAD = 1
"""The head that the picture shows."""

BUNNY_FACE = (0.44, 0.53, 0.39)
"""The query in the clip that ships, as shares of time, height and width."""

BUNNY_CREDIT = "Clip: Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0."


def run_demo(arguments: argparse.Namespace) -> str:
    """The command ``demo``; ``arguments`` has its options."""
    try:
        rule = None if arguments.tau is None else Threshold(arguments.tau)
        if arguments.density is not None:
            rule = TopK(density=arguments.density)
    except ValueError as error:
        raise UserError(str(error)) from error
    return show(arguments.output, video=arguments.video, grid=arguments.grid, rule=rule, token=arguments.query)


def show(
    output: Path,
    *,
    video: Path | None = None,
    grid: Grid = (8, 18, 32),
    rule: Threshold | TopK | None = None,
    token: tuple[int, int, int] | None = None,
) -> str:
    """Run the demo: show progress, write the picture, return the report.

    Args:
        output: the PNG to write; it appears whole or not at all.
        video: any video file. If None, the clip that ships, whose first frames the model was not trained on.
        grid: latent video size (frames, height, width) in tokens of 4 frames x 8 x 8 pixels.
        rule: how blocks are chosen. If None, the rule that the model was trained with.
        token: the query that the picture follows, (t, y, x). If None, the bunny's face, or the middle of other videos.

    Returns:
        Text: how near the denoised videos are, a table with a line per layer, and how to read it.

    Raises:
        UserError: if something is missing, or cannot be read or written.
    """
    check_extra("demo", "av", "matplotlib", "safetensors", "tqdm")
    check_toolchain()
    if token is None:
        shares = (0.5, 0.5, 0.5) if video else BUNNY_FACE
        t, y, x = (int(share * size) for share, size in zip(shares, grid, strict=True))
        token = (t, y, x)
    if any(not 0 <= place < size for place, size in zip(token, grid, strict=True)):
        raise UserError(f"the query {token} lies outside the grid {grid}: each number must be below the grid's")
    model, config, training = checkpoint.load()
    if rule is not None:
        config = dataclasses.replace(config, rule=rule)
    with new_file(output, ".png", "the picture is a PNG") as path:
        story, results, sdpa = _run(path, model, config, video, grid, token)
    what = "the video" if video else "frames that it was not trained on"
    trained_on = "x".join(map(str, training["grid"]))
    return "\n".join(
        (
            f"A model trained with {training['attention']} attention ({training['steps']:,} steps on videos of "
            f"{trained_on} tokens, {training['device']}) denoises",
            f"{what}, from noise level {LEVEL:g} in {STEPS} steps:",
            *(f"  {line}" for line in _nearness(story)),
            "",
            table(results),
            f"full: the same compiled FlexAttention, every tile run; scaled_dot_product_attention takes {sdpa:.3f} s.",
            "recall: the share of full attention that falls on the chosen blocks, on the model's own query and key.",
            "overlap: the share of attention on the same keys as full attention's, with a tail in "
            f"{' and '.join(TAILED)} layers; the others have none.",
            "Times are of this CPU, the choice of blocks included; they say little about speed on a GPU.",
            f"Picture: {output}",
        )
    )


def _run(
    path: Path, model: VideoTransformer, config: VMoBAConfig, video: Path | None, grid: Grid, token: Grid
) -> tuple[Story, list[LayerResult], float]:
    from tqdm import tqdm

    # One step each to read, to take the layers' inputs, to time torch's attention and to draw; three per result.
    total = 4 + 3 * STEPS + 3 * (1 + model.shape.depth)
    with tqdm(total=total, bar_format="{desc:<32}|{bar}| {n_fmt}/{total_fmt}, {elapsed}", leave=False) as bar:
        # A step is counted when the next begins: the words name what runs now.
        def step(words: str) -> None:
            bar.update(bar.desc != "")
            bar.set_description_str(words)

        step("read the clip")
        pixels = [patch * size for patch, size in zip(model.shape.patch, grid, strict=True)]
        frames = read_clip(video or BUNNY, *pixels)
        noisy = add_noise(frames, LEVEL)
        model.set_attention(dataclasses.replace(config, dispatch="dense", backend="auto"))
        full = denoise(model, noisy, lambda words: step(f"full attention: {words}"))
        for index, block in enumerate(model.blocks):
            block.attention = PlainAttention(config, index, model.shape.depth)
        sparse = denoise(model, noisy, lambda words: step(f"VMoBA: {words}"))
        for index, block in enumerate(model.blocks):
            kind = NAMES[config.layer(index, model.shape.depth).kind]
            block.attention = attention_with_tail(config, index, model.shape.depth, kind)
        tailed = denoise(model, noisy, lambda words: step(f"with a tail: {words}"))
        step("take query, key and value")
        inputs = layer_inputs(model, noisy, torch.tensor([LEVEL]))
        results = run_layers(inputs, config, grid, step)
        step("time torch's own attention")
        sdpa = sdpa_seconds(*inputs[0])
        step("draw the picture")
        shown = results[-3:]
        _, height, width = grid
        place = (token[0] * height + token[1]) * width + token[2]
        middle = slice(model.shape.patch[0] // 2, None, model.shape.patch[0])
        videos = {"clip": frames, "noisy": frames_of(noisy), "full": full, "sparse": sparse, "tail": tailed}
        story = Story(
            videos={name: each[middle] for name, each in videos.items()},
            nearness={(a, b): psnr(videos[a], videos[b]) for a in videos for b in videos if a < b},
            held_out=video is None,
            token=token,
            attention=[attention_of(*inputs[result.layer][:2], place, HEAD) for result in shown],
            head=HEAD,
            results=shown,
            rule=_in_words(shown[0].rule),
            credit="" if video else BUNNY_CREDIT,
        )
        draw(story, path)
        step("done")
        bar.leave = True  # not before: a bar that fails makes room for the error
    return story, results, sdpa


def _nearness(story: Story) -> list[str]:
    return [
        f"full attention: {story.psnr('full', 'clip'):5.2f} dB to the clip",
        f"VMoBA:          {story.psnr('sparse', 'clip'):5.2f} dB to the clip, "
        f"{story.psnr('sparse', 'full'):.2f} dB to full attention's",
        f"with a tail:    {story.psnr('tail', 'clip'):5.2f} dB to the clip, "
        f"{story.psnr('tail', 'full'):.2f} dB to full attention's, at the same density",
        f"noisy:          {story.psnr('noisy', 'clip'):5.2f} dB to the clip",
    ]


def _in_words(rule: Threshold | TopK) -> str:
    if isinstance(rule, Threshold):
        return f"in each head, until {100 * rule.tau:g} % of all similarity is covered"
    return f"{100 * rule.density:g} % of all blocks" if rule.density else f"{rule.k} blocks in all"


def table(results: list[LayerResult]) -> str:
    """The results as text, a line per layer."""
    lines = ["layer  kind  blocks  density  tile density  recall  overlap  largest error      time"]
    for r in results:
        shares = f"{r.density:>9.3f}{r.tile_density:>14.3f}{r.recall:>8.3f}{r.overlap:>9.3f}"
        lines.append(f"{r.layer:>5}  {r.kind:<4}{r.partition.num_blocks:>8}{shares}{r.error:>15.1e}{r.seconds:>8.3f} s")
    return "\n".join(lines)
