"""Makes a tensor real before a ``mask_mod`` captures it.

Inductor inlines whatever produced a captured tensor into the attention kernel. Where the producer is a scatter it
then reads the tensor as all False, without a warning; where it is pointwise the kernel may round it differently from
the tile lists, or fail to compile. ``Tensor.clone`` is inlined just the same. A custom op is opaque to Inductor, so
its result is a buffer in memory.
"""

import torch
from torch import Tensor

from block_masks.checks import check_tensor


@torch.library.custom_op("block_masks::realize", mutates_args=())
def _realize(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_realize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def realize(x: Tensor) -> Tensor:
    """Returns ``x`` as a contiguous buffer that no compiler pass can fold into its reader.

    Outside ``torch.compile`` every tensor is a buffer already, so ``x`` comes back as it is, or contiguous.

    Args:
        x: any tensor that needs no gradient.

    Raises:
        TypeError: if ``x`` is no dense tensor.
    """
    check_tensor("x", x)
    return _realize(x) if torch.compiler.is_compiling() else x.contiguous()
