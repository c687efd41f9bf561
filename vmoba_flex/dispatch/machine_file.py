"""Files of machines: where they lie, and that they appear whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

_FORMAT = 1  # goes up when what a file holds changes its meaning


def folder() -> Path:
    """``vmoba_flex`` in ``$XDG_CACHE_HOME``, which is ``~/.cache`` if unset."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vmoba_flex"


def read(path: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
        OSError: if there is none.
        ValueError: if it is not one of ours.
    """
    facts = json.loads(path.read_text())
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT or not isinstance(facts.get("machine"), dict):
        raise ValueError(f"not a machine of format {_FORMAT}")
    return facts


def write(path: Path, facts: dict[str, Any]) -> None:
    """Writes a file, whose folder is made. Of several processes that write it, one wins.

    Raises:
        OSError: if it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, draft = tempfile.mkstemp(suffix=".draft", dir=path.parent)
    try:
        with os.fdopen(number, "w") as file:
            json.dump({"format": _FORMAT, **facts}, file, indent=1)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
