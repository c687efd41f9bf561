"""Times attention and a training step of Wan 1.3B's shape over 1, 2 and more GPUs.

    python -m bench.distributed.run --gpus 1,2,4 --output bench/results/<gpu>_<date>_distributed.json --budget-s 120

Ours and full attention exchange tokens for heads in the same way, over torch.distributed. A row is one attention on one
number of tokens and GPUs: the whole call, forward and forward + backward, and separately what a rank computes and what
ranks exchange. Times are the slowest rank's. Before a row is timed, each rank's outputs and gradients must equal those
of one GPU. The table also has what a model of the cost predicts for the rows, and for more GPUs and tokens.

The command starts its own ranks. The most urgent rows come first. If a row fails, the ranks are started again for the
other rows. The file is rewritten after each row. `--budget-s` stops starting rows, `--only` chooses rows by words of
their names, and `--add` keeps the good rows of a file and measures the others.

    python -m bench.distributed.run --gpus 1,2 --output x.json --only "packed,55296" --budget-s 30
    python -m bench.distributed.run --gpus 1,2 --output x.json --device cpu --small     # tries it out without a GPU
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.common.supervisor import script_parser, shown, stated_command, supervise


def main() -> int:
    """Measures the table; returns the exit status."""
    args = parse(sys.argv[1:])
    if args.worker:
        return start_ranks(args)
    from bench.distributed.report import DistributedReport

    DistributedReport.begin(args.output, args.add, args.only)
    command = [sys.executable, "-m", "bench.distributed.run", *sys.argv[1:], "--worker"]
    status = supervise(command, args.output, args.budget_s, args.row_limit_s, DistributedReport)
    if status == 0:
        print(f"table: {args.output.with_suffix('.md')}")
    return status


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the one to state with the results."""
    parser = script_parser(__doc__, row_limit_s=60)
    add = parser.add_argument
    add("--gpus", type=lambda text: sorted({int(n) for n in text.split(",")}), default=[1, 2], help="such as 1,2,4")
    args = parser.parse_args(arguments)
    if any(n < 1 or max(args.gpus) % n for n in args.gpus):
        parser.error(f"each of --gpus must divide the largest, got {args.gpus}")
    gpus = f"--gpus {','.join(map(str, args.gpus))}"
    args.command = stated_command("bench.distributed.run", args.output.name, [gpus, *shown(args)])
    return args


def start_ranks(args: argparse.Namespace) -> int:
    """Starts a rank for each GPU; if one fails, ends them all. Returns the exit status."""
    from bench.distributed.worker import rank_main

    args.started = time.monotonic()
    size = max(args.gpus)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=rank_main, args=(rank, size, args, str(Path(folder) / "store"), os.getpid()))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        try:
            while any(rank.is_alive() for rank in ranks):
                failed = [rank.exitcode for rank in ranks if rank.exitcode]
                if failed:
                    return abs(failed[0])
                time.sleep(0.05)
            return max(abs(rank.exitcode or 0) for rank in ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


if __name__ == "__main__":
    sys.exit(main())
