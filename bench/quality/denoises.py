"""How near whole denoises come to full attention's own, with weights that were trained with full attention.

    python -m bench.quality.denoises --output bench/results/<gpu>_<date>_denoises.json --plot docs/denoises.png

Trains a model with full attention, or takes the one that an earlier run left in ``--work``. Each attention of
variants.py then denoises the held-out windows from the same noise without training (fidelity.py). At the end the
model's weights are tuned for some of the attentions. Takes the clips of bench.quality.clips, and about six minutes on
one H200. Started again with the same ``--output`` and ``--work``, it goes on where it was, and measures again what went
wrong. Variants that this version of vmoba_flex does not have are noted and left out.

    python -m bench.quality.denoises --output x.json --device cpu --small --steps 20     # tries it out in a minute
"""

import argparse
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common.machine import error_text, free_memory, print_trace, run_facts
from bench.common.report import Row
from bench.quality import clips
from bench.quality.denoise_report import DENOISE, FULL, TUNED, DenoiseReport, line
from bench.quality.fidelity import Reference, held_out_losses
from bench.quality.runs import MAIN, Run
from bench.quality.train import STRIDE, Trainer
from bench.quality.variants import CYCLES, DENSITIES, TUNED_DENSITIES, VARIANTS, config, full
from bench.quality.variants import FULL as FULL_SETTING
from bench.quality.variants import SMALL as SMALL_SETTING
from bench.quality.variants import TUNED as TUNED_VARIANTS
from vmoba_flex import VMoBAConfig

SAVE_EVERY = 500
"""Steps between two checkpoints of the training."""

TUNED_SEED = 1000
"""Tuning sees other samples than any training of the weights that it starts from."""

TUNED_RATE = 0.2
"""The peak learning rate of tuning, as a share of training's."""


class ModelError(Exception):
    """The model at hand is not the one that the results are of; the message says what to do, in one line."""


class Study:
    """One trained model under all attentions.

    Args:
        args: of the command.
        seed: of the model and its training.
        frames: what ``clips.load`` gave.
    """

    def __init__(self, args: argparse.Namespace, seed: int, frames: dict[str, Tensor]) -> None:
        self.args, self.seed, self.frames, self.device = args, seed, frames, args.device
        self.setting = SMALL_SETTING if args.small else FULL_SETTING
        trainer = self._trained()
        self.model, self.windows = trainer.average, trainer.windows
        self.facts = {
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "grid": self.setting.size.grid,
            "weights": digest(self.model),
            "curve": trainer.curve,
        }

    @functools.cached_property
    def reference(self) -> Reference:
        """Full attention's own videos."""
        return Reference(self.model, full(self.setting), self.windows, self.setting.size.grid)

    def rows(self, report: DenoiseReport, run: int) -> Iterator[tuple[Row, Callable[[Row], bool]]]:
        """The rows that a report lacks, each with what measures it.

        Raises:
            ModelError: if the report has rows of other weights of the same seed.
        """
        if report.rows.get(self._id(FULL), {}).get("weights", self.facts["weights"]) != self.facts["weights"]:
            raise ModelError(f"{report.path} has rows of another model of seed {self.seed}: give another --output")
        for what, attention, blocks, asked in _cases(tuning=self.args.tune_steps > 0):
            row: Row = {
                "id": self._id(what, attention, blocks, asked), "status": "running", "run": run, "what": what,
                "model_seed": self.seed, "attention": attention, "blocks": blocks, "asked": asked, "wall_s": 0.0,
            }  # fmt: skip
            if not report.has(row["id"]):
                yield row, self._measure

    def _id(self, what: str, attention: str = "full", blocks: str = "", asked: float = 1.0) -> str:
        name = "" if (what, attention) == (FULL, "full") else attention
        density = f"density {asked:g}" if blocks else ""
        return " | ".join(filter(None, [f"model {self.seed}", what, name, blocks, density]))

    def _measure(self, row: Row) -> bool:
        """Fills the row, with the error's text if it fails; returns whether the device still works."""
        began = time.monotonic()
        try:
            {FULL: self._full, DENOISE: self._denoise, TUNED: self._tune}[row["what"]](row)
            row["status"] = "ok"
        except NotImplementedError as error:
            row["status"], row["error"] = "unsupported", str(error)
        except Exception as error:
            row["status"], row["error"] = "failed", error_text(error)
            print_trace()
        row["wall_s"] = time.monotonic() - began
        return row["status"] != "failed" or free_memory(self.device)

    def _full(self, row: Row) -> None:
        row |= self.facts | {"samples": self.reference.samples, "losses": self.reference.losses}

    def _denoise(self, row: Row) -> None:
        attention = self._attention(row)
        row |= {"rule": repr(attention.rule), "rival": self._id(FULL)}
        row["density"], row["recall"] = self.reference.chosen(attention)
        row["fidelity"] = self.reference.fidelities(attention)
        row["losses"] = held_out_losses(self.model, self.windows)

    def _tune(self, row: Row) -> None:
        run = Run(row["attention"], MAIN, TUNED_SEED + self.seed)
        trainer = Trainer(run, self.setting.size, self._attention(row), self.frames)
        for model in (trainer.model, trainer.average):
            model.load_state_dict(self.model.state_dict())
        trainer.learning_rate *= TUNED_RATE
        self._advance(trainer, self.args.tune_steps)
        row |= {"rival": self._id(TUNED), "steps": trainer.step, "seconds": trainer.seconds}
        row["losses"] = held_out_losses(trainer.average, self.windows)

    def _attention(self, row: Row) -> VMoBAConfig:
        if row["attention"] == "full":
            return full(self.setting)
        return config(row["attention"], row["blocks"], row["asked"], self.setting, self.device)

    def _trained(self) -> Trainer:
        args = self.args
        path = args.checkpoint or args.work / f"full{'-small' * args.small}-{args.steps}-{self.seed}.pt"
        trainer = Trainer(Run("full", MAIN, self.seed), self.setting.size, full(self.setting), self.frames)
        if path.exists():
            trainer.load(path)
        if args.checkpoint is None and trainer.step < args.steps:
            print(f"model {self.seed} trains from step {trainer.step} to {args.steps}", flush=True)
            self._advance(trainer, args.steps, path)
        return trainer

    def _advance(self, trainer: Trainer, steps: int, path: Path | None = None) -> None:
        """Trains up to a number of steps, and keeps the state in a file if there is one."""
        if self.device == "cuda":
            trainer.compile()
        while trainer.step < steps:
            trainer.advance(min(STRIDE, steps - trainer.step), steps)
            if path is not None and (trainer.step % SAVE_EVERY == 0 or trainer.step == steps):
                trainer.save(path)


