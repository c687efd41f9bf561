"""The attentions of the study of whole denoises: variants, block shapes and densities."""

import dataclasses
from typing import Any, NamedTuple

from bench.common.sizes import Sizes3
from bench.quality.runs import MAIN, SIZES, SMALL_SIZES, Size
from vmoba_flex import Tail, TopK, VMoBAConfig, __version__
from vmoba_flex.config import KINDS


class Setting(NamedTuple):
    """A model's size, and the blocks and cells that fit its grid.

    Attributes:
        size: of the model and its videos.
        temporal: frames of a slab.
        spatial: height and width of a window, in tokens.
        spatiotemporal: frames, height and width of a cube, in tokens.
        cell: of a tail, in tokens; no larger than any of the blocks.
    """

    size: Size
    temporal: int
    spatial: tuple[int, int]
    spatiotemporal: Sizes3
    cell: Sizes3


# 8 slabs, 48 windows and 72 cubes.
MAIN_SETTING = Setting(SIZES[MAIN], 2, (3, 6), (4, 8, 6), cell=(2, 3, 6))
SMALL_SETTING = Setting(SMALL_SIZES[MAIN], 1, (3, 2), (2, 3, 2), cell=(1, 3, 2))

# Each variant's arguments of VMoBAConfig; the Tail itself depends on the setting.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"dispatch": "packed"},
    "tail": {"dispatch": "packed", "tail": True},
    "shared": {"dispatch": "shared"},
    "shared, tail": {"dispatch": "shared", "tail": True},
}
WITHOUT_TAIL = {"tail": "plain", "shared, tail": "shared"}
"""What each variant with a tail is compared with."""

CYCLES = {"cycle": KINDS, "cubes": ("spatiotemporal",)}
DENSITIES = (0.25, 0.125, 0.083, 0.0625, 0.03)

TUNED_VARIANTS = ("plain", "tail")
TUNED_DENSITIES = (0.125, 0.0625)
"""What the weights of full attention are tuned for, on the cycle."""


def full(setting: Setting) -> VMoBAConfig:
    """Full attention in all layers."""
    return VMoBAConfig(*setting[1:4], TopK(density=1.0), dispatch="dense")


def takes_tail() -> bool:
    """Whether ``VMoBAConfig`` takes a tail."""
    return any(field.name == "tail" for field in dataclasses.fields(VMoBAConfig))


def config(variant: str, cycle: str, density: float, setting: Setting, device: str) -> VMoBAConfig:
    """A variant's attention, by Triton on a GPU: it gives the same bits each time.

    Raises:
        NotImplementedError: if the variant has a tail and ``VMoBAConfig`` takes none.
    """
    arguments = dict(VARIANTS[variant])
    if "tail" in arguments:
        if not takes_tail():
            raise NotImplementedError(f"VMoBAConfig of vmoba_flex {__version__} takes no tail")
        arguments["tail"] = Tail(cell=setting.cell)
    backend = "triton" if device == "cuda" else "auto"
    return VMoBAConfig(*setting[1:4], TopK(density=density), cycle=CYCLES[cycle], backend=backend, **arguments)
