"""The command compare; ``arguments`` has its options."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.compare import check_installed, compare
from vmoba_flex.fidelity.report import PAGE
from vmoba_flex.load_pipeline import DEMO, load_pipeline, read_arguments, read_prompts
from vmoba_flex.models.handle import models_of
from vmoba_flex.presets import NAMES, SPEEDS, speed_arguments
from vmoba_flex.user_error import UserError, one_line

NAMED = ("paper", "fast")
"""What configs are compared where none is named."""

DEMO_PROMPT = "bunny"


def run_compare(arguments: argparse.Namespace) -> str:
    """Denoises under full attention and configs, writes the report, and returns the table."""
    check_installed()
    check_movies()
    with mendable(arguments.output):
        prompts, call, pipe = load_requested(arguments)
        configs = dict(config_of(name, pipe) for name in arguments.config or NAMED)
        options: dict[str, Any] = {"seeds": arguments.seeds, "call": call, "output": arguments.output}
        found = compare(pipe, configs, prompts=prompts, fps=arguments.fps, **options)
    return f"{found.table()}\nPSNR and SSIM: to full attention's videos.\nPage: {arguments.output / PAGE}"


def load_requested(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any], Any]:
    """The prompts, the arguments of the pipeline's call, and the pipeline that a command line asks for."""
    prompts: list[str] = list(arguments.prompt or ())
    if arguments.prompts is not None:
        prompts += read_prompts(arguments.prompts)
    if not prompts:
        if arguments.model != DEMO:
            raise UserError("there is no prompt: give --prompt TEXT, or --prompts FILE with one a line")
        prompts = [DEMO_PROMPT]
    call = read_arguments(arguments.set or (), arguments.image, arguments.video)
    pipe = load_pipeline(
        arguments.model,
        dtype=arguments.dtype,
        offload=arguments.offload,
        lora=arguments.lora or (),
        pipeline=arguments.pipeline,
    )
    return prompts, call, pipe


@contextlib.contextmanager
def mendable(output: Path) -> Iterator[None]:
    """Turns what is refused, and running out of memory, into an error of one line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({one_line(error)[:120]}): make the video smaller by --set, or take --offload model; "
            f"finished denoises stay in {output}, and the same command goes on from there"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python had no memory left."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(one in str(error).lower() for one in words)


def check_movies() -> None:
    """Raises ``UserError`` if av cannot write H.264."""
    from av.codec import Codec

    try:
        Codec("libx264", "w")
    except ValueError as error:
        raise UserError("av here has no H.264 encoder (libx264): pip install av, whose wheels bring one") from error


def config_of(name: str, pipe: Any) -> tuple[str, VMoBAConfig]:
    """The config that a word of the command line stands for, and its name in the report.

    Args:
        name: ``"paper"``; a speed of ``VMoBAConfig.preset``, for the pipeline's own transformer; a model and a speed,
            as in ``"wan2.2-a14b:balanced"``; or a JSON file.
        pipe: the pipeline.

    Raises:
        UserError: if it stands for none.
    """
    if name == "paper":
        return name, VMoBAConfig.paper("inference")
    model, colon, speed = name.rpartition(":")
    if name in SPEEDS:
        own = type(next(iter(models_of(pipe).values()))).__name__
        if own not in NAMES:  # a model of one's own, or the one that ships
            return name, VMoBAConfig(**speed_arguments(name, None))
        model, colon, speed = own, ":", name
    if colon and model in NAMES:
        try:
            return name, VMoBAConfig.preset(model, speed)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise UserError(f"--config {name}: {one_line(error)}") from error
    return Path(name).stem, VMoBAConfig.load(name)
