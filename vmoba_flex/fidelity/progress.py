"""A progress bar over denoises, in place of the pipeline's own."""

from typing import Any, Self


class Progress:
    """Counts denoises, and shows which runs and its step; a context manager.

    Args:
        total: denoises.
        shown: whether there is a bar.
        pipe: whose own bar is off meanwhile.
    """

    def __init__(self, total: int, shown: bool, pipe: Any) -> None:
        self._total, self._shown, self._pipe = total, shown, pipe
        self._words, self._step = "", 0
        self._before: Any = None

    def __enter__(self) -> Self:
        from tqdm import tqdm

        if hasattr(self._pipe, "set_progress_bar_config"):
            self._before = dict(getattr(self._pipe, "_progress_bar_config", {}))
            self._pipe.set_progress_bar_config(**self._before | {"disable": True})
        self._bar = tqdm(total=self._total, disable=not self._shown, unit="denoise", leave=False, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._before is not None:
            self._pipe.set_progress_bar_config(**self._before)

    def begin(self, words: str) -> None:
        """A denoise begins, or what is done after them."""
        self._words, self._step = words, 0
        self._bar.set_description_str(words)

    def step(self) -> None:
        """A step of it is done."""
        self._step += 1
        self._bar.set_description_str(f"{self._words}, step {self._step}")

    def end(self) -> None:
        """It is done."""
        self._bar.update()
