"""Times whole video transformers: full attention through the fastest dense kernels against ours.

    python bench/models.py --output bench/results/<gpu>_<date>_models.json

Transformers of diffusers in their real shapes, with random weights, which say nothing about quality: Wan 1.3B whole,
and a few layers of Wan 14B and HunyuanVideo, whose times are scaled to the layers of the whole model. A row is one
model, number of tokens, mode and attention. The modes are a training step (forward, backward and optimizer) with and
without gradient checkpointing, and an inference forward; the attentions

    cuDNN, FlashAttention-4    dense
    exact, shared              ours, dispatch "auto" (which may stay dense) and "shared"
    exact, packed              ours where "auto" stays dense
    none                       values as they are: what all but attention takes

Blocks are compiled by compile_repeated_blocks. Before a row is timed, its model switched to full attention must equal
the stock one, and its outputs and gradients must be finite. The most urgent rows come first. Compiling takes most of
the time: `--compile-ahead-s` lets several processes compile side by side first, for Inductor's cache.

A row that fails is recorded with its error, and the others go on. The file is rewritten after each row, with a table
beside it; `--budget-s` stops starting rows, `--only` chooses rows by words of their names, and `--add` keeps the good
rows of a file and measures the others.

    python bench/models.py --output x.json --only "Wan 1.3B,55296,checkpointing" --only "Wan 1.3B,75600,inference"
    python bench/models.py --output x.json --device cpu --small     # tries it out without a GPU
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from attention import supervise


def main() -> int:
    """Runs the table; the exit status."""
    args = parse(sys.argv[1:])
    if args.worker:
        from model_worker import compile_ahead, work  # the supervising process loads no torch

        return compile_ahead(args) if args.ahead else work(args)
    from model_report import ModelReport

    started = time.monotonic()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.add:
        ModelReport.load(args.output).reopen()
    else:
        args.output.unlink(missing_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    if args.compile_ahead_s:
        compile_side_by_side(command, args.compile_ahead_s)
    budget_s = args.budget_s - (time.monotonic() - started)
    status = supervise(command, args.output, budget_s, args.row_limit_s, ModelReport)
    if status == 0:
        print(f"table: {args.output.with_suffix('.md')}")
    return status


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the one to state beside the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the JSON file; the table is written beside it as .md")
    add("--only", action="append", default=[], metavar="WORDS", help="rows named by all of these, split at commas")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="tiny shapes in float32, to try the script out")
    add("--budget-s", type=float, default=float("inf"), help="start no more rows after this many seconds")
    add("--row-limit-s", type=float, default=240, help="give a row up after this many seconds (default 240)")
    add("--compile-ahead-s", type=float, default=0, help="compile side by side for this many seconds before measuring")
    add("--add", action="store_true", help="keep the good rows of an existing file and measure the others")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--ahead", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    shown = [f'--only "{words}"' for words in args.only]
    shown += ["--device cpu"] * (args.device == "cpu") + ["--small"] * args.small
    args.command = " ".join([f"python bench/models.py --output bench/results/{args.output.name}", *shown])
    return args


def compile_side_by_side(command: list[str], seconds: float) -> None:
    """Runs processes that compile every n-th group of rows; what goes wrong there goes wrong again when measured."""
    cores = os.cpu_count() or 1
    count = max(1, min(6, cores // 2))
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // count))}
    deadline = time.monotonic() + seconds + 60  # each ends what it has begun
    commands = [[*command, "--ahead", str(first), str(count)] for first in range(count)]
    processes = [subprocess.Popen(one, env=environment) for one in commands]
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("compiling ahead took too long", file=sys.stderr)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
