"""Times whole video transformers, with full attention on the fastest dense kernels and with ours.

    python -m bench.models.run --output bench/results/<gpu>_<date>_models.json

The models are transformers of diffusers in their real shapes, with random weights, which say nothing about quality:
the whole Wan 1.3B, and a few layers of Wan 14B, HunyuanVideo, MiniMax-H3 and LTX-2, whose times are scaled to all
layers. A row is one model, number of tokens, mode and attention. The modes are a training step (forward, backward and
optimizer) with and without gradient checkpointing, and an inference forward. The attentions are

    cuDNN, FlashAttention-4    dense
    exact, shared              ours, dispatch "auto" (which may stay dense) and "shared", with the paper's rules
    ..., density 0.125 + tail  ours at that density, where skipped blocks take part by cells
    exact, packed              ours where "auto" stays dense
    none                       the values as they are: the time of everything but attention

Blocks are compiled by compile_repeated_blocks. Before a row is timed, its model switched to full attention must equal
the stock one, and its outputs and gradients must be finite. The most urgent rows come first. Most of the time goes into
compiling: with `--compile-ahead-s`, several processes first compile in parallel, for the caches on disk.

Several GPUs (`--gpus`) share the rows; all rows of one model and number of tokens run on the same GPU.

A row that fails is recorded with its error, and the others go on. The file and the table next to it are rewritten after
each row. `--budget-s` stops starting rows, `--only` chooses rows by words of their names, and `--add` keeps the good
rows of a file and measures the others.

    python -m bench.models.run --output x.json --only "Wan 1.3B,55296,checkpointing" --only "Wan 1.3B,75600,inference"
    python -m bench.models.run --output x.json --device cpu --small     # tries it out without a GPU
"""

import argparse
import os
import shutil
import subprocess
import sys
import time

from bench.common.supervisor import script_parser, shown, stated_command, supervise, worker_environment


def main() -> int:
    """Measures the table; returns the exit status."""
    args = parse(sys.argv[1:])
    if args.worker:
        from bench.models.worker import compile_ahead, work  # the supervising process loads no torch

        return compile_ahead(args) if args.ahead else work(args)
    from bench.models.report import ModelReport

    if args.gpus > 1:
        return spread(args)
    started = time.monotonic()
    ModelReport.begin(args.output, args.add, args.only)
    command = [sys.executable, "-m", "bench.models.run", *sys.argv[1:], "--worker"]
    if args.compile_ahead_s:
        compile_side_by_side(command, args.compile_ahead_s, args.ahead_processes)
    budget_s = args.budget_s - (time.monotonic() - started)
    status = supervise(command, args.output, budget_s, args.row_limit_s, ModelReport)
    if status == 0:
        print(f"table: {args.output.with_suffix('.md')}")
    return status


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the one to state with the results."""
    parser = script_parser(__doc__, row_limit_s=240)
    add = parser.add_argument
    add("--compile-ahead-s", type=float, default=0, help="compile in parallel for this many seconds before measuring")
    add("--ahead-processes", type=int, default=6, help="at most, each with a few layers in memory (default 6)")
    add("--gpus", type=int, default=1, help="measure on this many GPUs at once (default 1)")
    add("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    add("--ahead", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    index, count = args.share
    name = args.output.name.replace(f"_gpu{index}.", ".") if count > 1 else args.output.name
    args.command = stated_command("bench.models.run", name, shown(args) + [f"--gpus {count}"] * (count > 1))
    return args


def spread(args: argparse.Namespace) -> int:
    """Runs this command once for each GPU, on its share of the rows and cores, and joins the results."""
    from bench.models.report import ModelReport

    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // args.gpus)
    outputs = [args.output.with_stem(f"{args.output.stem}_gpu{gpu}") for gpu in range(args.gpus)]
    processes = []
    for gpu, output in enumerate(outputs):
        if args.add:
            shutil.copy(args.output, output)
        # Of an option given twice, the last one counts.
        options = ["--output", str(output), "--gpus", "1", "--share", str(gpu), str(args.gpus)]
        command = [sys.executable, "-m", "bench.models.run", *sys.argv[1:], *options]
        command = ["taskset", "--cpu-list", ",".join(map(str, cores[gpu * each :][:each] or cores)), *command]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if args.device == "cuda" else {})
        processes.append(subprocess.Popen(command, env=environment))
    statuses = [process.wait() for process in processes]
    report = ModelReport.load(args.output) if args.add else ModelReport(args.output)
    for output in outputs:
        if output.exists():
            report.take(ModelReport.load(output))
            output.unlink()
            output.with_suffix(".md").unlink()
    report.save()
    print(f"table: {args.output.with_suffix('.md')}")
    return max(statuses)


def compile_side_by_side(command: list[str], seconds: float, most: int) -> None:
    """Runs processes that compile every n-th group of rows; an error here shows again when the row is measured."""
    cores = len(os.sched_getaffinity(0))
    count = max(1, min(most, cores // 2))
    environment = worker_environment() | {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // count))}
    deadline = time.monotonic() + seconds + 60  # each finishes what it has begun
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
