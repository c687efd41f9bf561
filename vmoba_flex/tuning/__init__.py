"""The settings of a model that reach a wanted fidelity at the least cost, or the best fidelity at a wanted speed-up.

    setting.py     what is varied -> a config
    cost.py        a config, and what its layers attended -> its cost as a share of full attention's
    search.py      what to try next, until the best is found
    trials.py      a setting -> its fidelity and cost, by paired denoises on disk
    tune.py        the public call
    report.py      the frontier as text, JSON and a picture

It needs the extra `compare`, imported where it is used.
"""

from vmoba_flex.tuning.search import Trial
from vmoba_flex.tuning.setting import Setting
from vmoba_flex.tuning.tune import Tuned, tune

__all__ = ["Setting", "Trial", "Tuned", "tune"]
