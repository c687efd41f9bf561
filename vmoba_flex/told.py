"""What is logged once."""

import logging
from typing import Any

_LOG = logging.getLogger(__name__)


class Told:
    """What has been logged of one thing, such as a model: each reason is logged once."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()

    def tell(self, reason: str, *details: Any) -> None:
        """Logs a warning, the first time."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            _LOG.warning(reason, *details)
