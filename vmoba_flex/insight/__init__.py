"""Tools to choose settings for a model, from its own query and key.

    capture.py     an applied model -> records, as it runs
    records.py     query and key of one layer at one step; files of them
    masses.py      records -> full attention of some queries, and what a choice with or without a tail keeps of it
    measure.py     records, rule or config -> density, recall, overlap, entropy of each head
    search.py      a rule and what is wanted -> the smallest such rule that reaches it
    calibrate.py   records, a wanted recall, overlap or density -> config
    crossover.py   times of sparse and full attention -> the tokens from which sparse wins
    profile.py     times of all dispatches -> the machine that "auto" decides by
    plot.py        all of these -> PNG; needs matplotlib
    commands.py    the same on the command line

Reading and writing files needs safetensors; both come with the extra ``insight``.
"""

from vmoba_flex.insight.calibrate import Calibrated, calibrate
from vmoba_flex.insight.capture import capture
from vmoba_flex.insight.crossover import Timing, break_even, crossover
from vmoba_flex.insight.measure import HeadReport, inspect
from vmoba_flex.insight.records import Record, load, save

__all__ = [
    "Calibrated",
    "HeadReport",
    "Record",
    "Timing",
    "break_even",
    "calibrate",
    "capture",
    "crossover",
    "inspect",
    "load",
    "save",
]
