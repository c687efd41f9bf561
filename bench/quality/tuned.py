"""How well settings that were tuned on some clips and noise hold on others, with the model that ships.

`python -m bench.quality.tuned --folder <for denoises> --clip <bikes.mp4> 195 --output <results>` tunes for the fidelity
that the paper's setting has on two windows of the clip that ships, then denoises windows and noise that tuning did not
see under both settings. Denoises are kept: a run that was broken off goes on.
"""

import argparse
import dataclasses
import json
import platform
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vmoba_flex import VMoBAConfig
from vmoba_flex.demo.pipeline import DemoPipeline
from vmoba_flex.fidelity import Prompt, Store
from vmoba_flex.tuning import tune
from vmoba_flex.tuning.report import report
from vmoba_flex.tuning.search import PAPER
from vmoba_flex.tuning.trials import Trials
from vmoba_flex.user_error import new_file

SEEN, SEEN_SEEDS = [{"prompt": "bunny", "first_frame": first} for first in (0, 16)], (0, 1)
UNSEEN_SEEDS = (100, 101)
CALL = {"num_frames": 16, "height": 64, "width": 96}


def main() -> None:
    """Tunes, measures on what was not seen, prints and writes both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clip", nargs=2, action="append", default=[], metavar=("FILE", "FIRST"))
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    call = CALL | {"num_inference_steps": arguments.steps}
    # On a CPU all exact dispatches give the same, and this one is the quickest.
    base = dataclasses.replace(VMoBAConfig.paper("inference"), dispatch="tiles")
    pipe, store = DemoPipeline(), Store(arguments.folder)

    def trials(prompts: list[Any], seeds: tuple[int, ...]) -> Trials:
        return Trials(pipe, base, prompts, seeds, call, store, lambda words: print(words, flush=True))

    wanted = trials(SEEN, SEEN_SEEDS).attempt(PAPER, 0.0, None).worst
    options: dict[str, Any] = {"seeds": SEEN_SEEDS, "base": base, "call": call, "folder": arguments.folder}
    tuned = tune(pipe, prompts=SEEN, fidelity=wanted, progress=lambda words: print(words, flush=True), **options)
    print(report(tuned), flush=True)
    clips: list[Prompt] = [{"prompt": "bunny", "first_frame": 32}]
    clips += [{"prompt": file, "first_frame": int(first)} for file, first in arguments.clip]
    unseen = trials(clips, UNSEEN_SEEDS)
    rows = []
    for name, setting in (("paper", PAPER), ("tuned", tuned.best.setting)):
        one = unseen.attempt(setting, 0.0, None)
        rows.append({"setting": f"{name}: {setting}", "pairs": one.cost, "unseen_worst": one.worst, "unseen": one.psnr})
        print(
            f"{name}: {one.cost:.3f} of the pairs, unseen worst {one.worst:.2f} dB, {[round(x, 2) for x in one.psnr]}"
        )
    facts = {"wanted": wanted, "seen": tuned.best.psnr, "rows": rows, "steps": arguments.steps, "call": call}
    windows = [("bunny", 32), *((Path(file).name, int(first)) for file, first in arguments.clip)]
    facts |= {"unseen": list(product(windows, UNSEEN_SEEDS)), "settings": len(tuned.trials)}
    facts |= {"torch": torch.__version__, "machine": platform.machine()}
    with new_file(arguments.output, ".json", "results are JSON") as draft:
        draft.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
