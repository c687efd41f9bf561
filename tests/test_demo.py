"""The demo: clip, model, measures, command line."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from unittest import mock

import av
import matplotlib.image
import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vmoba_flex import (
    BlockPartition,
    Tail,
    Threshold,
    TopK,
    VMoBAAttention,
    VMoBAConfig,
    reference,
    vmoba_attention,
    vmoba_mask,
    vmoba_selection,
)
from vmoba_flex.cli import main
from vmoba_flex.config import KINDS
from vmoba_flex.demo import checkpoint, denoise, run
from vmoba_flex.demo.clip import BUNNY, read_clip
from vmoba_flex.demo.model import Shape, VideoTransformer, from_patches, rotary_angles, rotate, to_patches
from vmoba_flex.demo.story import Story
from vmoba_flex.demo.tailed import TAILED, attention_with_tail, tail_of
from vmoba_flex.user_error import UserError

GRID = (4, 6, 8)
CONFIG = VMoBAConfig(1, (2, 4), (2, 3, 4), Threshold(0.25), dispatch="tiles")


def write_video(path: Path, images: np.ndarray) -> Path:
    """A lossless video of grey images, uint8 (frames, height, width)."""
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=25)
        stream.height, stream.width = images.shape[1:]
        stream.pix_fmt, stream.options = "yuv420p", {"qp": "0"}
        for image in images:
            frame = av.VideoFrame.from_ndarray(image[..., None].repeat(3, axis=-1), format="rgb24")
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def inputs() -> list[run.Inputs]:
    """The shipped model's query, key and value in each layer, on a piece of the clip."""
    model, _, _ = checkpoint.load()
    noisy = denoise.add_noise(read_clip(BUNNY, 16, 48, 64), denoise.LEVEL)
    return run.layer_inputs(model, noisy, torch.tensor([denoise.LEVEL]))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the test the compilation: eager flex_attention computes the same."""
    monkeypatch.setattr(run, "compiled_flex_attention", lambda *x, **options: (flex_attention(*x, **options), None))
    monkeypatch.setattr(run, "REPEATS", 1)


def test_command_line_loads_no_extras():
    # torch itself loads tqdm where it finds it.
    code = "import sys, torch; before = set(sys.modules); import vmoba_flex.cli; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "vmoba_flex.cli" in loaded
    assert not {"av", "matplotlib", "safetensors", "tqdm"} & set(loaded)


def test_clip_ships_and_decodes():
    assert BUNNY.stat().st_size <= 300_000
    frames = read_clip(BUNNY, 64, 288, 512)
    assert frames.shape == (64, 3, 288, 512)
    assert frames.dtype == torch.float32
    assert frames.min() >= 0
    assert frames.max() <= 1
    # The bunny moves: no two frames are the same.
    assert (frames.diff(dim=0).abs().amax((1, 2, 3)) > 0).all()


def test_clip_is_read_from_its_start(tmp_path: Path):
    path = write_video(
        tmp_path / "steps.mp4", np.arange(0, 120, 10, dtype=np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
    )
    levels = read_clip(path, 4, 16, 16).mean((1, 2, 3)) * 255
    torch.testing.assert_close(levels, torch.tensor([0.0, 10, 20, 30]), atol=3, rtol=0)


def test_clip_is_cropped_at_the_centre(tmp_path: Path):
    image = np.full((2, 32, 96), 255, dtype=np.uint8)
    image[:, :, 24:72] = 0
    frames = read_clip(write_video(tmp_path / "bars.mp4", image), 2, 16, 16)
    assert frames.shape == (2, 3, 16, 16)
    assert frames.max() < 0.05


@pytest.mark.parametrize("name", ["missing.mp4", "text.mp4", "short.mp4", "sound.wav"])
def test_unusable_clip_is_refused(tmp_path: Path, name: str):
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "short.mp4", np.zeros((3, 32, 32), dtype=np.uint8))
    with av.open(str(tmp_path / "sound.wav"), "w") as writer:
        stream = writer.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.rate = 8000
        writer.mux(stream.encode(sound))
        writer.mux(stream.encode())
    with pytest.raises(UserError, match=name) as caught:
        read_clip(tmp_path / name, 4, 16, 16)
    assert "\n" not in str(caught.value)


def test_rotary_embedding_depends_on_relative_position_only():
    grid, head_dim = (3, 4, 5), 32
    angles = rotary_angles(grid, head_dim).double()
    query, key = torch.randn(2, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = rotate(query.expand(60, -1), angles) @ rotate(key.expand(60, -1), angles).T
    scores = scores.view(grid + grid)
    for axis in range(3):
        size = grid[axis]
        moved = scores.narrow(axis, 1, size - 1).narrow(axis + 3, 1, size - 1)
        torch.testing.assert_close(moved, scores.narrow(axis, 0, size - 1).narrow(axis + 3, 0, size - 1))
        # A step of the query only must show, on every axis.
        step = scores.narrow(axis, 1, size - 1) - scores.narrow(axis, 0, size - 1)
        assert step.abs().amax(axis).min() > 1e-6


def test_rotation_keeps_lengths():
    x = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, rotary_angles((3, 4, 5), 32)).norm(dim=-1), x.norm(dim=-1))


def test_patches_are_tokens_in_raster_order_and_back():
    video = torch.arange(2 * 3 * 4 * 6 * 10).view(2, 3, 4, 6, 10)
    tokens = to_patches(video, (2, 3, 5))
    assert tokens.shape == (2, 2 * 2 * 2, 3 * 2 * 3 * 5)
    assert torch.equal(tokens[1, 5], video[1, :, 2:, :3, 5:].flatten())
    assert torch.equal(from_patches(tokens, (2, 3, 5), (2, 2, 2)), video)


def test_a_fresh_model_depends_on_nothing_and_a_stirred_one_on_all():
    torch.manual_seed(0)
    model = VideoTransformer(Shape((2, 4, 4), dim=64, depth=3, heads=2), CONFIG)
    noisy, level = torch.randn(1, 3, 8, 24, 32), torch.tensor([0.5])
    assert model(noisy, level).shape == noisy.shape
    assert not model(noisy, level).any()  # all gates are closed
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sparse = model(noisy, level)
    assert not torch.allclose(sparse, model(noisy, torch.tensor([0.6])))
    sparse.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.set_attention(dataclasses.replace(CONFIG, dispatch="dense"))
    assert not torch.allclose(sparse, model(noisy, level))
    # A threshold of everything is full attention.
    dense = model(noisy, level)
    model.set_attention(dataclasses.replace(CONFIG, rule=Threshold(1.0)))
    torch.testing.assert_close(model(noisy, level), dense, atol=1e-4, rtol=1e-4)


def test_checkpoint_keeps_weights_and_what_they_belong_to(tmp_path: Path):
    model = VideoTransformer(Shape((2, 4, 4), dim=64, depth=2, heads=2), CONFIG)
    checkpoint.save(model, CONFIG, {"steps": 3}, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded, config, training = checkpoint.load(tmp_path / "model.safetensors")
    assert (loaded.shape, config, training) == (model.shape, CONFIG, {"steps": 3})
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float()), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=str)
def test_a_checkpoint_that_fails_leaves_nothing(tmp_path: Path, error: object, monkeypatch: pytest.MonkeyPatch):
    model = VideoTransformer(Shape((2, 4, 4), dim=64, depth=1, heads=2), CONFIG)
    monkeypatch.setattr("safetensors.torch.save_file", mock.Mock(side_effect=error))
    with pytest.raises((KeyboardInterrupt, UserError), match=r"No space left|^$"):
        checkpoint.save(model, CONFIG, {}, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"must end in .safetensors, got .*model.pt"):
        checkpoint.save(model, CONFIG, {}, tmp_path / "model.pt")


def test_unusable_checkpoint_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    model = VideoTransformer(Shape((2, 4, 4), dim=64, depth=2, heads=2), CONFIG)
    model.shape = Shape((2, 4, 4), dim=64, depth=3, heads=2)
    checkpoint.save(model, CONFIG, {}, tmp_path / "unlike.safetensors")
    for name in ("missing", "text", "foreign", "unlike"):
        with pytest.raises(UserError, match=name) as caught:
            checkpoint.load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


def test_flow_of_a_perfect_model_ends_at_the_video(monkeypatch: pytest.MonkeyPatch):
    frames = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = denoise.add_noise(frames, denoise.LEVEL)
    video = denoise.add_noise(frames, 0.0)
    levels = []

    def perfect(given: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        # What is given lies on the straight way from noise to video.
        torch.testing.assert_close(given, video + level * (noisy - video) / denoise.LEVEL)
        levels.append(level.item())
        return video

    torch.testing.assert_close(denoise.denoise(perfect, noisy, lambda _: None), frames)
    assert levels == pytest.approx(np.linspace(denoise.LEVEL, 0, denoise.STEPS, endpoint=False))


def test_psnr():
    frames = torch.full((2, 3, 4, 4), 0.5)
    assert denoise.psnr(frames, frames + 0.1) == pytest.approx(20, abs=1e-4)
    assert denoise.psnr(frames, frames + 0.01) == pytest.approx(40, abs=1e-3)


def test_shipped_model_denoises_frames_that_it_was_not_trained_on():
    assert checkpoint.TRAINED.stat().st_size <= 8_000_000
    model, config, training = checkpoint.load()
    assert training["steps"] > 0
    frames = read_clip(BUNNY, 16, 72, 128)
    noisy = denoise.add_noise(frames, denoise.LEVEL)
    before = denoise.psnr(denoise.frames_of(noisy), frames)
    outputs = []
    for dispatch in ("dense", "tiles"):
        model.set_attention(dataclasses.replace(config, dispatch=dispatch, backend="auto"))
        outputs.append(denoise.denoise(model, noisy, lambda _: None))
        assert denoise.psnr(outputs[-1], frames) > before + 6
    assert denoise.psnr(*outputs) > 25


@pytest.mark.usefixtures("eager")
def test_plain_attention_is_vmoba_attention(inputs: list[run.Inputs]):
    for layer in range(3):
        ours = run.PlainAttention(CONFIG, layer, 3)(*inputs[layer], GRID)
        torch.testing.assert_close(ours, VMoBAAttention(CONFIG, layer, 3)(*inputs[layer], GRID), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("rule", [Threshold(0.25), TopK(density=0.25)], ids=str)
def test_measures(inputs: list[run.Inputs], rule: Threshold | TopK):
    steps = []
    config = dataclasses.replace(CONFIG, rule=rule)
    results = run.run_layers(inputs, config, GRID, steps.append)
    assert len(steps) == 3 * len(results)
    assert [result.kind for result in results] == ["full", *("1D", "2D", "3D") * (len(inputs) // 3)]
    assert [result.layer for result in results] == [0, *range(len(inputs))]
    assert (results[0].density, results[0].tile_density) == (1, 1)
    assert results[0].recall == pytest.approx(1)
    for result in results:
        query, key, _ = inputs[result.layer]
        probabilities = torch.softmax(query.double() @ key.double().mT / query.shape[-1] ** 0.5, dim=-1)
        assert result.error < 1e-5
        selection = vmoba_selection(query, key, result.partition, rule)
        assert torch.equal(result.selection, selection[0])
        assert result.density == pytest.approx(selection.float().mean().item())
        kept = probabilities * reference.attention_mask(selection, result.partition)
        assert result.recall == pytest.approx(kept.sum(-1).mean().item())
        assert (result.tail is None) == (result.kind not in TAILED) == (result.overlap == result.recall)
        assert result.recall <= result.overlap <= 1 + 1e-6


def test_a_layer_with_a_tail_attends_as_vmoba_attention_does(inputs: list[run.Inputs]):
    for layer, kind in enumerate(("1D", "2D", "3D")):
        partition = CONFIG.partition(KINDS[layer], GRID)
        attention = attention_with_tail(CONFIG, layer, 3, kind)
        expected = vmoba_attention(*inputs[layer], partition, CONFIG.rule, dispatch="packed", tail=tail_of(kind))
        assert torch.equal(attention(*inputs[layer], GRID), expected)


def test_cells_have_the_mean_colour_of_their_tokens():
    partition, tail = CONFIG.partition("spatiotemporal", GRID), Tail((2, 2, 3))
    story = mock.Mock(grid=GRID, frames=torch.rand(4, 3, 6 * 8, 8 * 8), spec=Story)
    colours = Story.as_cells(story, mock.Mock(partition=partition, tail=tail))
    tokens = story.frames.unflatten(3, (8, 8)).unflatten(2, (6, 8)).mean((3, 5)).movedim(1, -1)
    corner = colours[:2, :2, :3]
    torch.testing.assert_close(corner, tokens[:2, :2, :3].mean((0, 1, 2)).expand_as(corner))


def test_attention_of_one_query(inputs: list[run.Inputs]):
    query, key, _ = inputs[0]
    expected = torch.softmax(query.double() @ key.double().mT / query.shape[-1] ** 0.5, dim=-1)[0, 2, 17]
    torch.testing.assert_close(run.attention_of(query, key, 17, head=2).double(), expected, atol=1e-6, rtol=1e-4)


def test_tile_map(inputs: list[run.Inputs]):
    query, key, _ = inputs[0]
    partition = BlockPartition.spatiotemporal(GRID, (2, 4, 4))
    selection = vmoba_selection(query, key, partition, TopK(2))
    query, key = partition.to_block_order(query), partition.to_block_order(key)
    mask = vmoba_mask(query, key, partition, TopK(2), token_order="block", tile_size=16)
    dense = partition.to_block_order(partition.to_block_order(reference.attention_mask(selection, partition)), dim=-1)
    tiles = dense.unflatten(-1, (-1, 16)).unflatten(-3, (-1, 16)).movedim(-3, -2).flatten(-2)
    expected = tiles.any(-1).long() + tiles.all(-1)
    assert torch.equal(run.tile_map(mask), expected)
    assert len(expected.unique()) == 3


def test_demo_from_command_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "demo.png"
    assert main(["demo", "--grid", "2x4x6", "--output", str(output)]) == 0
    assert list(tmp_path.iterdir()) == [output]
    height, width, _ = matplotlib.image.imread(output).shape
    assert width == 1760
    assert 1500 < height < 2500
    report = capsys.readouterr().out.splitlines()
    assert [line.count(" dB to ") for line in report[2:6]] == [1, 2, 2, 1]
    assert [line.split()[1] for line in report[7:15]] == ["kind", "full", *("1D", "2D", "3D") * 2]


@pytest.mark.usefixtures("eager")
def test_demo_of_a_portrait_video(tmp_path: Path):
    """Another video, another rule, a chosen query, more frames than the picture shows."""
    video = write_video(tmp_path / "noise.mkv", np.random.default_rng(0).integers(0, 256, (40, 48, 32), dtype=np.uint8))
    output = tmp_path / "demo.png"
    options = ["--video", str(video), "--grid", "10x6x4", "--density", "0.3", "--query", "9,5,3"]
    assert main(["demo", "--output", str(output), *options]) == 0
    assert matplotlib.image.imread(output).shape[1] == 1760


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--video", "{tmp}/missing.mp4"], "no video file"),
        (["--video", "{tmp}"], "no video file"),
        (["--video", "{tmp}/text.mp4"], "as a video"),
        (["--grid", "17x1x1"], "has 64 frames, but this grid needs 68"),
        (["--query", "0,0,2"], "outside the grid"),
        (["--tau", "1.5"], "tau must lie in"),
        (["--density", "0"], "density must lie in"),
        (["--output", "{tmp}/none/demo.png"], "cannot write"),
        (["--output", "{tmp}/demo.jpg"], "must end in .png"),
        (["--output", "{tmp}/folder.png"], "which is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "folder.png").mkdir()
    before = set(tmp_path.rglob("*"))
    assert main(["demo", "--grid", "1x1x2", *(option.format(tmp=tmp_path) for option in options)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err.splitlines()[-1]
    assert captured.err.count("error") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert set(tmp_path.rglob("*")) == before


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "vmoba-flex: error: this needs av: pip install av (in a clone: pip install '.[demo]')\n"
    )


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert main(["demo"]) == 2
    assert "install g++" in capsys.readouterr().err


def test_failure_leaves_the_old_picture(tmp_path: Path):
    old = tmp_path / "demo.png"
    old.write_bytes(b"old")
    assert main(["demo", "--video", str(tmp_path / "missing.mp4"), "--output", str(old)]) == 2
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("words", ["8x18", "8x18x0", "axbxc", "-1x2x3"])
def test_malformed_grid(words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["demo", f"--grid={words}"])
    assert caught.value.code == 2
    assert "TxHxW" in capsys.readouterr().err
