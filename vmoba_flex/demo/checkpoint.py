"""A trained model as one safetensors file: weights in half precision; shape, attention and training as metadata."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from vmoba_flex import VMoBAConfig
from vmoba_flex.demo.model import Shape, VideoTransformer
from vmoba_flex.user_error import UserError, new_file, one_line

TRAINED = Path(__file__).with_name("model.safetensors")
"""The model that ships with the demo; bench/quality trained it."""


def save(model: VideoTransformer, attention: VMoBAConfig, training: dict[str, Any], path: Path) -> None:
    """Writes the model to `path`, whole or not at all.

    Args:
        model: its weights are stored in float16.
        attention: what it was trained with.
        training: how it was trained, for the reader; what JSON can hold.
        path: the file, ending in ``.safetensors``.

    Raises:
        UserError: if the file cannot be written.
    """
    from safetensors.torch import save_file

    weights = {name: weight.detach().half().cpu().contiguous() for name, weight in model.state_dict().items()}
    shape = json.dumps(dataclasses.asdict(model.shape))
    metadata = {"shape": shape, "attention": attention.to_json(), "training": json.dumps(training)}
    with new_file(path, ".safetensors", "a model is a safetensors file") as draft:
        save_file(weights, draft, metadata)


def load(path: Path = TRAINED) -> tuple[VideoTransformer, VMoBAConfig, dict[str, Any]]:
    """The model in float32, the attention that it was trained with, and how it was trained.

    Raises:
        UserError: if the file is missing, or is not what `save` writes.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no model at {path}: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        attention = VMoBAConfig.from_json(metadata["attention"])
        with torch.device("meta"):
            model = VideoTransformer(Shape.of(json.loads(metadata["shape"])), attention)
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False), attention, json.loads(metadata["training"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        words = one_line(error)[:200]
        raise UserError(f"{path} holds no model of bench/quality ({words}): give another file") from error
