"""A model's name on the command line -> its pipeline, and the arguments of its call."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vmoba_flex.user_error import UserError, check_extra, one_line

DEMO = "demo"
"""The name of the model that ships."""


def load_pipeline(
    model: str,
    *,
    dtype: str | None = None,
    offload: str | None = None,
    lora: Sequence[str] = (),
    pipeline: str | None = None,
) -> Any:
    """A pipeline, ready to run.

    Args:
        model: ``"demo"`` for the model that ships, or a folder or hub name that diffusers loads.
        dtype: of the weights, by torch's name; bfloat16 on an accelerator and float32 on a CPU by default.
        offload: ``"model"`` or ``"sequential"``, as diffusers calls them; None to keep the pipeline on the device.
        lora: files, folders or hub names of LoRA weights.
        pipeline: a class of diffusers to load it with; the model's own by default.

    Raises:
        UserError: if something is missing, or cannot be loaded.
    """
    if model == DEMO:
        from vmoba_flex.demo.pipeline import DemoPipeline

        check_extra("compare", "av", "safetensors")
        for name, value in (("dtype", dtype), ("offload", offload), ("lora", lora), ("pipeline", pipeline)):
            if value:
                raise UserError(f"--{name} has no effect with the model that ships: leave it out")
        return DemoPipeline()
    check_extra("compare", "diffusers")
    import diffusers

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = getattr(torch, dtype or ("float32" if device is None else "bfloat16"), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"--dtype must be a floating dtype of torch, such as bfloat16, got {dtype}")
    loader: Any = getattr(diffusers, pipeline or "DiffusionPipeline", None)
    if not hasattr(loader, "from_pretrained"):
        raise UserError(f"--pipeline must be a pipeline class of diffusers {diffusers.__version__}, got {pipeline}")
    if offload and device is None:
        raise UserError(f"--offload {offload} needs an accelerator: leave it out on a CPU")
    if not Path(model).exists() and (Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1):
        raise UserError(f"there is no folder {model}: name a folder, a hub name such as ORG/MODEL, or {DEMO}")
    try:
        pipe: Any = loader.from_pretrained(model, dtype=kind)
        for one in lora:
            pipe.load_lora_weights(one)
    except Exception as error:  # of files, the network, classes, extras: the message says which
        raise UserError(f"cannot load {model} by diffusers ({one_line(error)[:300]}): check its name") from error
    if offload:
        getattr(pipe, f"enable_{offload}_cpu_offload")()
    elif device is not None:
        pipe.to(device)
    return pipe


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line, without blank lines.

    Raises:
        UserError: if it cannot be read or has none.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): name a text file with one prompt a line") from error
    if not found:
        raise UserError(f"{path} holds no prompt: write one a line")
    return found


def read_arguments(pairs: Sequence[str], image: Path | None, video: Path | None) -> dict[str, Any]:
    """Arguments of a pipeline's call.

    Args:
        pairs: ``name=value``, the value as JSON, or else text.
        image: a picture to pass as ``image``.
        video: a video to pass as ``video``.

    Raises:
        UserError: if a pair is malformed, or a file cannot be read.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--set must be NAME=VALUE, as in num_frames=81, got {pair}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    for name, path in (("image", image), ("video", video)):
        if path is None:
            continue
        images = _pictures(path)
        found[name] = images if name == "video" else images[0]
    return found


def _pictures(path: Path) -> list[Any]:
    """The frames of a video, or a picture, as PIL images."""
    check_extra("compare", "av", "PIL")
    import av
    from av.error import FFmpegError

    if not path.is_file():
        raise UserError(f"there is no file {path}: check the path")
    try:
        with av.open(str(path)) as reader:
            found = [frame.to_image() for frame in reader.decode(video=0)] if reader.streams.video else []
    except (FFmpegError, OSError) as error:
        raise UserError(f"cannot read {path} as a picture or a video ({one_line(error)}): give another file") from error
    if not found:
        raise UserError(f"{path} holds no picture: give another file")
    return found
