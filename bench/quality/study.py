"""One model of the study of whole denoises: its training, and the rows that are measured with its weights."""

import argparse
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common.machine import error_text, free_memory, print_trace
from bench.common.report import Row
from bench.quality.denoise_report import DENOISE, FULL, TUNED, DenoiseReport
from bench.quality.fidelity import Reference, held_out_losses
from bench.quality.runs import MAIN, Run
from bench.quality.train import STRIDE, Trainer
from bench.quality.variants import (
    CYCLES,
    DENSITIES,
    MAIN_SETTING,
    SMALL_SETTING,
    TUNED_DENSITIES,
    TUNED_VARIANTS,
    VARIANTS,
    config,
    full,
)
from vmoba_flex import VMoBAConfig

SAVE_EVERY = 500
"""Steps between two checkpoints of the training."""

TUNED_SEED = 1000
"""Tuning sees other samples than any training of the weights that it starts from."""

TUNED_RATE = 0.2
"""The peak learning rate of tuning, as a share of training's."""


class ModelError(Exception):
    """The results belong to another model; the message says what to do, in one line."""


class Study:
    """One trained model under all attentions.

    Args:
        args: of the command.
        seed: of the model and its training.
        frames: what ``clips.load`` gave.
    """

    def __init__(self, args: argparse.Namespace, seed: int, frames: dict[str, Tensor]) -> None:
        self.args, self.seed, self.frames, self.device = args, seed, frames, args.device
        self.setting = SMALL_SETTING if args.small else MAIN_SETTING
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
        row |= {"rule": repr(attention.rule), "against": self._id(FULL)}
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
        row |= {"against": self._id(TUNED), "steps": trainer.step, "seconds": trainer.seconds}
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
        """Trains up to a number of steps, and keeps the state in a file if one is given."""
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
