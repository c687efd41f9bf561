"""What commands share: errors that their users can mend, and files that appear whole or not at all."""

import importlib.util
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something that the user can mend; the message says how, in one line, which commands print."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def checked_path(path: Any) -> Path:
    """The path; raises ``TypeError`` unless it is a str or a ``Path``."""
    if not isinstance(path, str | Path):
        raise TypeError(f"path must be a str or a Path, got {path!r}")
    return Path(path)


def check_extra(extra: str, *modules: str) -> None:
    """Raises ``UserError`` unless ``modules``, which an extra of this package brings, can be found."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        # The names of modules and packages are the same; the package itself is on no index.
        raise UserError(
            f"this needs {', '.join(missing)}: pip install {' '.join(missing)} (in a clone: pip install '.[{extra}]')"
        )


@contextmanager
def new_file(path: Path, suffix: str, what: str) -> Iterator[Path]:
    """A file next to ``path`` to write to. It takes the place of ``path`` at the end, and is deleted on failure.

    Args:
        path: where the file goes, in a folder that exists.
        suffix: which its name must have, with the dot.
        what: the file in words, for the error.

    Raises:
        UserError: if the name has another suffix, is a folder's, or the file cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"{what}, so its name must end in {suffix}, got {path}")
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}, which is a folder: name a file")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Made at once: a folder that cannot be written fails before the work and not after it.
        draft.touch()
        mode = stat.S_IMODE(draft.stat().st_mode)  # by the umask, which some writers do not follow
        yield draft
        draft.chmod(mode)
        os.replace(draft, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): name a file in a folder that you can write"
        ) from error
    finally:
        with suppress(OSError):  # what could not be made is not there
            draft.unlink()
