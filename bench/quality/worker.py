"""One run as a process: trains, measures held-out losses, probes the model, and keeps a log for the parent."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.common.report import write_whole
from bench.quality import clips, probe
from bench.quality.runs import MAIN, RUNS, SHIPPED, SIZES, SMALL_SIZES, attentions
from bench.quality.train import STRIDE, WARMUP, Trainer
from vmoba_flex.demo import checkpoint

MEASURES = 4
"""Held-out losses and checkpoints of a run, evenly spaced."""

# Runs whose held-out loss is also measured with the other run's attention.
SWAPPED = {"full": "exact", "exact": "full"}

# Seconds kept back before the deadline for the last held-out loss and the checkpoint.
_RESERVE = 8.0


class Log:
    """The facts of a run, in a file that is whole after each ``note``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Adds facts and writes the file."""
        self.data |= facts
        write_whole(self.path, json.dumps(self.data))


def work(args: argparse.Namespace) -> None:
    """Trains one run, or goes on with it."""
    run = next(run for run in RUNS if run.name == args.run)
    size = (SMALL_SIZES if args.small else SIZES)[run.size]
    variants = attentions(args.device, run.size)
    attention = variants[run.variant]
    log, saved = Log(args.work / f"{run.name}.json"), args.work / f"{run.name}.pt"
    trainer = Trainer(run, size, attention, clips.load(args.clips, args.device))
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    log.note(run=run._asdict(), name=run.name, status="running", parameters=parameters, eager=args.eager)
    if saved.exists():
        trainer.load(saved)
    started = time.monotonic()
    if args.device == "cuda" and not args.eager:
        trainer.compile()
    log.note(compile_seconds=time.monotonic() - started)
    steps = args.steps if run.size == MAIN else log.data.get("steps") or steps_within(args.seconds, trainer)
    log.note(steps=steps)
    between = max(1, steps // (MEASURES * STRIDE)) * STRIDE
    while trainer.step < steps and time.time() < args.deadline - _RESERVE:
        trainer.advance(min(STRIDE, steps - trainer.step), steps)
        if trainer.step % between == 0:
            keep(trainer, log, saved)
    if not trainer.held_out or trainer.held_out[-1]["step"] < trainer.step:
        keep(trainer, log, saved)
    if run.size == SHIPPED:
        device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        training = {"attention": run.variant, "grid": size.grid, "steps": trainer.step, "device": device}
        anywhere = dataclasses.replace(attention, backend="auto")
        checkpoint.save(trainer.average, anywhere, training, args.work / "model.safetensors")
    if trainer.step < steps:
        log.note(status=f"stopped at step {trainer.step} of {steps}")
        return
    # A model trained with full attention is probed with the paper's rule.
    looked_at = variants["exact"] if run.variant == "full" else attention
    log.note(layers=probe.attended(trainer.average, looked_at, trainer.windows, size.grid))
    if run.variant in SWAPPED:
        trainer.average.set_attention(variants[SWAPPED[run.variant]])
        log.note(swapped=trainer.held_out_loss())
        trainer.average.set_attention(attention)
    if args.device == "cuda":
        log.note(peak_gb=torch.cuda.max_memory_allocated() / 1e9)
    log.note(gradient_error=trainer.gradient_error(), status="trained")
    if run.variant == "exact" and run.seed == 0 and run.size != SHIPPED:
        probe.probe(trainer.average, attention, trainer.windows, size.grid, lambda rows: log.note(probe=rows))
    log.note(status="ok")


def steps_within(seconds: float, trainer: Trainer) -> int:
    """How many steps fit in this time, by the pace of the warm-up, which runs here."""
    while trainer.step < WARMUP:
        trainer.advance(STRIDE, total=WARMUP)  # while the learning rate rises it does not depend on the total
    first, last = trainer.curve[0], trainer.curve[-1]
    return max(WARMUP, round(seconds * (last[0] - first[0]) / (last[1] - first[1])))


def keep(trainer: Trainer, log: Log, saved: Path) -> None:
    """Measures the held-out loss and writes all facts."""
    trainer.measure()
    trainer.save(saved)
    log.note(curve=trainer.curve, held_out=trainer.held_out, step=trainer.step, seconds=trainer.seconds)


def main() -> int:
    """The process; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the name of a run")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture")
    parser.add_argument("--steps", type=int, required=True, help="of a run of the main size")
    parser.add_argument("--seconds", type=float, required=True, help="of training, of other runs")
    parser.add_argument("--deadline", type=float, required=True, help="when to be done, in seconds since the epoch")
    args = parser.parse_args()
    if args.small:
        torch.set_num_threads(1)
    work(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
