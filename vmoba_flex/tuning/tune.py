"""The public call: a pipeline and a wish -> a config, and what was tried on the way."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmoba_flex.checks import check_count, check_number
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.denoise import Prompt
from vmoba_flex.fidelity.store import Store
from vmoba_flex.tuning.search import PAPER, Trial, cheapest, frontier, most_faithful
from vmoba_flex.tuning.trials import Trials


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        config: the settings.
        best: their trial.
        paper: the trial of the paper's setting; stopped early where it was of no use.
        trials: all, in the order in which they were tried.
        wanted: fidelity in dB, or speed-up, in words.
        denoises: that were run; those on disk before do not count.
    """

    config: VMoBAConfig
    best: Trial
    paper: Trial
    trials: tuple[Trial, ...]
    wanted: str
    denoises: int

    @property
    def frontier(self) -> list[Trial]:
        """The trials that no other one beats in both cost and fidelity, the cheapest first."""
        return frontier(list(self.trials))


def tune(
    pipe: Any,
    *,
    prompts: Sequence[Prompt],
    folder: Path | str,
    seeds: Sequence[int] = (0, 1),
    fidelity: float | None = None,
    speed_up: float | None = None,
    base: VMoBAConfig | None = None,
    call: Mapping[str, Any] | None = None,
    progress: Callable[[str], object] = lambda words: None,
) -> Tuned:
    """The cheapest settings that reach a fidelity, or the most faithful ones at a speed-up, by denoises of the model.

    Each trial denoises the prompts and seeds under full attention and under a config, from the same noise. Its fidelity
    is the worst PSNR between them; it is stopped at the first one that is too low. Searched are the way to choose
    blocks (gates, remembered choices, budgets over the queries of a head or the heads of a layer), a tail, the number
    of dense first steps, the density of each kind of layers, and densities that fall. Cost is counted in (query, key)
    pairs: attended, of a tail, and scored to find exact masses; so it is the same on each machine. Denoises are kept in
    ``folder``: a search that was broken off goes on where it was, and one that is repeated finds the same.

    Args:
        pipe: a pipeline that ``apply_vmoba`` takes, without VMoBA applied; it is left so.
        prompts: texts, or arguments of the pipeline's call. Give those that are hard for you: what was not seen may
            come out lower.
        folder: for denoises.
        seeds: of the noise.
        fidelity: wanted PSNR in dB to full attention's video, of the worst prompt and seed.
        speed_up: instead: wanted cost of full attention over that of the settings, above 1.
        base: whose blocks, cycle, dense layers, dispatch and backend the settings have;
            ``VMoBAConfig.paper("inference")`` by default.
        call: further arguments of the pipeline's call, such as height, width and number of steps.
        progress: called before each denoise, with what it is.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if one is out of range, the pipeline tells no steps, or nothing that was tried is as faithful or as
            cheap as wanted.
    """
    if (fidelity is None) == (speed_up is None):
        raise ValueError(f"exactly one of fidelity and speed_up must be given, got {fidelity} and {speed_up}")
    wish = check_number("fidelity" if speed_up is None else "speed_up", fidelity if speed_up is None else speed_up)
    if speed_up is not None and not wish > 1:
        raise ValueError(f"speed_up must be above 1, got {speed_up}")
    if isinstance(prompts, str | Mapping) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r:.80}")
    if not seeds:
        raise ValueError(f"seeds must hold at least one seed, got {seeds!r}")
    for seed in seeds:
        check_count("seeds", seed)
    base = VMoBAConfig.paper("inference") if base is None else base
    if not isinstance(base, VMoBAConfig):
        raise TypeError(f"base must be a VMoBAConfig or None, got {type(base).__name__}")
    trials = Trials(pipe, base, prompts, seeds, call or {}, Store(folder), progress)
    steps, kinds = trials.num_steps, list(dict.fromkeys(base.cycle))
    if speed_up is None:
        wanted = f"at least {wish:g} dB"
        best = cheapest(trials.attempt, trials.expected, steps, kinds, wish)
    else:
        wanted = f"at most 1 / {wish:g} of full attention's pairs"
        best = most_faithful(trials.attempt, trials.expected, steps, 1 / wish)
    done = tuple(trials.done.values())
    if best is None:
        nearest = max(done, key=lambda one: one.worst) if speed_up is None else min(done, key=lambda one: one.cost)
        raise ValueError(
            f"{'fidelity' if speed_up is None else 'speed_up'} must be one that can be reached, {wanted}, got "
            f"{nearest.worst:.1f} dB at {nearest.cost:.2f} of the pairs as the nearest of {len(done)} settings: want "
            "less, or give a base with other blocks"
        )
    return Tuned(best.setting.config(base), best, trials.done[PAPER], done, wanted, trials.denoises)
