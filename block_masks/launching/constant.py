"""Functions and sizes that ``torch.compile`` takes as constants, without loading the compiler."""

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import ``torch._dynamo`` wherever a module uses it.

    That import takes as long as torch's own. A test compares the two marks, for this one is private to torch.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    return function


def constant_size(size: int) -> int:
    """The size, at least 0, as a constant of compiled graphs: there is one graph for each value."""
    return len(range(size))  # int() would leave a symbolic size symbolic
