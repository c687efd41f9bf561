"""The command ``vmoba-flex``: runs a command, and ends in one line whatever stops it."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TextIO

from vmoba_flex.arguments import parse
from vmoba_flex.user_error import UserError

_SECONDS_TO_DELETE = 1.0


class _Stopped(BaseException):
    """A signal asks to stop: not an error, so that only ``finally`` and ``main`` see it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: 2 where the user has to mend something, 128 + n where signal n stopped it (130 for Ctrl-C, 141
        where the reader of the output is gone).
    """
    stopped: list[int] = []
    try:
        with _signals_raise(stopped):
            try:
                arguments = parse(argv)
                _write(_command(arguments.command)(arguments) + "\n")
            finally:
                _write("")  # what --help wrote, too
    except BaseException as error:
        # First the signal: an import that it broke off, say, may go on to raise an error of its own.
        if stopped:
            return _end(128 + stopped[0], f"stopped by {signal.Signals(stopped[0]).name}")
        if isinstance(error, UserError):
            return _end(2, f"error: {error}")
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
        raise
    return 0


def _command(name: str) -> Callable[[Any], str]:
    if name == "demo":
        from vmoba_flex.demo.show import run_demo

        return run_demo
    from vmoba_flex.insight import commands

    return {
        "inspect": commands.run_inspect,
        "calibrate": commands.run_calibrate,
        "plot": commands.run_plot,
        "bench": commands.run_bench,
    }[name]


def _write(text: str) -> None:
    """Writes to stdout for good.

    Raises:
        BrokenPipeError: if its reader is gone.
        UserError: if it cannot be written.
    """
    if sys.stdout is None:
        if text:
            raise UserError("cannot write the report (stdout is closed): give it a place to go")
        return
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write the report ({error.strerror}): give it a place to go") from error


def _end(code: int, words: str) -> int:
    if sys.stderr is not None:
        try:
            sys.stderr.write(f"vmoba-flex: {words}\n")
            sys.stderr.flush()
        except OSError:
            _drop(sys.stderr)  # nobody can be told, but the exit code stays
    return code


def _drop(stream: TextIO) -> None:
    """Python flushes once more as it ends; that must not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _signals_raise(stopped: list[int]) -> Iterator[None]:
    """Has Ctrl-C and requests to end raise ``_Stopped``, so that files under way are deleted.

    Args:
        stopped: takes the numbers of the signals that raised.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may set handlers
    # What is ignored stays so: nohup ignores SIGHUP.
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    last = -math.inf

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal last
        earlier, last = last, time.monotonic()
        # Files are deleted undisturbed. A later signal raises again, since what runs may have swallowed the first.
        if last - earlier > _SECONDS_TO_DELETE:
            stopped.append(number)
            raise _Stopped

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
