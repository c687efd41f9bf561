"""What commands share: errors that their users can mend, and files that appear whole or not at all."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A command cannot go on for a reason that its user can mend; the message says how, in one line."""


def check_extra(extra: str, *modules: str) -> None:
    """Raises ``UserError`` unless ``modules``, which the extra of this package brings, are there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'this needs {", ".join(missing)}: pip install "vmoba-flex[{extra}]"')


@contextmanager
def new_file(path: Path, suffix: str, what: str) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end and vanishes on failure.

    Args:
        path: where the file goes; in a folder that exists.
        suffix: that its name must have, with the dot.
        what: the file in words, for the error.

    Raises:
        UserError: if the name has another suffix, is a folder's, or cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"{what}, so its name must end in {suffix}, got {path}")
    if path.is_dir():
        raise UserError(f"cannot write {path}, which is a folder: name a file")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Made at once, so that a folder that cannot be written is known before the work and not after.
        draft.touch()
        yield draft
        os.replace(draft, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): name a file in a folder that you can write"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