def _cases(tuning: bool) -> Iterator[tuple[str, str, str, float]]:
    """Kind of row, attention, blocks and density of each row of a model, the most urgent first."""
    yield FULL, "full", "", 1.0
    for blocks in CYCLES:
        yield from ((DENOISE, attention, blocks, density) for density in DENSITIES for attention in VARIANTS)
    if tuning:
        yield TUNED, "full", "", 1.0
        yield from ((TUNED, attention, "cycle", density) for density in TUNED_DENSITIES for attention in TUNED_VARIANTS)


def digest(model: nn.Module) -> str:
    """The first 12 hex digits of the SHA-256 of a model's weights."""
    sha = hashlib.sha256()
    for weight in model.state_dict().values():
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def work(args: argparse.Namespace) -> int:
    """Measures what ``args`` ask for, within their budget; returns the exit status.

    Raises:
        ModelError: if the results are of other weights.
        ClipError: if the clips cannot be read.
    """
    deadline = time.monotonic() + args.budget_s
    frames = clips.load(args.clips, args.device)
    report = DenoiseReport.load(args.output) if args.output.exists() else DenoiseReport(args.output)
    report.reopen([])
    run = report.start_run(run_facts(args.device, args.command))
    status = 0
    for seed in args.seeds:
        status = status or report.fill(Study(args, seed, frames).rows(report, run), deadline, line)
    return status


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the one to state with the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the JSON file; the tables are written next to it as .md")
    add("--plot", type=Path, metavar="PNG", help="draw fidelity against density into this file")
    add("--work", type=Path, default=Path(".quality/denoises"), help="checkpoints (default: %(default)s)")
    add("--clips", type=Path, default=clips.CLIPS, help="what bench.quality.clips made (default: %(default)s)")
    add("--checkpoint", type=Path, help="a checkpoint of the model of the one seed, which is not trained then")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="a tiny model, to try the command out")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the models (default: 0)")
    add("--steps", type=int, default=1500, help="of training (default: %(default)s)")
    add("--tune-steps", type=int, default=300, help="of each tuning, or 0 for none (default: %(default)s)")
    add("--budget-s", type=float, default=float("inf"), help="start no more rows after this many seconds")
    args = parser.parse_args(arguments)
    if args.checkpoint is not None and (len(args.seeds) > 1 or not args.checkpoint.is_file()):
        parser.error(f"--checkpoint must name a file, with one seed, got {args.checkpoint} and seeds {args.seeds}")
    seeds = " ".join(map(str, args.seeds))
    options = f"--steps {args.steps} --tune-steps {args.tune_steps} --seeds {seeds}"
    options += " --device cpu" * (args.device == "cpu") + " --small" * args.small
    args.command = f"python -m bench.quality.denoises --output bench/results/{args.output.name} {options}"
    return args


def main() -> int:
    """The command; its exit status."""
    args = parse(sys.argv[1:])
    if args.small:
        torch.set_num_threads(1)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise OSError("no CUDA GPU here: give --device cpu --small to try it out")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        status = work(args)
    except (clips.ClipError, ModelError, OSError) as error:
        print(f"denoises: error: {error}", file=sys.stderr)
        return 2
    if args.plot:
        from bench.quality.denoise_plot import draw  # matplotlib may be absent

        draw(args.output, args.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
