"""FlexAttention, compiled once for all callers that are not compiled themselves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from block_masks.launching.transforms import in_transform

# Shapes, dtypes, scale and grad mode each need a kernel of their own. Past torch's default of 8 a compiled function
# runs eagerly, and eager flex_attention builds the S x S scores: 137 GiB at 55,296 tokens and 12 heads.
_MAX_KERNELS = 128


def _attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Any:
    return flex_attention(query, key, value, **options)


@functools.cache
def _compiled() -> Callable[..., Any]:
    # A function of our own, since torch counts kernels for each function: once other callers have used up those of
    # flex_attention, it runs eagerly for everyone, silently. With fullgraph, running out is an error.
    return torch.compile(_attend, fullgraph=True, dynamic=False)


def has_flex_kernel(query: Tensor, key: Tensor, value: Tensor, lse: bool = False) -> bool:
    """Whether to run ``flex_attention`` on these inputs: on a GPU nearly always, on a CPU rarely.

    There it has no backward and no float64, and is worth a compilation only as part of a caller that is compiled.
    Compiled kernels have no derivatives but first ones, and run on no meta tensors.
    """
    if query.is_meta or in_transform(query, key, value):
        return False
    if query.device.type != "cpu":
        return True
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return torch.compiler.is_compiling() and query.dtype != torch.float64 and not needs_grad and not lse


def compiled_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_mask: BlockMask | None,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``flex_attention``, compiled as part of the caller's graph, or by itself.

    Returns:
        The output, and its natural log-sum-exp if ``lse``.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: after 128 combinations of shapes, dtype, scale and grad mode in
            one process.
    """
    if not lse:
        return _run(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa), None
    output, aux = _run(
        query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa, return_aux=AuxRequest(lse=True)
    )
    return output, aux.lse


def _run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    if torch.compiler.is_compiling():
        return flex_attention(query, key, value, **options)
    with torch.compiler.config.patch(recompile_limit=_MAX_KERNELS):  # pyright: ignore[reportAttributeAccessIssue]
        return _compiled()(query, key, value, options)
