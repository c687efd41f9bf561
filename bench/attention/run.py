"""Times our attention and dense attention by others on the same tensors; prints, saves and draws the table.

    python -m bench.attention.run --output bench/results/<gpu>_<date>_attention.json --plot docs/speed.png

Each row is one attention on one shape. Its output is checked before it is timed (checks.py); then forward and
forward + backward are timed and their memory is measured (timing.py). Sections share one order, the most urgent rows
first:

    main     55,296 tokens, 12 heads: all peers, all dispatches and backends, 8 slabs, 48 windows and 72 cubes
    density  packed at densities 0.05 to 0.5
    low      packed and shared at densities 0.0625 to 0.25, with and without a tail; tiles by others (peers.py)
    tokens   2K to 110K tokens at one density
    paper    the paper's four shapes, 12 and 40 heads, 1D, 2D and 3D
    stages   what each stage of packed takes (stages.py)
    auto     "auto" and the dispatches that it chooses from, also on inputs whose neighbours agree

A row that fails is recorded with its error, and the others go on. The file is rewritten after each row. `--budget-s`
stops starting rows. `--add` keeps the good rows of a file, provided that the code is the same, and measures the others:
those that failed or were not run, and peers that were not installed. FlashAttention-4 and xformers cannot share an
environment: run again in another one with `--sections main --peers xformers --add`. A second process measures, so that
one that dies or hangs costs only its row.

    python -m bench.attention.run --output x.json --device cpu --small     # tries it out in seconds, without a GPU
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench.attention.report import AttentionReport
from bench.common.supervisor import script_parser, shown, stated_command, supervise

SECTIONS = ("main", "density", "low", "tokens", "paper", "stages", "auto")
PEERS = ("FlashAttention-4", "cuDNN", "FlexAttention", "FlashAttention-2", "memory-efficient", "xformers")
TILE_PEERS = ("FlexAttention, full tiles", "FastVideo")


def main() -> int:
    """Measures the table; returns the exit status."""
    args = parse(sys.argv[1:])
    if args.worker:
        from bench.attention.worker import work  # the supervising process loads no torch

        return work(args)
    if not args.plot_only:
        AttentionReport.begin(args.output, args.add)
        command = [sys.executable, "-m", "bench.attention.run", *sys.argv[1:], "--worker"]
        status = supervise(command, args.output, args.budget_s, args.row_limit_s, AttentionReport)
        if status:
            return status
        print(f"table: {args.output.with_suffix('.md')}")
    if args.plot:
        from bench.attention.plot import draw  # matplotlib may be absent

        draw(args.output, args.plot)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the one to state with the results."""
    parser = script_parser(__doc__, row_limit_s=240, only=False)
    add = parser.add_argument
    add("--sections", type=_list_of(SECTIONS), default=list(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    add("--peers", type=_list_of(PEERS), default=list(PEERS), help=f"some of {','.join(PEERS)}")
    add("--error-factor", type=float, help="an output's error may be this many times FlexAttention's")
    add("--plot", type=Path, help="draw the speed-ups into this file")
    add("--plot-only", action="store_true", help="draw from an existing file")
    args = parser.parse_args(arguments)
    options = [("--sections", args.sections, SECTIONS), ("--peers", args.peers, PEERS)]
    chosen = [f"{name} {','.join(given)}" for name, given, default in options if given != list(default)]
    args.command = stated_command("bench.attention.run", args.output.name, chosen + shown(args))
    return args


def _list_of(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(choices)
        if unknown:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(choices)}, got {text!r}")
        return [name for name in choices if name in text.split(",")]

    return parse_list


if __name__ == "__main__":
    sys.exit(main())
