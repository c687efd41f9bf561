"""The options of the command line, and which exclude one another; free of torch, so that ``--help`` is quick."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmoba_flex.user_error import UserError
from vmoba_flex.version import __version__

_RULE = ("tau", "density", "pool", "normalize", "max_density", "gate")

# An option, its value (None for any), and the options that have no effect next to it: giving one of those is an error.
_EXCLUDES = (
    ("config", None, (*_RULE, "tail")),
    ("density", None, ("tau", "normalize", "max_density")),
    ("what", "mass", ("config", *_RULE, "tail", "head", "query")),
    ("what", "choice", ("rows", "seed")),
    ("what", "density", ("layer", "step", "head", "query")),
)

_GATES = ("mean", "cells", "spread", "exact")

# The parser leaves these None where they were not given, so that the check above sees what was; then they get these
# values. The demo's own default is the rule that its model was trained with.
_DEFAULTS = {"tau": 0.25, "pool": "head", "normalize": "minmax", "gate": "mean", "rows": 256, "seed": 0}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its options.

    Raises:
        UserError: if an option would have no effect.
        SystemExit: after ``--help`` and ``--version``, and if an option is malformed.
    """
    arguments = _parser().parse_args(argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name, value, others in _EXCLUDES:
        if name in given and value in (None, given[name]):
            for other in others:
                if other in given:
                    words, cause = (_words(one, given[one]) for one in (other, name))
                    raise UserError(f"{words} has no effect with {cause}: leave one of them out")
    if arguments.command not in ("demo", "compare", "tune"):
        for name, default in _DEFAULTS.items():
            if getattr(arguments, name, default) is None:
                setattr(arguments, name, default)
    return arguments


def _words(name: str, value: Any) -> str:
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--{name.replace('_', '-')} {shown}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmoba-flex", description="VMoBA sparse attention for video transformers.")
    parser.add_argument("--version", action="version", version=f"vmoba-flex {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    _add_demo(commands)

    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by capture(model).save")
    reading.add_argument("--rows", type=int, help="queries sampled from a record (default: 256)")
    reading.add_argument("--seed", type=int, help="seed of the sample (default: 0)")
    blocks = argparse.ArgumentParser(add_help=False)
    blocks.add_argument("--config", type=Path, metavar="JSON", help="blocks and rules of a VMoBAConfig")
    tail = argparse.ArgumentParser(add_help=False)
    words = "skipped blocks take part by cells of about this many tokens (default: they do not)"
    tail.add_argument("--tail", type=int, metavar="TOKENS", help=words)
    rule = argparse.ArgumentParser(add_help=False)
    rule.add_argument("--tau", type=float, help="share that a Threshold reaches (default: 0.25)")
    rule.add_argument("--density", type=float, help="share of the blocks that a TopK keeps, in place of a Threshold")
    rule.add_argument("--pool", choices=("query", "block", "head", "global"), help="what competes (default: head)")
    rule.add_argument("--normalize", choices=("minmax", "softmax"), help="of a Threshold's scores (default: minmax)")
    rule.add_argument("--max-density", type=float, help="cap of a Threshold (default: none)")
    rule.add_argument("--gate", choices=_GATES, help="what scores blocks (default: mean)")
    outputs = argparse.ArgumentParser(add_help=False)
    outputs.add_argument("--json", type=Path, metavar="JSON", help="write the results to this file")
    outputs.add_argument("--plot", type=Path, metavar="PNG", help="draw the results in this file")

    _add(commands, "inspect", "density, recall, overlap and entropy of each head", reading, blocks, rule, tail, outputs)
    _add_calibrate(commands, reading, blocks, tail)
    _add_plot(commands, reading, blocks, rule, tail)
    _add_bench(commands, rule, tail, outputs)
    pipeline = _pipeline_options()
    _add_compare(commands, pipeline)
    _add_tune(commands, pipeline)
    return parser


def _add(commands: Any, name: str, words: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    return commands.add_parser(name, parents=parents, help=words, description=f"{words[0].upper()}{words[1:]}.")


def _add_demo(commands: Any) -> None:
    words = "denoise a clip by a trained model under full attention and VMoBA, and draw what its layers do"
    demo = _add(commands, "demo", words)
    demo.add_argument("--video", type=Path, metavar="FILE", help="a video file (default: a clip of Big Buck Bunny)")
    demo.add_argument("--output", type=Path, metavar="PNG", default=Path("vmoba_demo.png"), help="default: %(default)s")
    demo.add_argument(
        "--grid",
        type=_grid,
        metavar="TxHxW",
        default=(8, 18, 32),
        help="tokens in time, height and width, each of 4 frames x 8 x 8 pixels (default: 8x18x32)",
    )
    demo.add_argument("--tau", type=float, help="similarity that a head covers (default: 0.25, as in training)")
    demo.add_argument("--density", type=float, help="share of the blocks that each query attends, in place of --tau")
    demo.add_argument("--query", type=_token, metavar="T,Y,X", help="the token whose choice is drawn")


def _add_calibrate(commands: Any, *parents: argparse.ArgumentParser) -> None:
    one = _add(commands, "calibrate", "find the rules that reach a wanted recall, overlap or density", *parents)
    wanted = one.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--recall", type=float, help="wanted share of attention on chosen blocks")
    words = "wanted share of attention weight on the same keys as full attention's: counts what a tail adds"
    wanted.add_argument("--overlap", type=float, help=words)
    wanted.add_argument("--density", type=float, dest="wanted_density", help="wanted share of the pairs")
    one.add_argument("--by", choices=("kind", "layer"), default="kind", help="what has a rule of its own: %(default)s")
    words = "gates to compare; each kind gets the best (default: the rule's own)"
    one.add_argument("--gates", nargs="+", choices=_GATES, metavar="GATE", help=words)
    one.add_argument("--output", type=Path, metavar="JSON", default=Path("vmoba.json"), help="default: %(default)s")


def _add_plot(commands: Any, *parents: argparse.ArgumentParser) -> None:
    words = "draw attention by block, a query's choice, or density over layers and steps"
    one = _add(commands, "plot", words, *parents)
    one.add_argument("--what", choices=("mass", "choice", "density"), default="mass", help="default: %(default)s")
    one.add_argument("--output", type=Path, metavar="PNG", default=Path("vmoba_plot.png"), help="default: %(default)s")
    one.add_argument("--layer", type=int, help="layer of mass and choice (default: the first recorded)")
    one.add_argument("--step", type=int, help="step of mass and choice (default: the first recorded)")
    one.add_argument("--head", type=int, help="head of choice (default: the first recorded)")
    one.add_argument("--query", type=_token, metavar="T,Y,X", help="query of choice (default: the middle)")


def _add_bench(commands: Any, *parents: argparse.ArgumentParser) -> None:
    one = _add(commands, "bench", "time sparse against full attention on this machine", *parents)
    one.add_argument("--tokens", type=int, nargs="+", help="default: 4096 to 65536 on a GPU, 1024 and 2048 on a CPU")
    one.add_argument("--heads", type=int, default=12, help="default: %(default)s")
    one.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    one.add_argument("--dispatch", choices=("packed", "shared", "tiles"), default="packed", help="default: %(default)s")
    place = one.add_mutually_exclusive_group()
    place.add_argument("--profile", type=Path, metavar="JSON", help="of this GPU, for auto (default: where auto looks)")
    place.add_argument("--no-profile", action="store_true", help="write none")


def _pipeline_options() -> argparse.ArgumentParser:
    """Which pipeline is loaded, and with what it is called."""
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("model", metavar="MODEL", help="a folder or hub name for diffusers, or demo: the model that ships")
    one.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; for demo, a video file")
    one.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one prompt a line")
    one.add_argument("--set", nargs="+", metavar="NAME=VALUE", help="of the pipeline's call, as in num_frames=81")
    one.add_argument("--image", type=Path, metavar="FILE", help="of image-to-video pipelines")
    one.add_argument("--video", type=Path, metavar="FILE", help="of video-to-video pipelines")
    one.add_argument("--pipeline", metavar="CLASS", help="of diffusers (default: the model's own)")
    one.add_argument("--lora", action="append", metavar="WEIGHTS", help="for diffusers; may be repeated")
    one.add_argument("--dtype", help="of the weights (default: bfloat16, float32 on a CPU)")
    one.add_argument("--offload", choices=("model", "sequential"), help="keep weights on the CPU while they wait")
    return one


def _add_compare(commands: Any, pipeline: argparse.ArgumentParser) -> None:
    words = "denoise the same prompts and noise under full attention and VMoBA, and show how near the videos are"
    one = _add(commands, "compare", words, pipeline)
    words = "paper; faithful, balanced or fast: a preset; or a JSON file of VMoBAConfig.save (default: paper fast)"
    one.add_argument("--config", nargs="+", metavar="CONFIG", help=words)
    one.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the noise (default: 0)")
    one.add_argument("--fps", type=int, default=16, help="of the videos that are written (default: %(default)s)")
    _add_folder(one, "vmoba_compare")


def _add_tune(commands: Any, pipeline: argparse.ArgumentParser) -> None:
    words = "find the settings that reach a fidelity at the least cost, or a speed-up at the best fidelity"
    one = _add(commands, "tune", words, pipeline)
    wanted = one.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--fidelity", type=float, metavar="DB", help="wanted PSNR to full attention's video, worst")
    words = "wanted (query, key) pairs of full attention over those of the settings, above 1"
    wanted.add_argument("--speed-up", type=float, metavar="FACTOR", help=words)
    words = "blocks, dense layers and dispatch of a VMoBAConfig (default: the paper's)"
    one.add_argument("--config", type=Path, metavar="JSON", help=words)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="SEED", help="of the noise (default: 0 1)")
    _add_folder(one, "vmoba_tune")


def _add_folder(one: argparse.ArgumentParser, default: str) -> None:
    one.add_argument("--output", type=Path, metavar="FOLDER", default=Path(default), help="default: %(default)s")


def _grid(words: str) -> tuple[int, int, int]:
    return _three(words, "x", "TxHxW, as in 8x18x32", least=1)


def _token(words: str) -> tuple[int, int, int]:
    return _three(words, ",", "T,Y,X, as in 3,9,12", least=0)


def _three(words: str, separator: str, form: str, least: int) -> tuple[int, int, int]:
    parts = words.split(separator)
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise argparse.ArgumentTypeError(f"must be three whole numbers {form}, got {words!r}")
    one, two, three = map(int, parts)
    return one, two, three
