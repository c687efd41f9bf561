"""Trains all runs, one process per GPU at a time, and writes the results as they come.

    python -m bench.quality.run --output bench/results/<gpu>_<date>_quality.json --budget-s 240

Runs of the main size take ``--steps`` steps; the long ones and that of the model that ships take as many as fit in
``--seconds``. Started again with the same ``--work``, it goes on where it was. A run that fails is tried once more
without compilation and CUDA graph. At the end of the budget, runs that are still going are ended.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from bench.common.report import write_whole
from bench.quality import clips
from bench.quality.results import last_loss, step_ms
from bench.quality.runs import RUNS, SIZES, SMALL_SIZES
from bench.quality.windows import HELD_OUT, LEVELS, TRAINING

# No run starts with less time left than this: it would spend most of it on starting and compiling.
_LEAST = 25.0


class Job(NamedTuple):
    """A running process."""

    name: str
    process: subprocess.Popen[bytes]
    eager: bool


class Campaign:
    """All runs: which wait, and which run on which GPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begun = time.time()
        self.deadline = self.begun + args.budget_s
        self.waiting = [(name, False) for name in args.runs if self.log(name).get("status") != "ok"]
        self.jobs: dict[int, Job] = {}

    def run(self) -> None:
        """Runs until all have ended or the time is up."""
        try:
            while (self.waiting or self.jobs) and time.time() < self.deadline:
                for gpu in range(self.args.gpus):
                    self.collect(gpu)
                    if gpu not in self.jobs:
                        self.start(gpu)
                if not self.jobs:
                    break
                time.sleep(0.2)
        finally:
            for job in self.jobs.values():
                job.process.kill()
                job.process.wait()
            self.write()

    def start(self, gpu: int) -> None:
        """Starts the next run on a GPU."""
        if not self.waiting or time.time() > self.deadline - _LEAST:
            return
        args, (name, eager) = self.args, self.waiting.pop(0)
        command = [sys.executable, "-m", "bench.quality.worker", name, "--work", args.work, "--clips", args.clips]
        command += ["--device", args.device, "--steps", str(args.steps), "--seconds", str(args.seconds)]
        command += ["--deadline", str(self.deadline), *["--small"] * args.small, *["--eager"] * eager]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if args.device == "cuda" else {})
        with (args.work / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        self.jobs[gpu] = Job(name, process, eager)
        self.say(f"{name} starts on {gpu}" + ", eager" * eager)

    def collect(self, gpu: int) -> None:
        """Records a run that has ended."""
        if gpu not in self.jobs or self.jobs[gpu].process.poll() is None:
            return
        job = self.jobs.pop(gpu)
        log = self.log(job.name)
        if job.process.returncode:
            tail = (self.args.work / f"{job.name}.out").read_text(errors="replace")[-1500:]
            self.say(f"{job.name} ended with {job.process.returncode}:\n{tail}")
            log["error"] = re.sub(r"(?:/[\w.+-]+)+/", "", (tail.strip().splitlines() or [""])[-1])[:300]
            if log.get("status") != "trained":  # else only the probe of its model is missing
                log["status"] = "failed"
                if not job.eager and self.args.device == "cuda":
                    self.waiting.insert(0, (job.name, True))
            (self.args.work / f"{job.name}.json").write_text(json.dumps(log))
        self.say(line(job.name, log))
        self.write()

    def log(self, name: str) -> dict[str, Any]:
        """The log of a run."""
        path = self.args.work / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self) -> None:
        """The results so far, and the model that ships."""
        args = self.args
        sizes = SMALL_SIZES if args.small else SIZES
        results = {
            "machine": machine(args),
            "seconds": round(time.time() - self.begun),
            "levels": [(index + 0.5) / LEVELS for index in range(LEVELS)],
            "training": TRAINING,
            "held_out": HELD_OUT,
            "sizes": {name: {"shape": vars(size.shape), "grid": size.grid} for name, size in sizes.items()},
            "runs": [log for log in (self.log(run.name) for run in RUNS) if log],
        }
        write_whole(args.output, json.dumps(results) + "\n")
        if (args.work / "model.safetensors").exists():
            shutil.copyfile(args.work / "model.safetensors", args.output.with_suffix(".safetensors"))

    def say(self, words: str) -> None:
        """A line with the time."""
        print(f"[{time.time() - self.begun:5.1f} s] {words}", flush=True)


def line(name: str, log: dict[str, Any]) -> str:
    """A run's result in one line."""
    if not log.get("held_out"):
        return f"{name}: {log.get('status')}"
    density = mean(layer["density"] for layer in log.get("layers", [{"density": float("nan")}]))
    error = log.get("gradient_error", {"all": float("nan")})["all"]
    return (
        f"{name}: {log['status']}, {log['step']} steps of {step_ms(log):.1f} ms, compiled in "
        f"{log['compile_seconds']:.0f} s, held-out loss {last_loss(log):.4f}, rule's density {density:.3f}, "
        f"gradients off by {error:.1e}"
    )


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Device, date and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "nvidia-cudnn-cu13"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    date = datetime.date.today().isoformat()
    # The option --output and its folders are of no use to a reader.
    command = (
        f"python -m bench.quality.run --steps {args.steps} --seconds {args.seconds:g} --budget-s {args.budget_s:g}"
    )
    return {"device": device, "gpus": args.gpus, "date": date, "versions": versions, "command": command}


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [run.name for run in RUNS]
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the results, a JSON file; the model that ships lies next to it")
    add("--work", type=Path, default=Path(".quality/runs"), help="checkpoints and logs (default: %(default)s)")
    add("--clips", type=Path, default=clips.CLIPS, help="what bench.quality.clips made (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="tiny models, to try the command out")
    add("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="processes at a time (default: all GPUs)")
    add("--runs", nargs="+", choices=names, default=names, metavar="RUN", help=f"default: {' '.join(names)}")
    add("--steps", type=int, default=1200, help="of each run of the main size (default: %(default)s)")
    add("--seconds", type=float, default=45.0, help="of training, of each other run (default: %(default)s)")
    add("--budget-s", type=float, default=1500.0, help="seconds for everything (default: %(default)s)")
    args = parser.parse_args()
    try:
        clips.read(args.clips)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise OSError("no CUDA GPU here: give --device cpu --small to try it out")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
    except (clips.ClipError, OSError) as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    campaign = Campaign(args)
    campaign.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
