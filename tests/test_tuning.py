"""Tuning: the search where the best is known, what costs count, and a whole search on the model that ships."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")
pytest.importorskip("torchmetrics")

from vmoba_flex import Remember, Tail, TopK, VMoBAConfig
from vmoba_flex.cli import main
from vmoba_flex.config import KINDS
from vmoba_flex.demo.pipeline import DemoPipeline
from vmoba_flex.fidelity import run_denoise
from vmoba_flex.tuning import Setting, Trial, tune
from vmoba_flex.tuning.cost import expected_pairs, pairs_of
from vmoba_flex.tuning.report import report, save
from vmoba_flex.tuning.search import cheapest, frontier, most_faithful
from vmoba_flex.tuning.setting import DENSE, DENSITIES
from vmoba_flex.user_error import UserError

STEPS, PAIRS = 20, 4
BASE = VMoBAConfig.paper("inference")


class Model:
    """A made-up model: its fidelity rises with dense steps and density, and one way to choose is the best."""

    def __init__(self, best: Setting, rounds: bool = False) -> None:
        self.best, self.rounds, self.denoises = best, rounds, set[tuple[Setting, int]]()
        self.tried: list[Trial] = []

    def expected(self, setting: Setting) -> float:
        return expected_pairs(setting.config(BASE), 6, STEPS)

    def psnr(self, setting: Setting, i: int) -> float:
        density = DENSITIES[setting.density + sum(places for _, places in setting.lower)]
        bonus = 2 * (setting.choice == self.best.choice) + 2 * (setting.tail == self.best.tail) - 3 * setting.falls
        return 30 + 20 * setting.dense_steps(STEPS) / STEPS + 10 * density + bonus - 0.3 * i

    def attempt(self, setting: Setting, useful: float, most: int | None) -> Trial:
        psnr: list[float] = []
        for i in range(most or PAIRS):
            self.denoises.add((setting, i))
            psnr.append(self.psnr(setting, i))
            if psnr[-1] < useful:
                break
        cost = self.expected(dataclasses.replace(setting, lower=() if self.rounds else setting.lower))
        self.tried.append(Trial(setting, tuple(psnr), cost, 1.0, len(psnr) == PAIRS))
        return self.tried[-1]


@pytest.mark.parametrize("choice", ["spread", "remembered", "remembered by head", "mean"])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("wanted", [33.0, 38.0, 42.0])
def test_finds_the_cheapest_with_few_denoises(choice: Any, tail: bool, wanted: float):
    model = Model(Setting(choice=choice, tail=tail))
    best = cheapest(model.attempt, model.expected, STEPS, list(KINDS), wanted)
    every = [
        Setting(dense, density, choice, tail)
        for dense, density in itertools.product(DENSE, range(len(DENSITIES)))
        if model.psnr(Setting(dense, density, choice, tail), PAIRS - 1) >= wanted
    ]
    assert best is not None and best.complete and best.worst >= wanted
    assert best.cost <= min(map(model.expected, every))
    assert len(model.denoises) < 120  # of 9 x 9 x 10 x 2 x 4 in all, without kinds
    again = Model(model.best)
    assert cheapest(again.attempt, again.expected, STEPS, list(KINDS), wanted) == best
    assert again.tried == model.tried


@pytest.mark.parametrize("budget", [0.2, 0.4, 0.7])
def test_finds_the_most_faithful_within_a_budget(budget: float):
    model = Model(Setting(choice="remembered", tail=True))
    best = most_faithful(model.attempt, model.expected, STEPS, budget)
    every = (Setting(dense, density, "remembered", True) for dense in DENSE for density in range(len(DENSITIES)))
    assert best is not None and best.cost <= budget
    assert best.worst >= max(model.psnr(one, PAIRS - 1) for one in every if model.expected(one) <= budget)


def test_ends_where_whole_blocks_round_lower_densities_to_the_same():
    model = Model(Setting(choice="remembered"), rounds=True)
    best = cheapest(model.attempt, model.expected, STEPS, list(KINDS), 38)
    assert best is not None and len(model.tried) < 60


def test_says_where_nothing_will_do():
    model = Model(Setting())
    assert cheapest(model.attempt, model.expected, STEPS, list(KINDS), 60) is None
    assert most_faithful(model.attempt, model.expected, STEPS, 0.001) is None


def test_the_frontier_has_what_nothing_beats():
    trials = [Trial(Setting(density=i), (worst,), cost, 1.0, complete) for i, (worst, cost, complete) in enumerate(
        [(40, 0.5, True), (39, 0.6, True), (35, 0.2, True), (50, 0.3, False), (40, 0.4, True)]
    )]  # fmt: skip
    assert [(one.worst, one.cost) for one in frontier(trials)] == [(35, 0.2), (40, 0.4)]


@pytest.mark.parametrize("choice", ["mean", "spread", "remembered", "remembered by head", "remembered by layer"])
def test_settings_are_configs(choice: Any):
    for dense, tail, falls, lower in itertools.product(
        (0.25, 0.0), (False, True), (False, True), ((), (("spatial", 1),))
    ):
        config = Setting(dense, 2, choice, tail, falls, lower).config(BASE)
        assert VMoBAConfig.from_json(config.to_json()) == config
        layers = [config.layer(1, 6, step, 8) for step in range(8)]
        assert [layer.dense for layer in layers] == [step < 8 * dense for step in range(8)]
        # Without a dense step the first sparse one chooses; each of two densities once, and none again.
        recorded = [rule for layer in layers for rule in layer.records]
        assert len(recorded) == (1 + falls) * choice.startswith("remembered")
        assert (layers[-1].tail is not None) == tail
    assert Setting(0.25, DENSITIES.index(0.25)).config(BASE) == BASE


def test_the_cost_counts_what_is_attended_and_what_choosing_takes():
    config = dataclasses.replace(BASE, rule=TopK(density=0.25), tail=Tail(16), remember=Remember())
    call = {"num_frames": 16, "height": 64, "width": 64, "num_inference_steps": 4}
    layers = run_denoise(DemoPipeline(), config, "bunny", 0, call).layers
    # One dense step that finds exact masses, then three at the measured density, with a cell for each 16 tokens.
    sparse = [layer.density[1:] for layer in layers]
    mean = sum(map(sum, sparse)) / (3 * len(layers))
    assert pairs_of(config, layers) == pytest.approx((1 + 0.75 + 3 * (mean + 1 / 16)) / 4)
    assert expected_pairs(config, 6, 4) == pytest.approx((1 + 0.75 + 3 * (0.25 + 1 / 16)) / 4)


SMALL = {"num_frames": 8, "height": 64, "width": 64, "num_inference_steps": 2}


def test_tunes_the_model_that_ships_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipe, seen = DemoPipeline(), []

    def broken(words: str) -> None:
        seen.append(words)
        if len(seen) == 5:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"prompts": ["bunny"], "seeds": [0], "call": SMALL, "folder": tmp_path / "denoises"}
    with pytest.raises(KeyboardInterrupt):
        tune(pipe, fidelity=20, progress=broken, **options)
    tuned = tune(pipe, fidelity=20, **options)
    assert tuned.best.worst >= 20 and tuned.best.cost <= tuned.paper.cost
    assert tuned.config == tuned.best.setting.config(BASE)
    again = tune(pipe, fidelity=20, **options)
    assert again.denoises == 0 and again.trials == tuned.trials
    assert tuned.denoises + 4 == len(list((tmp_path / "denoises").iterdir()))
    quick = tune(pipe, speed_up=2, **options)
    assert quick.best.cost <= 0.5
    config, facts, picture = save(tuned, tmp_path)
    assert VMoBAConfig.load(config) == tuned.config
    assert json.loads(facts.read_text())["best"]["setting"] == str(tuned.best.setting)
    assert picture.read_bytes().startswith(b"\x89PNG")
    words = report(tuned)
    assert f"{tuned.best.worst:.2f} dB at {tuned.best.cost:.3f}" in words and "The paper's setting" in words
    with pytest.raises(ValueError, match=r"fidelity must be one that can be reached, at least 200 dB, got .* dB at"):
        tune(pipe, fidelity=200, **options)

    for path in (config, facts, picture):
        path.unlink()
    sizes = [f"{name}={size}" for name, size in SMALL.items()]
    command = ["tune", "demo", "--seeds", "0", "--set", *sizes, "--output", str(tmp_path)]
    missing = str(tmp_path / "no.json")
    for wrong in (["--fidelity", "200"], ["--speed-up", "0.5"], ["--fidelity", "20", "--config", missing]):
        assert main([*command, *wrong]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("vmoba-flex: error: ")
        assert not config.exists()
    assert main([*command, "--fidelity", "20"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(words.partition(" settings tried")[0]) and "frontier.png" in out and not err
    assert VMoBAConfig.load(config) == tuned.config


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"speed_up": 2}, ValueError, "exactly one of fidelity and speed_up must be given, got 40 and 2"),
        ({"fidelity": None, "speed_up": 1}, ValueError, "speed_up must be above 1, got 1"),
        ({"fidelity": "40"}, TypeError, "fidelity must be a number, got '40'"),
        ({"prompts": "a cat"}, ValueError, "prompts must be a list of at least one prompt, got 'a cat'"),
        ({"prompts": []}, ValueError, r"prompts must be a list of at least one prompt, got \[\]"),
        ({"seeds": []}, ValueError, r"seeds must hold at least one seed, got \[\]"),
        ({"seeds": [-1]}, ValueError, "seeds must .* got -1"),
        ({"base": "paper"}, TypeError, "base must be a VMoBAConfig or None, got str"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path):
    options: dict[str, Any] = {"prompts": ["bunny"], "folder": tmp_path / "denoises", "fidelity": 40} | changes
    with pytest.raises(error, match=words):
        tune(DemoPipeline(), **options)
    assert not (tmp_path / "denoises").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        tune(DemoPipeline(), prompts=["bunny"], folder=tmp_path / "file", fidelity=40)
