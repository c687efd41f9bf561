"""What tuning found: as text, JSON and a picture of fidelity against cost."""

import json
from pathlib import Path

from vmoba_flex.tuning.search import Trial
from vmoba_flex.tuning.tune import Tuned
from vmoba_flex.user_error import check_extra, new_file


def report(tuned: Tuned) -> str:
    """The settings found, the paper's, and the frontier, a line for each."""
    best = tuned.best
    lines = [
        f"{best.setting}: {best.worst:.2f} dB at {best.cost:.3f} of full attention's pairs, wanted {tuned.wanted}",
        f"The paper's setting: {_shown(tuned.paper)}",
        f"{len(tuned.trials)} settings tried, {tuned.denoises} denoises run. The frontier, dB of the worst prompt and "
        "seed, share of full attention's pairs, and seconds of the steps:",
    ]
    return "\n".join(
        [*lines, *(f"  {one.worst:6.2f}  {one.cost:.3f}  {one.seconds:8.2f}  {one.setting}" for one in tuned.frontier)]
    )


def save(tuned: Tuned, folder: Path | str) -> list[Path]:
    """Writes ``config.json``, ``tuned.json`` and ``frontier.png`` to a folder, each whole or not at all.

    Raises:
        UserError: if matplotlib is missing, or a file cannot be written.
    """
    check_extra("compare", "matplotlib")
    folder = Path(folder)
    paths = [folder / name for name in ("config.json", "tuned.json", "frontier.png")]
    tuned.config.save(paths[0])
    facts = {
        "wanted": tuned.wanted,
        "config": json.loads(tuned.config.to_json()),
        "best": _facts(tuned.best),
        "paper": _facts(tuned.paper),
        "trials": [_facts(one) for one in tuned.trials],
    }
    with new_file(paths[1], ".json", "this is JSON") as draft:
        draft.write_text(json.dumps(facts, indent=1) + "\n")
    with new_file(paths[2], ".png", "the picture is a PNG") as draft:
        _plot(tuned, draft)
    return paths


def _shown(trial: Trial) -> str:
    fidelity = f"{trial.worst:.2f} dB" if trial.complete else f"{trial.worst:.2f} dB or less"
    return f"{fidelity} at {trial.cost:.3f}"


def _facts(trial: Trial) -> dict[str, object]:
    return trial._asdict() | {"setting": str(trial.setting), "worst": trial.worst}


def _plot(tuned: Tuned, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    stopped = [one for one in tuned.trials if not one.complete]
    complete = [one for one in tuned.trials if one.complete]
    axes.scatter([one.cost for one in stopped], [one.worst for one in stopped], s=14, c="0.75", label="stopped early")
    axes.scatter([one.cost for one in complete], [one.worst for one in complete], s=22, c="0.4", label="tried")
    front = tuned.frontier
    axes.step([one.cost for one in front], [one.worst for one in front], where="post", c="C0", label="frontier")
    for name, one, colour in (("paper", tuned.paper, "C1"), ("found", tuned.best, "C2")):
        axes.scatter([one.cost], [one.worst], s=70, c=colour, zorder=3, label=name)
    axes.set_xlabel("pairs, as a share of full attention's")
    axes.set_ylabel("dB to full attention's video, worst")
    axes.set_title(f"wanted {tuned.wanted}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=150)
