"""The command `vmoba-flex`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vmoba_flex.insight.commands import add_commands
from vmoba_flex.rules import Threshold, TopK
from vmoba_flex.user_error import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 where the user has to mend something."""
    arguments = _parser().parse_args(argv)
    try:
        report = arguments.run(arguments)
    except UserError as error:
        sys.stderr.write(f"vmoba-flex: error: {error}\n")
        return 2
    sys.stdout.write(report + "\n")
    return 0


def _demo(arguments: argparse.Namespace) -> str:
    from vmoba_flex.demo.show import show

    try:
        rule = None if arguments.tau is None else Threshold(arguments.tau)
        if arguments.density is not None:
            rule = TopK(density=arguments.density)
    except ValueError as error:
        raise UserError(str(error)) from error
    return show(arguments.output, video=arguments.video, grid=arguments.grid, rule=rule, token=arguments.query)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmoba-flex", description="Sparse attention for video transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="denoise a clip by a trained model under full attention and VMoBA, and draw what its layers do",
        description="Denoise a clip by a small trained model under full attention and VMoBA; print how near they are "
        "and what each layer did, and draw a picture.",
    )
    demo.add_argument("--video", type=Path, metavar="FILE", help="a video file (default: a clip of Big Buck Bunny)")
    demo.add_argument("--output", type=Path, metavar="PNG", default=Path("vmoba_demo.png"), help="default: %(default)s")
    demo.add_argument(
        "--grid",
        type=_grid,
        metavar="TxHxW",
        default=(8, 18, 32),
        help="tokens in time, height and width, each of 4 frames x 8 x 8 pixels (default: 8x18x32)",
    )
    rule = demo.add_mutually_exclusive_group()
    rule.add_argument(
        "--tau", type=float, help="similarity that a head covers (default: 0.25, as the model was trained)"
    )
    rule.add_argument("--density", type=float, help="instead, the share of the blocks that each query attends")
    demo.add_argument("--query", type=_token, metavar="T,Y,X", help="the token whose choice is drawn")
    demo.set_defaults(run=_demo)
    add_commands(commands, _token)
    return parser


def _grid(words: str) -> tuple[int, int, int]:
    frames, height, width = _three(words, "x", "TxHxW, as in 8x18x32", least=1)
    return frames, height, width


def _token(words: str) -> tuple[int, int, int]:
    t, y, x = _three(words, ",", "T,Y,X, as in 3,9,12", least=0)
    return t, y, x


def _three(words: str, separator: str, form: str, least: int) -> list[int]:
    parts = words.split(separator)
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise argparse.ArgumentTypeError(f"must be three whole numbers {form}, got {words!r}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
