"""VMoBA sparse attention (arXiv 2506.23858) for video diffusion transformers, on PyTorch's FlexAttention.

A *block* here is a VMoBA key block, one cell of the latent video grid. What FlexAttention calls a block (the 128 x 128
rectangle that it runs or skips) is called a *tile*.

    out = flex_attention(q, k, v, block_mask=vmoba_mask(q, k, partition, rule))     # the plain way
    out = vmoba_attention(q, k, v, partition, rule)                                 # the fast way, same result

Each name loads its module, and torch with it, when it is first used: ``vmoba-flex --help`` needs neither.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from vmoba_flex.version import __version__

if TYPE_CHECKING:
    from vmoba_flex.approx_blocks import ApproxBlocks
    from vmoba_flex.attention import vmoba_attention
    from vmoba_flex.by_steps import BySteps
    from vmoba_flex.config import VMoBAConfig
    from vmoba_flex.dispatch.machine import Machine, use_machine
    from vmoba_flex.fidelity.compare import compare
    from vmoba_flex.fidelity.comparison import Comparison
    from vmoba_flex.flex_inputs import FlexInputs, vmoba_inputs
    from vmoba_flex.layer import Layer
    from vmoba_flex.mask import vmoba_mask
    from vmoba_flex.models import VMoBAHandle, apply_vmoba, register_adapter
    from vmoba_flex.module import VMoBAAttention
    from vmoba_flex.partition import BlockPartition
    from vmoba_flex.remember import Remember
    from vmoba_flex.rules import Threshold, TopK
    from vmoba_flex.selection.choose import vmoba_selection
    from vmoba_flex.selection.exact_gate import block_masses
    from vmoba_flex.selection.kept import Selection
    from vmoba_flex.stats import AttentionStats
    from vmoba_flex.tail import Tail
    from vmoba_flex.warmup import Warmup

__all__ = [
    "ApproxBlocks",
    "AttentionStats",
    "BlockPartition",
    "BySteps",
    "Comparison",
    "FlexInputs",
    "Layer",
    "Machine",
    "Remember",
    "Selection",
    "Tail",
    "Threshold",
    "TopK",
    "VMoBAAttention",
    "VMoBAConfig",
    "VMoBAHandle",
    "Warmup",
    "__version__",
    "apply_vmoba",
    "block_masses",
    "compare",
    "register_adapter",
    "use_machine",
    "vmoba_attention",
    "vmoba_inputs",
    "vmoba_mask",
    "vmoba_selection",
]

_MODULES = {
    "ApproxBlocks": "approx_blocks",
    "AttentionStats": "stats",
    "BlockPartition": "partition",
    "BySteps": "by_steps",
    "Comparison": "fidelity.comparison",
    "FlexInputs": "flex_inputs",
    "Layer": "layer",
    "Machine": "dispatch.machine",
    "Remember": "remember",
    "Selection": "selection.kept",
    "Tail": "tail",
    "Threshold": "rules",
    "TopK": "rules",
    "VMoBAAttention": "module",
    "VMoBAConfig": "config",
    "VMoBAHandle": "models",
    "Warmup": "warmup",
    "apply_vmoba": "models",
    "block_masses": "selection.exact_gate",
    "compare": "fidelity.compare",
    "register_adapter": "models",
    "use_machine": "dispatch.machine",
    "vmoba_attention": "attention",
    "vmoba_inputs": "flex_inputs",
    "vmoba_mask": "mask",
    "vmoba_selection": "selection.choose",
}


def __getattr__(name: str) -> Any:
    if name == "AboutBlocks":
        warnings.warn("AboutBlocks is now ApproxBlocks: the old name ends with the next version", DeprecationWarning, 2)
        return __getattr__("ApproxBlocks")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
