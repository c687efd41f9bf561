"""FlashAttention-4 without the warning that it gives for each kernel that it compiles, which is about its own code."""

import functools
import warnings


@functools.cache
def ignore_its_warning() -> None:
    """Keeps the warning from users, for the rest of the process; others still show."""
    warnings.filterwarnings("ignore", r"Argument aux_data ", UserWarning)
