"""Checks of single values: a bad one raises ``TypeError`` or ``ValueError`` with its name."""

from typing import Any


def check_positive(name: str, value: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
