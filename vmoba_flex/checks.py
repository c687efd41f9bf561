"""Checks of single values, made where an object or a call takes them: a bad one raises ``TypeError`` or ``ValueError``.

Checks of tensors are in ``inputs``.
"""

from typing import Any


def is_int(value: Any) -> bool:
    """Whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` is an int."""
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is an int of at least 1."""
    check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_count(name: str, value: Any, end: int | None = None, end_name: str = "") -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is an int of at least 0, and below ``end`` if given."""
    check_int(name, value)
    if end is not None and not 0 <= value < end:
        raise ValueError(f"{name} must lie in 0..{end_name} - 1 = 0..{end - 1}, got {value}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_sizes(name: str, value: Any, length: int = 3) -> tuple[int, ...]:
    """The sizes as a tuple, of a tuple or list; raises unless they are ``length`` ints of at least 1."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of {length} ints, got {value!r}")
    if any(not is_int(size) for size in value):
        raise TypeError(f"{name} must hold ints, got {value!r}")
    if len(value) != length:
        raise ValueError(f"{name} must have {length} sizes, got {value!r}")
    if any(size < 1 for size in value):
        raise ValueError(f"{name} must be at least 1 everywhere, got {value!r}")
    return tuple(value)


def check_ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids in order, each once, of a tuple or list; raises unless they are ints of at least 0."""
    if not isinstance(value, tuple | list):
        hint = f": one id is ({value},)" if is_int(value) else ""
        raise TypeError(f"{name} must be a tuple of ints, got {value!r}{hint}")
    if any(not is_int(each) for each in value):
        raise TypeError(f"{name} must hold ints, got {value!r}")
    if any(each < 0 for each in value):
        raise ValueError(f"{name} must be at least 0 everywhere, got {value!r}")
    return tuple(sorted(set(value)))


def check_number(name: str, value: Any, expected: str = "a number") -> float:
    """The value as a plain int or float; raises ``TypeError`` unless it is one.

    A subclass of float, such as NumPy's ``float64``, becomes a float, since compiled graphs take no other.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    return value if type(value) in (int, float) else float(value)


def check_share(name: str, value: Any) -> float:
    """The value as a plain number; raises ``TypeError`` or ``ValueError`` unless it is a number in (0, 1]."""
    number = check_number(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
    return number


def check_bool(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:  # an array compares entry by entry
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
