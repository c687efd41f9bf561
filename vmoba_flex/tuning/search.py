"""What to try next: a search that asks for few trials, knows nothing of models, and is the same each time."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

from vmoba_flex.tuning.setting import DENSE, DENSITIES, Choice, Setting


class Trial(NamedTuple):
    """What a setting came to.

    Attributes:
        setting: that was tried.
        psnr: in dB to full attention's video, of each prompt and seed, in order; fewer where the trial was stopped.
        cost: (query, key) pairs as a share of full attention's; see ``cost.py``.
        seconds: of the denoising steps, mean over what was run.
        complete: whether all prompts and seeds were run.
    """

    setting: Setting
    psnr: tuple[float, ...]
    cost: float
    seconds: float
    complete: bool

    @property
    def worst(self) -> float:
        """The lowest PSNR in dB."""
        return min(self.psnr)


# Takes a setting, the PSNR below which it is of no use, and the most denoises to run.
Try = Callable[[Setting, float, int | None], Trial]
PAPER = Setting()
"""The paper's setting for inference without training."""

_RACE = Setting(density=DENSITIES.index(0.125))
_GATES: tuple[Choice, ...] = ("mean", "spread")
_REMEMBERED: tuple[Choice, ...] = ("remembered", "remembered by head", "remembered by layer")


def best_families(attempt: Try) -> list[Setting]:
    """Of the gates, and of remembered choices, the most faithful at one density, on the first prompt and seed.

    With or without a tail. One of each, the better one first: which is cheaper depends on the number of steps that
    share the cost of finding exact masses.
    """
    winners = []
    for choices in (_REMEMBERED, _GATES):
        race = [dataclasses.replace(_RACE, choice=choice, tail=tail) for choice in choices for tail in (False, True)]
        winners.append(max((attempt(one, 0.0, 1) for one in race), key=lambda trial: (trial.psnr[0], -trial.cost)))
    return [trial.setting for trial in sorted(winners, key=lambda trial: -trial.psnr[0])]


def cheapest(
    attempt: Try, expected: Callable[[Setting], float], num_steps: int, kinds: list[str], wanted: float
) -> Trial | None:
    """The setting of the least cost whose worst PSNR is at least ``wanted``; None if none has.

    Args:
        attempt: tries a setting.
        expected: the cost of a setting before it is tried.
        num_steps: of a denoise.
        kinds: of layers.
        wanted: in dB.
    """
    paper = attempt(PAPER, wanted, None)
    best = paper if _reaches(paper, wanted) else None
    families = best_families(attempt)

    def test(setting: Setting) -> bool:
        nonlocal best
        trial = attempt(setting, wanted, None)
        if not _reaches(trial, wanted):
            return False
        if best is None or trial.cost < best.cost:
            best = trial
        return True

    def pays(setting: Setting) -> bool:
        return setting.fits and (best is None or expected(setting) < best.cost)

    for dense, family in product(_dense_shares(num_steps), families):
        rungs = [dataclasses.replace(family, dense=dense, density=i) for i in range(len(DENSITIES))]
        rungs = [one for one in rungs if pays(one)]
        # If the most faithful of those that pay fails, so do the others.
        if not rungs or not test(rungs[0]):
            continue
        low, high = 0, len(rungs)  # the last that reaches, the first that does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if test(rungs[middle]) else (low, middle)
    before = None
    while best is not None and best is not before:
        before = best
        for one in _lower(best.setting, kinds):
            # A density that whole blocks round to the same number reaches what is wanted, and saves nothing.
            if pays(one) and test(one) and best is not before:
                break
    return best


def most_faithful(attempt: Try, expected: Callable[[Setting], float], num_steps: int, budget: float) -> Trial | None:
    """The setting of the highest worst PSNR whose cost is at most ``budget``; None if none is as cheap.

    Args:
        attempt: tries a setting.
        expected: the cost of a setting before it is tried.
        num_steps: of a denoise.
        budget: as a share of full attention's cost.
    """
    attempt(PAPER, 0.0, None)
    families, best = best_families(attempt), None
    for dense, family, falls in product(_dense_shares(num_steps), families, (False, True)):
        for i in range(len(DENSITIES)):
            setting = dataclasses.replace(family, dense=dense, density=i, falls=falls)
            if expected(setting) > budget:
                continue
            trial = attempt(setting, 0.0 if best is None else best.worst, None)
            if trial.cost <= budget:  # else whole blocks made it dearer than expected, and a lower density is next
                best = trial if trial.complete and (best is None or trial.worst > best.worst) else best
                break
    return best


def frontier(trials: list[Trial]) -> list[Trial]:
    """The complete trials that no other one beats in both cost and fidelity, the cheapest first."""
    found: list[Trial] = []
    for trial in sorted((one for one in trials if one.complete), key=lambda one: (one.cost, -one.worst)):
        if not found or trial.worst > found[-1].worst:
            found.append(trial)
    return found


def _dense_shares(num_steps: int) -> list[float]:
    """Shares of different numbers of dense steps, the paper's first."""
    shares: dict[int, float] = {}
    for share in DENSE:
        shares.setdefault(Setting(dense=share).dense_steps(num_steps), share)
    return sorted(shares.values(), key=lambda share: (abs(share - PAPER.dense), share))


def _lower(setting: Setting, kinds: list[str]) -> Iterator[Setting]:
    """Settings that are cheaper by one change."""
    if not setting.falls:
        yield dataclasses.replace(setting, falls=True)
    yield from (setting.lowered(kind) for kind in kinds if len(kinds) > 1)


def _reaches(trial: Trial, wanted: float) -> bool:
    return trial.complete and trial.worst >= wanted
