"""bench.quality.denoises: fidelity of whole denoises, what follows from it, and a command that goes on where it was."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attention.checks import chosen_blocks
from bench.models.report import FORWARD
from bench.quality import clips, denoise_report, denoises, fidelity, study
from bench.quality.denoise_speed import Times, variant_of
from bench.quality.stepped import Stepped
from bench.quality.train import loss_of
from bench.quality.variants import (
    CYCLES,
    DENSE_STEPS,
    DENSITIES,
    FIRST,
    MAIN_SETTING,
    PARTS,
    PLAIN,
    SMALL_SETTING,
    Variant,
    cases,
    config,
    full,
)
from bench.quality.windows import Windows
from vmoba_flex import TopK, block_masses, vmoba_attention, vmoba_selection
from vmoba_flex.demo.denoise import frames_of, psnr
from vmoba_flex.demo.model import VideoTransformer
from vmoba_flex.demo.run import recall

GRID = SMALL_SETTING.size.grid


@pytest.fixture(scope="module")
def frames() -> dict[str, Tensor]:
    """Clips of noise, as long as the real ones."""
    generator = torch.Generator().manual_seed(0)
    counts = {"bigbuckbunny": 132, "bikes": 250}
    return {
        name: torch.randint(0, 256, (count, 3, 64, 80), generator=generator, dtype=torch.uint8)
        for name, count in counts.items()
    }


@pytest.fixture(scope="module")
def lively() -> VideoTransformer:
    """A small model whose gates are open."""
    torch.manual_seed(0)
    model = VideoTransformer(SMALL_SETTING.size.shape, full(SMALL_SETTING))
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def reference(frames: dict[str, Tensor], lively: VideoTransformer) -> fidelity.Reference:
    return fidelity.Reference(lively, full(SMALL_SETTING), Windows(frames, *SMALL_SETTING.size.pixels), GRID)


def stepped(variant: Variant, density: float, cycle: str = "cubes") -> Stepped:
    return Stepped(variant, config(variant, cycle, density, SMALL_SETTING, "cpu"), fidelity.STEPS)


def test_the_study_is_what_is_claimed():
    assert (fidelity.LEVEL, fidelity.STEPS, DENSE_STEPS, len(fidelity.NOISE_SEEDS)) == (0.9, 20, 5, 2)
    assert DENSITIES == (0.25, 0.125, 0.083, 0.0625, 0.03)
    assert MAIN_SETTING.cell == (2, 3, 6)
    counts = []
    for kind in CYCLES["cycle"]:
        partition = config(PLAIN, "cycle", 0.25, MAIN_SETTING, "cuda").partition(kind, MAIN_SETTING.size.grid)
        counts.append(partition.num_blocks)
        for setting in (MAIN_SETTING, SMALL_SETTING):
            block = config(PLAIN, "cycle", 0.25, setting, "cpu").partition(kind, setting.size.grid).block
            assert all(cell <= side for cell, side in zip(setting.cell, block, strict=True))
    assert counts == [8, 48, 72]
    cubes = [TopK(density=density).blocks_per_query(72) for density in DENSITIES]
    assert cubes == [18, 9, 6, 5, 2]  # each density is another choice
    found = [(part, variant, density) for part in PARTS for variant, density in cases(part)]
    assert len({(variant.name, density) for _, variant, density in found}) == len(found)  # a row's id
    parts = {part: [variant for where, variant, _ in found if where == part] for part in PARTS}
    assert len(parts["tail"]) == 4 * len(DENSITIES)
    assert {variant.gate for variant in parts["gates"]} == {"cells", "spread", "exact"}
    assert {variant.dense for variant in parts["remembered"]} == {1, 2, 5}
    assert all(variant.every for variant in parts["again"]) and all(variant.falls for variant in parts["falling"])
    assert all({"packed", "shared"} == {variant.dispatch for variant in parts[part]} for part in PARTS[:-1])


def test_variants_say_what_each_step_does():
    again = Variant("shared", tail=True, remembers=True, dense=2, every=6, falls=True)
    assert again.name == "shared, tail, remembered, 2 dense, dense every 6, falling"
    assert denoise_report.without_tail(again.name) == again._replace(tail=False).name
    assert denoise_report.without_tail("tail, spread gate") == PLAIN._replace(gate="spread").name
    assert [variant.name for variant in FIRST] == ["plain", "tail", "shared", "shared, tail"]
    assert [step for step in range(20) if again.is_dense(step)] == [0, 1, 7, 13, 19]
    assert [step for step in range(20) if PLAIN.is_dense(step)] == [0, 1, 2, 3, 4]
    assert [again.density(0.0625, step, 20) for step in (2, 4, 5, 9, 10)] == [0.25, 0.25, 0.125, 0.125, 0.0625]
    assert PLAIN.density(0.0625, 2, 20) == 0.0625
    assert again.changes and not PLAIN._replace(gate="spread").changes


@pytest.mark.parametrize("dispatch", ["packed", "shared"])
def test_sparse_steps_attend_what_the_last_dense_step_chose(dispatch: Any, lively: VideoTransformer):
    variant = Variant(dispatch, tail=True, remembers=True, dense=2, falls=True)
    plan = stepped(variant, 0.125)
    plan.attach(lively)
    layer: Any = lively.blocks[1].attention
    partition = plan.attention.partition("spatiotemporal", GRID)
    generator = torch.Generator().manual_seed(0)
    for plan.step in (0, 1):
        query, key, value = torch.randn(3, 1, 2, 4 * 6 * 8, 16, generator=generator)
        dense = vmoba_attention(query, key, value, partition, TopK(1), dispatch="dense")
        torch.testing.assert_close(layer(query, key, value, GRID), dense)
    later = torch.randn(3, 1, 2, 4 * 6 * 8, 16, generator=generator)
    densities = []
    for plan.step, density in ((2, 0.5), (6, 0.25), (15, 0.125)):
        rule = TopK(density=density, gate="exact")
        choice: Any = "tile" if dispatch == "shared" else "token"
        kept = vmoba_selection(query, key, partition, rule, choice=choice, as_bits=True)
        expected = vmoba_attention(*later, partition, None, selection=kept, dispatch=dispatch, tail=plan.attention.tail)
        assert torch.equal(layer(*later, GRID), expected)
        densities.append(kept.density().mean().item())
    steps = [densities[0]] * 3 + [densities[1]] * 5 + [densities[2]] * 10
    assert plan.density(GRID, 3) == pytest.approx(sum(steps) / len(steps))


def test_a_model_that_knows_the_video_arrives_at_it():
    video, noise = torch.randn(2, 3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    class Knows(nn.Module):
        levels: list[float] = []  # noqa: RUF012

        def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
            self.levels.append(level[0].item())
            torch.testing.assert_close(noisy, video + level[0] * (noise - video), atol=1e-5, rtol=0)
            return video

    path: Any = fidelity._PATH
    result = fidelity.follow(Knows(), video + 0.9 * (noise - video), path)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(result, video, atol=1e-5, rtol=0)
    assert Knows.levels == pytest.approx([0.9 - 0.045 * step for step in range(20)])


def test_full_attention_is_its_own_video(reference: fidelity.Reference):
    assert len(reference.samples) == len(reference.videos) == 8
    assert len({(clip, number) for clip, number, _ in reference.samples}) == 4
    assert reference.fidelities(stepped(Variant(dense=20), 0.5)) == [100.0] * 8  # psnr's most
    for variant in (PLAIN, Variant("shared", tail=True, remembers=True, dense=1)):
        assert min(reference.fidelities(stepped(variant, 1.0, "cycle"))) > 70
    few, more = (reference.fidelities(stepped(PLAIN, density)) for density in (0.0625, 0.5))
    assert max(few) < 60
    assert sum(few) < sum(more)


def test_a_fidelity_is_that_of_the_sample_by_itself(reference: fidelity.Reference, lively: VideoTransformer):
    # Full attention down to the fifth step, the other one after it, from the sample's own noise.
    attention = config(PLAIN, "cubes", 0.125, SMALL_SETTING, "cpu")
    batched = reference.fidelities(stepped(PLAIN, 0.125))
    clip, number, seed = reference.samples[5]
    assert (clip, number, seed) == ("bikes", 2, 1)
    video = reference.windows.held_out()[number][1]
    noisy = video + 0.9 * (fidelity._noise(video[0], fidelity._FIRST_SEED + 100 * number + seed) - video)
    levels = [0.9 * (1 - step / 20) for step in range(21)]
    lively.set_attention(full(SMALL_SETTING))
    middle = fidelity.follow(lively, noisy, levels[:6])
    own = fidelity.follow(lively, middle, levels[5:])
    lively.set_attention(attention)
    other = fidelity.follow(lively, middle, levels[5:])
    assert batched[5] == pytest.approx(psnr(frames_of(other), frames_of(own)), abs=0.01)


def test_held_out_losses_are_those_of_training(frames: dict[str, Tensor], lively: VideoTransformer):
    windows = Windows(frames, *SMALL_SETTING.size.pixels)
    lively.set_attention(full(SMALL_SETTING))
    losses = [loss_of(lively(sample.noisy, sample.level), sample).item() for _, _, sample in windows.held_out_samples()]
    expected = torch.tensor(losses).view(4, -1).mean(1).tolist()
    assert fidelity.held_out_losses(lively, windows) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dispatch", ["packed", "shared"])
@pytest.mark.parametrize("kind", CYCLES["cycle"])
def test_density_and_recall_of_what_is_chosen(dispatch: str, kind: str):
    query, key, value = torch.randn(3, 1, 2, 4 * 6 * 8, 16, generator=torch.Generator().manual_seed(0))
    attention = config(PLAIN, "cycle", 0.25, SMALL_SETTING, "cpu")
    partition, rule = attention.partition(kind, GRID), TopK(density=0.25)
    chosen = chosen_blocks(query, key, partition, rule, dispatch)
    _, stats = vmoba_attention(query, key, value, partition, rule, dispatch=dispatch, return_stats=True)
    assert chosen.float().mean((0, 2, 3)).tolist() == pytest.approx(stats.density.flatten().tolist())
    masses = block_masses(query, key, partition)
    torch.testing.assert_close(masses.sum(-1), torch.ones(1, 2, 192))
    expected = recall(query, key, chosen, partition)
    assert (masses * chosen).sum(-1).mean().item() == pytest.approx(expected, rel=1e-5)


def test_density_for_a_fidelity():
    points = [(0.25, 36.0), (0.0625, 30.0), (0.125, 33.0)]
    assert denoise_report.density_for(29.0, points) == 0.0625
    assert denoise_report.density_for(33.0, points) == pytest.approx(0.125)
    assert denoise_report.density_for(34.5, points) == pytest.approx(0.125 * 2**0.5)
    assert denoise_report.density_for(36.1, points) == float("inf")


def row(attention: str, asked: float, fidelities: list[float], seed: int = 0) -> dict[str, Any]:
    facts = {"what": "denoise", "status": "ok", "attention": attention, "blocks": "cubes", "asked": asked}
    return facts | {
        "density": asked,
        "fidelity": fidelities,
        "model_seed": seed,
        "recall": 0.5,
        "over_full": [0.1, 0.2],
    }


def test_gains_are_paired_by_model_window_and_noise():
    ours = [row("tail", 0.1, [30.0, 40.0], seed=0), row("tail", 0.1, [1.0, 2.0], seed=1)]
    others = [row("plain", 0.1, [29.0, 35.0], seed=0)]  # model 1 has none
    assert denoise_report.gains(ours, others) == [1.0, 5.0]
    assert denoise_report.gains(others, ours) == [-1.0, -5.0]


def test_tables_by_hand():
    data = {"rows": [row("plain", 0.25, [36.0, 30.0]), row("plain", 0.125, [33.0, 20.0])]}
    data["rows"] += [
        row("tail", 0.25, [38.0, 32.0]),
        row("tail", 0.125, [36.0, 28.0]),
        row("tail", 0.0625, [20.0, 19.0]),
    ]
    names, rows = denoise_report.fidelity(data)
    assert dict(zip(names, rows[3], strict=True)) == {
        "attention": "tail", "blocks": "cubes", "density": "0.125", "fidelity dB": "32.0", "worst": "28.0",
        "over plain (worst)": "+5.5 (+3.0)", "over the same without tail (worst)": "+5.5 (+3.0)",
        "loss over full's (worst)": "+15.0 % (+20.0 %)", "recall": "0.50",
    }  # fmt: skip
    # The first sample reaches 36 dB at 0.125, the second 30 dB halfway between 0.125 and 0.25.
    _, (cells,) = denoise_report.fewer_pairs(data)
    assert cells == ["tail", "cubes", "1.4", "1.4", "2.0"]
    data["rows"].append(row("shared", 0.25, [30.0, 29.0]))
    assert denoise_report.fewer_pairs(data)[1][1] == ["shared", "cubes", "< 1", "< 1", "< 1"]
    data["rows"].append(row("shared, tail", 0.25, [37.0, 31.0], seed=1))  # a model that plain was not measured on
    assert len(denoise_report.fewer_pairs(data)[1]) == 2


def test_gains_over_the_mean_key_by_hand():
    data = {"rows": [row("tail", 0.125, [30.0, 34.0]), row("tail", 0.0625, [30.0, 34.0])]}
    for way, fidelities in (("spread gate", [32.0, 34.0]), ("exact gate", [34.0, 38.0]), ("remembered", [33.0, 36.0])):
        data["rows"].append(row(f"tail, {way}", 0.125, fidelities))
    names, (cells,) = denoise_report.chosen_by(data)
    assert dict(zip(names, cells, strict=True)) == {
        "attention": "tail", "blocks": "cubes", "density": "0.125", "mean key dB": "32.0", "cells gate (worst)": "",
        "spread gate (worst)": "+1.0 (+0.0)", "remembered (worst)": "+2.5 (+2.0)", "exact gate (worst)": "+4.0 (+4.0)",
        "spread: of the oracle's gain": "25%", "remembered: of the oracle's gain": "62%",
    }  # fmt: skip


def forward(attention: str, ms: float, dispatch: str = "", density: float = 1.0, **facts: bool) -> dict[str, Any]:
    row = {"model": "Wan 1.3B", "tokens": 75_600, "mode": FORWARD, "status": "ok", "dense": attention == "cuDNN"}
    return (
        row
        | {"attention": attention, "ms": ms, **facts}
        | ({"dispatch": dispatch, "density": density} if dispatch else {})
    )


FORWARDS = {
    "runs": [{"device": "a GPU", "date": "today", "versions": {"torch": "2"}}],
    "rows": [
        forward("cuDNN", 2000), forward("none", 400), forward("exact", 1000, "auto", 0.25),
        forward("shared", 500, "shared", 0.0625, tail=True), forward("shared", 700, "shared", 0.125, tail=True),
        forward("shared", 600, "shared", 0.125, tail=True, remembered=True),
        forward("shared", 450, "shared", 0.0625, tail=True, remembered=True),
    ],
}  # fmt: skip


def test_speed_of_a_whole_run_by_hand():
    times = Times(FORWARDS)
    assert times.speed_up(PLAIN, 0.25, 20) == 20 * 2000 / (5 * 2000 + 15 * 1000)  # the paper's setting
    assert times.speed_up(PLAIN, 0.125, 20) is None  # not measured
    shared = Variant("shared", tail=True)
    assert times.step_ms(shared, 0.09375) == pytest.approx(600)
    assert times.step_ms(shared, 0.25) == pytest.approx(1100)
    remembered = shared._replace(remembers=True, dense=1)
    assert times.speed_up(remembered, 0.125, 20) == pytest.approx(40_000 / (2000 + 800 + 19 * 600))
    falling = remembered._replace(falls=True)
    ms = 4 * 900 + 5 * 600 + 10 * 450  # at 0.25, 0.125 and 0.0625
    assert times.speed_up(falling, 0.0625, 20) == pytest.approx(40_000 / (2800 + ms))
    again = remembered._replace(every=10)  # dense at 0 and 10, each of which records
    assert times.speed_up(again, 0.125, 20) == pytest.approx(40_000 / (2 * 2800 + 18 * 600))
    assert variant_of({"attention": "shared, tail"}) == shared  # results of an earlier version
    assert variant_of(remembered._asdict() | {"attention": remembered.name}) == remembered
    with pytest.raises(ValueError, match=r"forwards of Wan 1\.3B at 75600 tokens with full attention and without"):
        Times({"rows": FORWARDS["rows"][2:]})


@pytest.fixture
def command(tmp_path: Path, frames: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch):
    """The command on clips of noise, with few attentions; called with further options, it gives the exit status."""
    few = {
        "tail": [(PLAIN, 0.5), (Variant(tail=True), 0.125)],
        "again": [(Variant("shared", tail=True, remembers=True, dense=2, every=9, falls=True), 0.125)],
    }
    monkeypatch.setattr(clips, "load", lambda path, device: frames)
    monkeypatch.setattr(study, "cases", lambda part: few.get(part, []))
    monkeypatch.setattr(study, "FEW", (0.125,))
    monkeypatch.setattr(study, "TUNED_VARIANTS", (PLAIN,))
    fixed = ["--output", str(tmp_path / "out.json"), "--work", str(tmp_path / "work"), "--device", "cpu", "--small"]
    fixed += ["--blocks", "cubes"]

    def call(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["denoises", *fixed, "--tune-steps", "3", *options])
        return denoises.main()

    return call


def test_a_small_run_and_one_that_goes_on(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(study, "TUNED_RATE", 0.0)  # so that tuned weights are full attention's
    plot, speed, times = (tmp_path / name for name in ("plots/x.png", "plots/speed.png", "times.json"))
    times.write_text(json.dumps(FORWARDS))
    pictures = ["--plot", str(plot), "--speed-plot", str(speed), "--times", str(times)]
    assert command("--steps", "3", "--parts", "tail", "tuned") == 0
    first = json.loads((tmp_path / "out.json").read_text())
    rows = {row["id"].removeprefix("model 0 | "): row for row in first["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(
        [
            "full",
            "denoise | plain | cubes | density 0.5",
            "denoise | tail | cubes | density 0.125",
            "tuned | full",
            "tuned | plain | cycle | density 0.125",
        ],
        "ok",
    )
    full_row, plain = rows["full"], rows["denoise | plain | cubes | density 0.5"]
    assert len(full_row["samples"]) == len(plain["fidelity"]) == 8
    assert (plain["density"], len(plain["losses"])) == (0.5, 4)
    expected = [ours / theirs - 1 for ours, theirs in zip(plain["losses"], full_row["losses"], strict=True)]
    assert plain["over_full"] == expected
    assert rows["tuned | full"]["losses"] == pytest.approx(full_row["losses"], rel=1e-6)
    assert rows["tuned | plain | cycle | density 0.125"]["losses"] != full_row["losses"]
    text = (tmp_path / "out.md").read_text()
    assert all(f"## {title}" in text for title in ("Models", "Fidelity", "Tuned"))
    assert str(tmp_path) not in text + json.dumps(first)

    # Again, all parts: what is there stays, and the model is not trained again.
    capsys.readouterr()
    assert command("--steps", "3", *pictures) == 0
    printed = capsys.readouterr().out
    assert "trains" not in printed
    assert len(printed.splitlines()) == 1
    again = {
        row["id"].removeprefix("model 0 | "): row for row in json.loads((tmp_path / "out.json").read_text())["rows"]
    }
    assert all(again.pop(name) == row for name, row in rows.items())
    (added,) = again.values()
    assert (added["attention"], added["status"]) == ("shared, tail, remembered, 2 dense, dense every 9, falling", "ok")
    assert added["density"] > added["asked"] and "recall" not in added
    assert plot.read_bytes().startswith(b"\x89PNG") and speed.read_bytes().startswith(b"\x89PNG")

    # The picture may be drawn by itself, and changes no results.
    plot.unlink()
    before = (tmp_path / "out.json").read_bytes()
    assert command("--plot-only", "--plot", str(plot)) == 0
    assert plot.exists()
    assert (tmp_path / "out.json").read_bytes() == before

    # The checkpoint may be named, and another model's results are not mixed in.
    (saved,) = (tmp_path / "work").iterdir()
    assert command("--steps", "5", "--checkpoint", str(saved)) == 0
    assert command("--steps", "4") == 2
    error = capsys.readouterr().err
    assert "another model of seed 0: give another --output" in error
    assert error.count("\n") == 1


def test_without_budget_rows_are_noted_as_not_run(command, tmp_path: Path):
    assert command("--steps", "3", "--budget-s", "-1") == 0
    assert {row["status"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]} == {"not run"}


@pytest.mark.parametrize("options", [("--plot-only",), ("--plot-only", "--plot", "x.png")])
def test_a_picture_by_itself_needs_results(command, options: tuple[str, ...], capsys):
    with pytest.raises(SystemExit):
        command(*options)
    assert "--plot-only needs --plot or --speed-plot, and results at --output" in capsys.readouterr().err


def test_a_picture_of_speed_needs_times(command, capsys):
    with pytest.raises(SystemExit):
        command("--speed-plot", "x.png")
    assert "--speed-plot needs --times with results of bench.models, got None" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--checkpoint", "no/such/file"), ("--checkpoint", __file__, "--seeds", "0", "1")])
def test_a_checkpoint_is_one_file_of_one_model(command, options: tuple[str, ...], capsys):
    with pytest.raises(SystemExit):
        command(*options)
    assert "--checkpoint must name a file, with one seed" in capsys.readouterr().err
