"""What is logged once."""

import logging
from collections.abc import Callable
from typing import Any


class Told:
    """What has been logged of one thing, such as a model: each reason, and each line about what ran, is logged once.

    Args:
        logger: the name of the logger.
    """

    def __init__(self, logger: str) -> None:
        self.logger = logging.getLogger(logger)
        self.reasons: set[str] = set()
        self.lines: set[str] = set()

    def inform(self, line: Callable[[], str]) -> None:
        """Logs what ran, the first time; ``line`` is called only where that is logged."""
        if self.logger.isEnabledFor(logging.INFO) and (words := line()) not in self.lines:
            self.lines.add(words)
            self.logger.info("%s", words)

    def tell(self, reason: str, *details: Any) -> None:
        """Logs a warning, the first time."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            self.logger.warning(reason, *details)
