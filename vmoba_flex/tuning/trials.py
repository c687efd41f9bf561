"""A setting -> its fidelity and cost, by denoises paired with full attention's: each is run once, and kept on disk."""

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.denoise import Denoise, Prompt, run_denoise
from vmoba_flex.fidelity.identity import identity_of, key_of
from vmoba_flex.fidelity.nearness import nearness
from vmoba_flex.fidelity.store import Store, Stored
from vmoba_flex.tuning.cost import expected_pairs, pairs_of
from vmoba_flex.tuning.search import PAPER, Trial
from vmoba_flex.tuning.setting import Setting


class Trials:
    """Settings of a pipeline, tried on prompts and seeds; see ``tune`` for the arguments.

    Attributes:
        done: what was tried, by setting.
        denoises: that were run or read.
    """

    def __init__(
        self,
        pipe: Any,
        base: VMoBAConfig,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        call: Mapping[str, Any],
        store: Store,
        progress: Callable[[str], object],
    ) -> None:
        self.done: dict[Setting, Trial] = {}
        self.denoises = 0
        self._pipe, self._base, self._call, self._store = pipe, base, call, store
        self._pairs = list(product(prompts, seeds))
        self._progress = progress
        self._identity = identity_of(pipe)

    @functools.cached_property
    def num_steps(self) -> int:
        """Steps of a denoise.

        Raises:
            ValueError: if the pipeline tells none.
        """
        steps = len(self._denoise(None, 0).step_seconds)
        if not steps:
            raise ValueError(f"pipe must tell its denoising steps, got a {type(self._pipe).__name__} that tells none")
        return steps

    def attempt(self, setting: Setting, useful: float, most: int | None) -> Trial:
        """Tries a setting until a denoise is less faithful than is useful, or as many are run as are wanted."""
        before, config = self.done.get(setting), setting.config(self._base)
        psnr, pairs, seconds = [], [], []
        for i in range(len(self._pairs) if most is None else most):
            one = self._denoise(config, i, setting)
            psnr.append(nearness(one.runs(), self._denoise(None, i).runs()).psnr)
            pairs.append(pairs_of(config, one.layers))
            seconds.append(sum(one.step_seconds))
            if psnr[-1] < useful:
                break
        trial = Trial(setting, tuple(psnr), fmean(pairs), fmean(seconds), len(psnr) == len(self._pairs))
        if before is None or len(before.psnr) < len(psnr):
            self.done[setting] = trial
        return trial

    def expected(self, setting: Setting) -> float:
        """The cost of a setting before it is tried."""
        return expected_pairs(setting.config(self._base), self._num_layers, self.num_steps)

    @functools.cached_property
    def _num_layers(self) -> int:
        return len({one.layer for one in self._denoise(PAPER.config(self._base), 0, PAPER).layers})

    def _denoise(self, config: VMoBAConfig | None, i: int, setting: Setting | None = None) -> Stored:
        prompt, seed = self._pairs[i]
        key = key_of(self._identity, self._pipe, config, prompt, seed, self._call)

        def run() -> Denoise:
            self._progress(f"{'full attention' if setting is None else setting}, prompt and seed {i + 1}")
            self.denoises += 1
            return run_denoise(self._pipe, config, prompt, seed, self._call)

        return self._store.get_or_run(key, run)
