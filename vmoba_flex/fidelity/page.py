"""A comparison and its MP4 -> a page of HTML that holds all it shows."""

import base64
import dataclasses
import html
import json
from importlib import resources
from statistics import mean
from typing import Any

from vmoba_flex.fidelity.comparison import Comparison, Summary
from vmoba_flex.fidelity.movie import Layout


def page(found: Comparison, layout: Layout, movie: bytes, fps: int) -> str:
    """The page.

    Args:
        found: what it tells.
        layout: of the MP4.
        movie: the MP4.
        fps: of the MP4.
    """
    facts = {
        "fps": fps,
        "layout": dataclasses.asdict(layout),
        "names": [run.name for run in found.pairs()[0]],
        "pairs": _pairs(found),
        "configs": {name: config.to_json() for name, config in found.configs.items()},
    }
    parts = {
        "conclusions": "".join(f"<li>{html.escape(one)}</li>" for one in conclusions(found)),
        "about": html.escape(_about(found)),
        "summary": _table(_summary_rows(found.summary())),
        "layers": _table(_layer_rows(found)),
        "facts": json.dumps(facts).replace("</", "<\\/"),
        "movie": base64.b64encode(movie).decode(),
    }
    text = resources.files("vmoba_flex.fidelity").joinpath("page.html").read_text(encoding="utf-8")
    for name, value in parts.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def conclusions(found: Comparison) -> list[str]:
    """What was found, in a sentence for each config."""
    several = len(found.pairs()) > 1
    told = []
    for one in found.summary()[1:]:
        near = f"{one.psnr:.1f} dB to full attention's video"
        near += f" ({one.worst_psnr:.1f} dB at worst)" if several else ""
        told.append(f"{one.name}: {near}, {one.speed_up:.2f}x its speed, {100 * one.density:.0f} % of the pairs.")
    return told


def _about(found: Comparison) -> str:
    count = len(found.pairs())
    frames, height, width, _ = found.runs[0].denoise.shape
    steps = len(found.runs[0].denoise.step_seconds)
    words = f"{found.pipeline}, {frames} frames of {width} x {height}"
    words += f", {steps} steps" if steps else ""
    return f"{words}; {count} {'pair' if count == 1 else 'pairs'} of prompt and seed, each from the same noise."


def _pairs(found: Comparison) -> list[dict[str, Any]]:
    pairs, first = [], 0
    for runs in found.pairs():
        count = runs[0].denoise.shape[0]
        near = [None if run.near is None else dataclasses.asdict(run.near) for run in runs]
        pairs.append({"prompt": runs[0].prompt, "seed": runs[0].seed, "first": first, "frames": count, "near": near})
        first += count
    return pairs


def _summary_rows(summary: list[Summary]) -> list[list[str]]:
    """Columns that say nothing are left out."""
    columns = {
        "": lambda one: one.name,
        "PSNR, dB": lambda one: _number(one.psnr, ".2f"),
        "worst": lambda one: _number(one.worst_psnr, ".2f"),
        "worst frame": lambda one: _number(one.worst_frame_psnr, ".2f"),
        "SSIM": lambda one: _number(one.ssim, ".4f"),
        "worst SSIM": lambda one: _number(one.worst_ssim, ".4f"),
        "LPIPS": lambda one: _number(one.lpips, ".4f"),
        "worst LPIPS": lambda one: _number(one.worst_lpips, ".4f"),
        "s / step": lambda one: _number(one.step_seconds, ".3f"),
        "s, all steps": lambda one: _number(one.seconds, ".2f"),
        "speed-up": lambda one: f"{one.speed_up:.2f}x",
        "memory, GB": lambda one: _number(one.peak_bytes and one.peak_bytes / 1e9, ".2f"),
        "density": lambda one: _number(one.density, ".3f"),
    }
    filled = {title: [of(one) for one in summary] for title, of in columns.items()}
    filled = {title: cells for title, cells in filled.items() if any(cells)}
    return [list(filled), *map(list, zip(*filled.values(), strict=True))]


def _layer_rows(found: Comparison) -> list[list[str]]:
    rows = [["config", "model", "layer", "kind", "density", "in sparse steps", "recall"]]
    by_layer: dict[tuple[str, str, int, str], list[Any]] = {}
    for run in found.runs:
        for layer in run.denoise.layers:
            by_layer.setdefault((run.name, layer.model, layer.layer, layer.kind), []).append(layer)
    for (name, model, layer, kind), runs in by_layer.items():
        every = [one for run in runs for one in run.density if one is not None]
        sparse = [one for one in every if one < 1]
        recalls = [run.recall for run in runs if run.recall is not None]
        figures = [_number(mean(values) if values else None, ".3f") for values in (every, sparse, recalls)]
        rows.append([name, model, str(layer), kind, *figures])
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(rows: list[list[str]]) -> str:
    head, *body = ([f"<td>{html.escape(cell)}</td>" for cell in row] for row in rows)
    lines = ["<tr>" + "".join(row) + "</tr>" for row in body]
    titles = "".join(head).replace("td>", "th>")
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
