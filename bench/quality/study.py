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
from bench.quality.fidelity import STEPS, Reference, held_out_losses
from bench.quality.runs import MAIN, Run
from bench.quality.stepped import Stepped
from bench.quality.train import STRIDE, Trainer
from bench.quality.variants import (
    DENSE_STEPS,
    FEW,
    MAIN_SETTING,
    SMALL_SETTING,
    TUNED_VARIANTS,
    Variant,
    cases,
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

    def rows(self, part: str, report: DenoiseReport, run: int) -> Iterator[tuple[Row, Callable[[Row], bool]]]:
        """The rows of a part of the study that a report lacks, each with what measures it.

        Raises:
            ModelError: if the report has rows of other weights of the same seed.
        """
        if report.rows.get(self._id(FULL), {}).get("weights", self.facts["weights"]) != self.facts["weights"]:
            raise ModelError(f"{report.path} has rows of another model of seed {self.seed}: give another --output")
        for what, variant, blocks, asked in _cases(part, self.args.blocks):
            attention = "full" if variant is None else variant.name
            row: Row = {
                "id": self._id(what, attention, blocks, asked), "status": "running", "run": run, "what": what,
                "model_seed": self.seed, "attention": attention, "blocks": blocks, "asked": asked, "wall_s": 0.0,
            }  # fmt: skip
            if variant is not None:
                row |= variant._asdict()
            if not report.has(row["id"]):
                yield row, functools.partial(self._measure, variant)

    def _id(self, what: str, attention: str = "full", blocks: str = "", asked: float = 1.0) -> str:
        name = "" if (what, attention) == (FULL, "full") else attention
        density = f"density {asked:g}" if blocks else ""
        return " | ".join(filter(None, [f"model {self.seed}", what, name, blocks, density]))

    def _measure(self, variant: Variant | None, row: Row) -> bool:
        """Fills the row, with the error's text if it fails; returns whether the device still works."""
        began = time.monotonic()
        try:
            if row["what"] == TUNED:
                self._tune(variant, row)
            elif variant is None:
                row |= self.facts | {"samples": self.reference.samples, "losses": self.reference.losses}
            else:
                self._denoise(variant, row)
            row["status"] = "ok"
        except Exception as error:
            row["status"], row["error"] = "failed", error_text(error)
            print_trace()
        row["wall_s"] = time.monotonic() - began
        return row["status"] != "failed" or free_memory(self.device)

    def _denoise(self, variant: Variant, row: Row) -> None:
        attention = self._attention(variant, row)
        stepped = Stepped(variant, attention, STEPS)
        row |= {"rule": repr(attention.rule), "against": self._id(FULL)}
        row["density"] = stepped.density(self.setting.size.grid, len(self.model.blocks))
        row["fidelity"] = self.reference.fidelities(stepped)
        if variant.changes or variant.dense != DENSE_STEPS:  # the others have the same of one forward
            return
        row["recall"] = self.reference.recall(attention)
        self.model.set_attention(attention)
        row["losses"] = held_out_losses(self.model, self.windows)

    def _tune(self, variant: Variant | None, row: Row) -> None:
        run = Run(row["attention"], MAIN, TUNED_SEED + self.seed)
        attention = full(self.setting) if variant is None else self._attention(variant, row)
        trainer = Trainer(run, self.setting.size, attention, self.frames)
        for model in (trainer.model, trainer.average):
            model.load_state_dict(self.model.state_dict())
        trainer.learning_rate *= TUNED_RATE
        self._advance(trainer, self.args.tune_steps)
        row |= {"against": self._id(TUNED), "steps": trainer.step, "seconds": trainer.seconds}
        row["losses"] = held_out_losses(trainer.average, self.windows)

    def _attention(self, variant: Variant, row: Row) -> VMoBAConfig:
        return config(variant, row["blocks"], row["asked"], self.setting, self.device)

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


def _cases(part: str, kinds: list[str]) -> Iterator[tuple[str, Variant | None, str, float]]:
    """Kind of row, attention (None: full), blocks and density of each row of a part, the most urgent first."""
    yield FULL, None, "", 1.0
    if part == "tuned":
        yield TUNED, None, "", 1.0
        yield from ((TUNED, variant, "cycle", density) for density in FEW for variant in TUNED_VARIANTS)
    for blocks in kinds:
        yield from ((DENOISE, variant, blocks, density) for variant, density in cases(part))


def digest(model: nn.Module) -> str:
    """The first 12 hex digits of the SHA-256 of a model's weights."""
    sha = hashlib.sha256()
    for weight in model.state_dict().values():
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]
