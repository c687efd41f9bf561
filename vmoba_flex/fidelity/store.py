"""Finished denoises on disk, by key: what is done once is not done again, and one run of frames is in memory at a time.

Each is one safetensors file: frames, and everything else as JSON in its header.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vmoba_flex.fidelity.denoise import Denoise
from vmoba_flex.fidelity.layers import LayerSteps
from vmoba_flex.user_error import UserError, new_file

_LOG = logging.getLogger(__name__)
_RUN = 4
"""Frames that are read together."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A denoise on disk; see ``Denoise`` for what has no description.

    Attributes:
        path: its file.
        shape: of its frames: ``(F, H, W, 3)``.
        seconds: see ``Denoise``.
        step_seconds: see ``Denoise``.
        peak_bytes: see ``Denoise``.
        layers: see ``Denoise``.
    """

    path: Path
    shape: tuple[int, ...]
    seconds: float
    step_seconds: tuple[float, ...]
    peak_bytes: int | None
    layers: tuple[LayerSteps, ...]

    def runs(self) -> Iterator[Tensor]:
        """The frames in order, a few at a time: uint8 ``(a few, H, W, 3)``."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            frames = file.get_slice("frames")
            for first in range(0, self.shape[0], _RUN):
                yield frames[first : first + _RUN]


class Store:
    """A folder of finished denoises.

    Args:
        folder: is made if it does not exist.

    Raises:
        UserError: if it cannot be made.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder} ({error.strerror}): name another") from error

    def get(self, key: str) -> Stored | None:
        """The denoise of a key; None if it is not finished."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["denoise"])
                shape = tuple(file.get_slice("frames").get_shape())
            layers = tuple(LayerSteps(**one | {"density": tuple(one["density"])}) for one in facts.pop("layers"))
            return Stored(path, shape, step_seconds=tuple(facts.pop("step_seconds")), layers=layers, **facts)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            _LOG.warning("%s holds no finished denoise (%s): it is run again", path, error)
            return None

    def put(self, key: str, denoise: Denoise) -> Stored:
        """Writes a denoise; its file appears whole or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        from safetensors.torch import save_file

        facts: dict[str, Any] = {
            "seconds": denoise.seconds,
            "step_seconds": denoise.step_seconds,
            "peak_bytes": denoise.peak_bytes,
            "layers": [dataclasses.asdict(layer) for layer in denoise.layers],
        }
        with new_file(self._path(key), ".safetensors", "a denoise is a safetensors file") as draft:
            save_file({"frames": denoise.frames}, draft, {"denoise": json.dumps(facts)})
        return self._read(key)

    def get_or_run(self, key: str, run: Callable[[], Denoise]) -> Stored:
        """The denoise of a key, which is run and kept if it is not finished."""
        return self.get(key) or self.put(key, run())

    def _read(self, key: str) -> Stored:
        stored = self.get(key)
        if stored is None:
            raise UserError(f"cannot read {self._path(key)}, which was just written: check the disk")
        return stored

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
