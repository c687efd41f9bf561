"""The file of results of the study of whole denoises, what follows from its rows, and its tables."""

import math
from itertools import pairwise
from statistics import mean, median_low
from typing import Any

from bench.common.report import Report, Row, number, table

FULL, DENOISE, TUNED = "full", "denoise", "tuned"
FORMULAS = {
    "model": "a video transformer trained with full attention; all rows of a seed have its weights, except tuned ones",
    "denoise": "20 Euler steps from noise level 0.9 to 0, the first 5 with full attention unless said otherwise, from "
    "the same noise",
    "gate": "what blocks are chosen by: mean key (unless said), cells, their spread, or exact: the masses that full "
    "attention of the same step has, the oracle",
    "remembered": "chosen by the exact masses that the last dense step had; 'dense every n': full attention again in "
    "each n-th step",
    "falling": "four times the density asked for until a quarter of the steps, twice until half",
    "fidelity": "PSNR in dB of the video to full attention's own, pixels in [0, 1]; mean and worst over held-out "
    "windows, noise seeds and models",
    "gain": "fidelity minus that of another attention on the same window, noise and model; mean (worst)",
    "loss": "held-out loss without training / that of full attention on the same window and model, minus 1",
    "density": "chosen (query, block) pairs / (tokens * blocks), mean over layers and sparse steps; slabs keep at "
    "least 1 of 8",
    "recall": "the share of full attention's mass on chosen blocks; what a tail adds is not counted",
    "fewer pairs": "plain's pairs at its largest density / the pairs at which the attention has the same fidelity, by "
    "interpolation over the logarithm of the density, for each window, noise and model; a lower bound where the least "
    "density suffices, < 1 where no density does",
    "tuned": "full attention's weights trained further with the attention, at a fifth of the learning rate; held-out "
    "loss of the averaged weights / that of full attention after as many steps, minus 1",
}


class DenoiseReport(Report):
    """Results of one or several runs of ``bench.quality.denoises``."""

    formulas = FORMULAS

    def derive(self) -> None:
        """Adds to each row its losses over full attention's."""
        for row in self.data["rows"]:
            other = self.rows.get(row.get("against", ""), {})
            if "losses" in row and "losses" in other:
                pairs = zip(row["losses"], other["losses"], strict=True)
                row["over_full"] = [ours / full - 1 for ours, full in pairs]

    def markdown(self) -> str:
        """All tables."""
        lines = self.head()
        for title, (names, rows) in {
            "Models": models(self.data),
            "Fidelity": fidelity(self.data),
            "What blocks are chosen by": chosen_by(self.data),
            "Plain's fidelity at fewer pairs": fewer_pairs(self.data),
            "Tuned from full attention's weights": tuned(self.data),
        }.items():
            if rows:
                lines += ["", f"## {title}", "", *table(names, rows)]
        odd = [f"- {row['id']}: {row['status']} {row.get('error', '')}".rstrip() for row in self.data["rows"]]
        odd = [text for text, row in zip(odd, self.data["rows"], strict=True) if row["status"] != "ok"]
        return "\n".join([*lines, *["", "## Not measured", ""] * bool(odd), *odd]) + "\n"


Table = tuple[list[str], list[list[str]]]


def good(data: Row, what: str) -> dict[tuple[Any, ...], list[Row]]:
    """The good rows of a kind, those of all models together, by attention, blocks and the density asked for."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in data["rows"]:
        if row["what"] == what and row["status"] == "ok":
            found.setdefault((row["attention"], row["blocks"], row["asked"]), []).append(row)
    return found


def values(rows: list[Row]) -> list[float]:
    """Fidelity of each window, noise and model."""
    return [x for row in rows for x in row["fidelity"]]


def gains(rows: list[Row], others: list[Row]) -> list[float]:
    """Fidelity over that of another attention, of each window, noise and model that both have."""
    by_model = {row["model_seed"]: row["fidelity"] for row in others}
    return [
        x - y
        for row in rows
        if row["model_seed"] in by_model
        for x, y in zip(row["fidelity"], by_model[row["model_seed"]], strict=True)
    ]


def models(data: Row) -> Table:
    """The models trained with full attention."""
    rows = [row for row in data["rows"] if row["what"] == FULL and row["status"] == "ok"]
    cells = [
        [str(row["model_seed"]), f"{row['steps']:,}", number(row["seconds"], 0), f"{mean(row['losses']):.4f}"]
        for row in rows
    ]
    return ["model seed", "steps", "s of training", "held-out loss"], cells


def fidelity(data: Row) -> Table:
    """Fidelity, gains, losses and recall of each attention."""
    found, rows = good(data, DENOISE), []
    for (attention, blocks, asked), ours in found.items():
        each = values(ours)
        over_full = [x for row in ours for x in row.get("over_full", [])]
        recalls = [row["recall"] for row in ours if "recall" in row]
        cells = [attention, blocks, f"{mean(row['density'] for row in ours):.3f}"]
        cells += [f"{mean(each):.1f}", f"{min(each):.1f}"]
        for other in ("plain", without_tail(attention)):
            others = found.get((other, blocks, asked), []) if other != attention else []
            cells.append(_gain(ours, others))
        cells.append(f"{_percent(mean(over_full))} ({_percent(max(over_full))})" if over_full else "")
        rows.append([*cells, f"{mean(recalls):.2f}" if recalls else ""])
    names = ["attention", "blocks", "density", "fidelity dB", "worst"]
    names += ["over plain (worst)", "over the same without tail (worst)", "loss over full's (worst)", "recall"]
    return names, rows


def without_tail(attention: str) -> str:
    """The name of the same attention without a tail."""
    words = [word for word in attention.split(", ") if word != "tail"]
    return ", ".join(words if words[:1] in (["plain"], ["shared"], ["full"]) else ["plain", *words])


CHOSEN_BY = ("cells gate", "spread gate", "remembered", "exact gate")


def chosen_by(data: Row) -> Table:
    """What each way to choose gains over the mean key, and how much of the oracle's gain that is."""
    found, rows = good(data, DENOISE), []
    for (attention, blocks, asked), mean_gate in found.items():
        ways = {way: found.get((f"{attention}, {way}", blocks, asked), []) for way in CHOSEN_BY}
        if not any(ways.values()):
            continue
        gained = {way: gains(ours, mean_gate) for way, ours in ways.items()}
        cells = [attention, blocks, f"{mean_gate[0]['density']:.3f}", f"{mean(values(mean_gate)):.1f}"]
        cells += [_gain(ours, mean_gate) for ours in ways.values()]
        oracle = mean(gained["exact gate"]) if gained["exact gate"] else 0.0
        shares = [mean(gained[way]) / oracle if gained[way] and oracle > 0 else None for way in CHOSEN_BY[1:3]]
        rows.append([*cells, *("" if share is None else f"{share:.0%}" for share in shares)])
    names = ["attention", "blocks", "density", "mean key dB", *(f"{way} (worst)" for way in CHOSEN_BY)]
    return [*names, "spread: of the oracle's gain", "remembered: of the oracle's gain"], rows


