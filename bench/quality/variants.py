"""The attentions of the study of whole denoises: variants, block shapes, densities, and the parts of the study."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from bench.common.sizes import Sizes3
from bench.quality.runs import MAIN, SIZES, SMALL_SIZES, Size
from vmoba_flex import Tail, TopK, VMoBAConfig
from vmoba_flex.config import KINDS
from vmoba_flex.rules import Gate

DENSE_STEPS = 5
"""Steps with full attention before the others, unless a variant says otherwise."""

# A falling density is asked for at the end: until this share of the steps it is so many times that.
_FALLING = ((0.25, 4), (0.5, 2))


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


class Variant(NamedTuple):
    """One attention over the steps of a denoise.

    Attributes:
        dispatch: ``"packed"``, which is exact, or ``"shared"``.
        tail: whether skipped blocks take part by their cells.
        gate: what blocks are chosen by; ``"exact"`` is the oracle.
        remembers: whether sparse steps attend what the last dense step's exact masses choose, instead of choosing.
        dense: full attention in so many first steps.
        every: full attention again in each so-manieth step after the first dense ones; 0 for never.
        falls: whether the density is four times, then twice what is asked, until a quarter and half of the steps.
    """

    dispatch: Literal["packed", "shared"] = "packed"
    tail: bool = False
    gate: Gate = "mean"
    remembers: bool = False
    dense: int = DENSE_STEPS
    every: int = 0
    falls: bool = False

    @property
    def name(self) -> str:
        """As the tables have it."""
        words = ["shared"] * (self.dispatch == "shared") + ["tail"] * self.tail or ["plain"]
        words += [f"{self.gate} gate"] * (self.gate != "mean") + ["remembered"] * self.remembers
        words += [f"{self.dense} dense"] * (self.dense != DENSE_STEPS) + [f"dense every {self.every}"] * bool(
            self.every
        )
        return ", ".join([*words, *["falling"] * self.falls])

    @property
    def changes(self) -> bool:
        """Whether a step's attention depends on the steps before it or on its number, beyond the first dense ones."""
        return self.remembers or self.falls or bool(self.every)

    def is_dense(self, step: int) -> bool:
        """Whether a step attends everything."""
        return step < self.dense or (self.every > 0 and (step - self.dense + 1) % self.every == 0)

    def density(self, asked: float, step: int, steps: int) -> float:
        """The density of a sparse step, of ``steps``."""
        factors = [factor for share, factor in _FALLING if self.falls and step < share * steps]
        return asked * max(factors, default=1)


PLAIN = Variant()
FIRST = (PLAIN, Variant(tail=True), Variant("shared"), Variant("shared", tail=True))
_BOTH = (Variant(tail=True), Variant("shared", tail=True))

CYCLES = {"cycle": KINDS, "cubes": ("spatiotemporal",)}
DENSITIES = (0.25, 0.125, 0.083, 0.0625, 0.03)
FEW = (0.125, 0.0625)

TUNED_VARIANTS = (PLAIN, Variant(tail=True))
"""What the weights of full attention are tuned for, on the cycle, at the densities of ``FEW``."""

PARTS = ("tail", "gates", "remembered", "again", "falling", "tuned")


def cases(part: str) -> Iterator[tuple[Variant, float]]:
    """Variants and densities of a part of the study, the most urgent first.

    ``"tail"``: with and without a tail. ``"gates"``: what blocks are chosen by. ``"remembered"``: chosen by the masses
    of the last of 1, 2 or 5 dense steps. ``"again"``: with dense steps between the sparse ones. ``"falling"``: with
    densities that fall. Tuning has variants of its own.
    """
    if part == "tail":
        yield from ((variant, density) for density in DENSITIES for variant in FIRST)
    elif part == "gates":
        gates: tuple[Gate, ...] = ("spread", "exact", "cells")
        for variant in (*_BOTH, PLAIN):
            yield from ((variant._replace(gate=gate), density) for density in FEW for gate in gates)
    elif part == "remembered":
        for dense in (DENSE_STEPS, 2, 1):
            for variant in (each._replace(remembers=True, dense=dense) for each in _BOTH):
                yield from ((variant, density) for density in (*FEW, 0.25))
            if dense != DENSE_STEPS:  # what the gate chooses after as few
                yield from ((variant._replace(dense=dense), FEW[0]) for variant in _BOTH)
        yield from ((PLAIN._replace(remembers=True), density) for density in (FEW[0], 0.25))
    elif part == "again":
        for dense, every in ((2, 6), (DENSE_STEPS, 5), (1, 5)):
            for variant in (each._replace(remembers=True, dense=dense, every=every) for each in _BOTH):
                yield from ((variant, density) for density in FEW)
    elif part == "falling":
        for every in (0, 6):
            for variant in (each._replace(remembers=True, dense=2, every=every, falls=True) for each in _BOTH):
                yield from ((variant, density) for density in (0.0625, 0.03))
        yield from ((variant._replace(dense=2, falls=True), 0.0625) for variant in _BOTH)


def full(setting: Setting) -> VMoBAConfig:
    """Full attention in all layers."""
    return VMoBAConfig(*setting[1:4], TopK(density=1.0), dispatch="dense")


def config(variant: Variant, cycle: str, density: float, setting: Setting, device: str) -> VMoBAConfig:
    """A variant's attention in a sparse step, by Triton on a GPU: it gives the same bits each time."""
    backend = "triton" if device == "cuda" else "auto"
    tail = Tail(cell=setting.cell) if variant.tail else None
    rule = TopK(density=density, gate=variant.gate)
    return VMoBAConfig(*setting[1:4], rule, cycle=CYCLES[cycle], dispatch=variant.dispatch, backend=backend, tail=tail)
