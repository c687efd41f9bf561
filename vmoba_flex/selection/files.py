"""A selection's tensors and settings as a file of ``torch.save``, and back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.user_error import UserError, checked_path, new_file, one_line

_VERSION = 1


def write(tensors: dict[str, Tensor], settings: dict[str, Any], path: Path | str) -> None:
    """Writes a ``.pt`` file, which appears whole or not at all.

    Raises:
        TypeError: if ``path`` is neither a str nor a Path.
        UserError: if the name has another suffix or the file cannot be written.
    """
    with new_file(checked_path(path), ".pt", "a selection is a file of torch.save") as draft:
        torch.save({"version": _VERSION} | settings | {name: x.cpu() for name, x in tensors.items()}, draft)


def read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the settings of a file that ``write`` wrote.

    Raises:
        TypeError: if ``path`` is neither a str nor a Path.
        UserError: if there is none.
    """
    path = checked_path(path)
    try:
        saved = torch.load(path, weights_only=True)
        if saved.pop("version") != _VERSION:
            raise ValueError(f"its version is not {_VERSION}")
    except Exception as error:  # torch.load raises any of many for what is no file of its own
        raise UserError(f"{path} holds no Selection ({one_line(error)[:200]}): name a file of save") from error
    tensors = {name: x for name, x in saved.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in saved.items() if name not in tensors}
