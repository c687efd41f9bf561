"""How close whole denoises are to full attention's own, with weights that were trained with full attention.

    python -m bench.quality.denoises --output bench/results/<gpu>_<date>_denoises.json --plot docs/denoises.png

Trains a model of each seed with full attention, or takes what an earlier run left in ``--work``. Each attention of
variants.py then denoises the held-out windows from the same noise without training (fidelity.py). It needs the clips of
bench.quality.clips. The study has parts, which one run or several may measure:

    tail          with and without a tail, at five densities
    gates         what blocks are chosen by: the mean key, cells, their spread, and the exact masses
    remembered    blocks chosen by the exact masses that the last of 1, 2 or 5 dense steps had
    again         the same with dense steps between the sparse ones
    falling       the same with densities that fall
    tuned         the weights trained further with some of the attentions

Started again with the same ``--output`` and ``--work``, it goes on where it was, and measures again what went wrong.

    python -m bench.quality.denoises --output x.json --device cpu --small --steps 20 --tune-steps 10    # tries it out

``--speed-plot`` shows fidelity against what a whole run of Wan 1.3B gains, by ``--times``, results of bench.models.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from bench.common.machine import run_facts
from bench.quality import clips
from bench.quality.denoise_report import DenoiseReport, line
from bench.quality.study import ModelError, Study
from bench.quality.variants import CYCLES, PARTS


def work(args: argparse.Namespace) -> int:
    """Measures what ``args`` ask for, within their budget; returns the exit status.

    Raises:
        ModelError: if the results are of other weights.
        ClipError: if the clips cannot be read.
    """
    deadline = time.monotonic() + args.budget_s
    # Each kind of blocks and number of windows is a kernel of FlexAttention; more than the limit is an error.
    torch.compiler.config.recompile_limit = 128  # pyright: ignore[reportAttributeAccessIssue]
    frames = clips.load(args.clips, args.device)
    report = DenoiseReport.load(args.output) if args.output.exists() else DenoiseReport(args.output)
    report.reopen([])
    run = report.start_run(run_facts(args.device, args.command))
    studies = [Study(args, seed, frames) for seed in args.seeds]
    status = 0
    for part in args.parts:
        for study in studies:
            status = status or report.fill(study.rows(part, report, run), deadline, line)
    return status


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the one to state with the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the JSON file; the tables are written next to it as .md")
    add("--plot", type=Path, metavar="PNG", help="draw fidelity against density into this file")
    add("--speed-plot", type=Path, metavar="PNG", help="draw fidelity against speed into this file; needs --times")
    add("--times", type=Path, metavar="JSON", help="results of bench.models, for the speed of whole runs")
    add("--plot-only", action="store_true", help="draw from the existing file of results, and measure nothing")
    add("--work", type=Path, default=Path(".quality/denoises"), help="checkpoints (default: %(default)s)")
    add("--clips", type=Path, default=clips.CLIPS, help="what bench.quality.clips made (default: %(default)s)")
    add("--checkpoint", type=Path, help="the one seed's model, as an earlier run left it in --work; it is not trained")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="a tiny model, to try the command out")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"some of {' '.join(PARTS)}")
    add("--blocks", nargs="+", choices=CYCLES, default=list(CYCLES), help="cubes in all layers, or kinds in a cycle")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the models (default: 0)")
    add("--steps", type=int, default=1500, help="of training (default: %(default)s)")
    add("--tune-steps", type=int, default=300, help="of each tuning (default: %(default)s)")
    add("--budget-s", type=float, default=float("inf"), help="start no more rows after this many seconds")
    args = parser.parse_args(arguments)
    if args.plot_only and not ((args.plot or args.speed_plot) and args.output.is_file()):
        parser.error(f"--plot-only needs --plot or --speed-plot, and results at --output, got {args.output}")
    if args.speed_plot and not (args.times and args.times.is_file()):
        parser.error(f"--speed-plot needs --times with results of bench.models, got {args.times}")
    if args.checkpoint is not None and (len(args.seeds) > 1 or not args.checkpoint.is_file()):
        parser.error(f"--checkpoint must name a file, with one seed, got {args.checkpoint} and seeds {args.seeds}")
    seeds = " ".join(map(str, args.seeds))
    options = f"--steps {args.steps} --tune-steps {args.tune_steps} --seeds {seeds}"
    options += f" --parts {' '.join(args.parts)}" * (args.parts != list(PARTS))
    options += f" --blocks {' '.join(args.blocks)}" * (args.blocks != list(CYCLES))
    options += " --device cpu" * (args.device == "cpu") + " --small" * args.small
    args.command = f"python -m bench.quality.denoises --output bench/results/{args.output.name} {options}"
    return args


def main() -> int:
    """The command; returns its exit status."""
    args = parse(sys.argv[1:])
    if args.small:
        torch.set_num_threads(1)
    try:
        if args.device == "cuda" and not args.plot_only and not torch.cuda.is_available():
            raise OSError("no CUDA GPU here: give --device cpu --small to try it out")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        status = 0 if args.plot_only else work(args)
    except (clips.ClipError, ModelError, OSError) as error:
        print(f"denoises: error: {error}", file=sys.stderr)
        return 2
    if args.plot:
        from bench.quality.denoise_plot import draw  # matplotlib may be absent

        draw(args.output, args.plot)
    if args.speed_plot:
        from bench.quality.denoise_speed_plot import draw as draw_speed

        draw_speed(args.output, args.times, args.speed_plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
