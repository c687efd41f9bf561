"""What is logged once."""

import logging
from collections.abc import Callable
from typing import Any

_LOG = logging.getLogger(__name__)


class Told:
    """What has been logged of one thing, such as a model: each reason, and each line about what ran, is logged once."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()
        self.lines: set[str] = set()

    def inform(self, line: Callable[[], str]) -> None:
        """Logs what ran, the first time; ``line`` is called only where that is logged."""
        if _LOG.isEnabledFor(logging.INFO) and (words := line()) not in self.lines:
            self.lines.add(words)
            _LOG.info("%s", words)

    def tell(self, reason: str, *details: Any) -> None:
        """Logs a warning, the first time."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            _LOG.warning(reason, *details)