def fewer_pairs(data: Row) -> Table:
    """By how many times fewer pairs each attention has plain's fidelity at its largest density."""
    found = good(data, DENOISE)
    rows = []
    for attention, blocks in dict.fromkeys((attention, blocks) for attention, blocks, _ in found):
        asked = max((each for name, where, each in found if (name, where) == ("plain", blocks)), default=None)
        # Dense steps of other numbers would be pairs, too.
        if attention == "plain" or asked is None or "dense" in attention or "falling" in attention:
            continue
        ratios = []
        for target in found["plain", blocks, asked]:
            curve = [
                row
                for (name, where, _), each in found.items()
                if (name, where) == (attention, blocks)
                for row in each
                if row["model_seed"] == target["model_seed"]
            ]
            for sample, wanted in enumerate(target["fidelity"] if curve else []):
                points = [(row["density"], row["fidelity"][sample]) for row in curve]
                ratios.append(target["density"] / density_for(wanted, points))
        if ratios:
            spread = median_low(ratios), min(ratios), max(ratios)
            rows.append([attention, blocks, *(f"{x:.1f}" if x else "< 1" for x in spread)])
    return ["attention", "blocks", "fewer pairs, median", "least", "most"], rows


def density_for(wanted: float, points: list[tuple[float, float]]) -> float:
    """The least density at which a curve has a fidelity.

    Args:
        wanted: fidelity in dB.
        points: density and fidelity, in any order; at least one.

    Returns:
        Between two points by the logarithm of the density; the least density of all points where that suffices;
        infinity where no point has the fidelity.
    """
    points = sorted(points)
    if points[0][1] >= wanted:
        return points[0][0]
    for (low, below), (high, above) in pairwise(points):
        if below < wanted <= above:
            share = (wanted - below) / (above - below)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return math.inf


def tuned(data: Row) -> Table:
    """Held-out losses after tuning."""
    rows = []
    for (attention, _, asked), ours in good(data, TUNED).items():
        over_full = [x for row in ours for x in row.get("over_full", [])]
        cells = [attention, "1" if attention == "full" else f"{asked:g}", f"{ours[0]['steps']:,}"]
        cells.append(f"{mean(x for row in ours for x in row['losses']):.4f}")
        compared = attention != "full" and over_full
        rows.append([*cells, f"{_percent(mean(over_full))} ({_percent(max(over_full))})" if compared else ""])
    return ["attention", "density asked", "steps", "held-out loss", "over full's (worst)"], rows


def line(row: Row) -> str:
    """One row for the terminal."""
    facts = []
    if "fidelity" in row:
        facts += [f"density {row['density']:.3f}", f"{mean(row['fidelity']):.2f} dB, worst {min(row['fidelity']):.2f}"]
        facts += [f"recall {row['recall']:.2f}"] if "recall" in row else []
    if "losses" in row:
        facts.append(f"loss {mean(row['losses']):.4f}")
    facts += [row["error"]] if "error" in row else []
    return f"{row['id']}: {', '.join([row['status'], *facts])} [{row['wall_s']:.1f} s]"


def _gain(ours: list[Row], others: list[Row]) -> str:
    """Mean and worst gain in dB; empty where nothing is paired."""
    gained = gains(ours, others)
    return f"{mean(gained):+.1f} ({min(gained):+.1f})" if gained else ""


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"
