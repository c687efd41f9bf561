"""compare and its command: numbers, files, what is run once, and errors of one line."""

# pyright: reportPrivateImportUsage=false
import html.parser
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

from tests.test_fidelity import CALL, EVERYTHING, SPARSE, prompt, wan_pipeline
from tests.video_models import FAMILIES, TEXT_DIM, Family, each_family, run
from vmoba_flex import VMoBAConfig, apply_vmoba, compare
from vmoba_flex.cli import main
from vmoba_flex.compare_command import config_of
from vmoba_flex.demo.pipeline import DemoPipeline
from vmoba_flex.fidelity import denoise

MODULE = sys.modules["vmoba_flex.fidelity.compare"]  # its folder's name for it is the function
CONFIGS = {"sparse": SPARSE, "everything": EVERYTHING}


class TinyPipeline:
    """Any family's model in a pipeline with a scheduler that counts; latents are shown as they are."""

    def __init__(self, family: Family) -> None:
        self.family, self.transformer = family, family.build()
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        self.calls = 0

    @torch.no_grad()
    def __call__(self, prompt: str, generator: torch.Generator, steps: int = 3) -> tuple[Tensor]:
        self.calls += 1
        inputs = self.family.inputs(batch=1)
        x = torch.randn(inputs["hidden_states"].shape, generator=generator)
        self.scheduler.set_timesteps(steps)
        timesteps: Any = self.scheduler.timesteps
        for t in timesteps:
            output = run(self.transformer, inputs | {"hidden_states": x})
            x = self.scheduler.step(output.expand_as(x) if output.shape != x.shape else output, t, x)[0]
        return (x.flatten()[: 3 * 16 * (x.numel() // 48)].reshape(1, 1, -1, 16, 3).sigmoid(),)


@each_family
def test_each_family(family: Family, tmp_path: Path):
    pipe = TinyPipeline(family)
    found = compare(pipe, CONFIGS, prompts="a cat", output=tmp_path, progress=False)
    full, sparse, everything = found.summary()
    assert full.psnr is None and full.density == 1
    assert sparse.psnr is not None and sparse.density < 1
    # Rounding moves a value to the next of 255 here and there.
    assert everything.psnr is not None and everything.psnr > max(60, sparse.psnr) and everything.density == 1
    assert pipe.calls == 3


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny pipeline compared on two prompts and two seeds."""
    folder = tmp_path_factory.mktemp("compared")
    prompts = [prompt() | {"prompt": None}, prompt(1)]
    return folder, compare(
        wan_pipeline(), CONFIGS, prompts=prompts, seeds=(3, 4), call=CALL, output=folder, progress=False
    )


def test_numbers_are_those_of_a_script_of_its_own(compared: tuple[Path, Any]):
    folder, found = compared
    pipe = wan_pipeline()

    def videos(config: VMoBAConfig | None) -> list[np.ndarray]:
        if config is not None:
            with apply_vmoba(pipe, config):
                return videos(None)
        made = []
        for one in (prompt(), prompt(1)):
            for seed in (3, 4):
                output = pipe(**one, **CALL, generator=torch.Generator().manual_seed(seed), output_type="np").frames[0]
                made.append(np.rint(output * 255).astype(np.uint8).astype(float))
        return made

    full, sparse = videos(None), videos(SPARSE)
    frames = np.array(
        [[((a - b) ** 2).mean() for a, b in zip(*pair, strict=True)] for pair in zip(full, sparse, strict=True)]
    )
    expected = 10 * np.log10(255**2 / frames.mean(1))
    one = found.summary()[1]
    assert one.psnr == pytest.approx(expected.mean(), rel=1e-5)
    assert one.worst_psnr == pytest.approx(expected.min(), rel=1e-5)
    assert one.worst_frame_psnr == pytest.approx(10 * np.log10(255**2 / frames.max()), rel=1e-5)
    results = json.loads((folder / "results.json").read_text())
    assert results["summary"][1]["psnr"] == one.psnr and len(results["runs"]) == 3 * 4
    assert VMoBAConfig.from_json(json.dumps(results["configs"]["sparse"])) == SPARSE
    of_sparse = [run for run in results["runs"] if run["name"] == "sparse"]
    psnr = [value for run in of_sparse for value in run["near"]["frame_psnr"]]
    assert psnr == pytest.approx(10 * np.log10(255**2 / frames.ravel()), rel=1e-5)
    steps = np.array([run["step_seconds"] for run in of_sparse])
    assert one.seconds == pytest.approx(steps.min(0).sum()) and one.step_seconds == pytest.approx(np.median(steps))
    assert one.density == pytest.approx(np.mean([layer["density"] for run in of_sparse for layer in run["layers"]]))
    assert one.worst_ssim == min(run["near"]["ssim"] for run in of_sparse)
    assert f"{one.psnr:.2f}" in found.table() and f"{one.worst_ssim:.4f}" in found.table()


class _Page(html.parser.HTMLParser):
    """What a page loads, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_files(compared: tuple[Path, Any], tmp_path: Path):
    folder, found = compared
    assert {path.name for path in folder.iterdir()} == {
        "denoises",
        "frames.png",
        "index.html",
        "results.json",
        "videos.mp4",
    }
    with av.open(str(folder / "videos.mp4")) as reader:
        frames = [frame.to_ndarray(format="rgb24") for frame in reader.decode(video=0)]
    assert len(frames) == 9 * 4 and frames[0].shape == (48 + 2 * 64, 3 * 96, 3)
    shown = torch.cat(list(found.runs[0].denoise.runs())).numpy()  # H.264 changes what it keeps
    assert np.abs(frames[0][48 : 48 + 64, :96].astype(float) - shown[0]).mean() < 12
    assert matplotlib.image.imread(folder / "frames.png").shape[1] > 1000
    text = (folder / "index.html").read_text()
    page = _Page(text)
    assert all(place.startswith("data:") for place in page.loads) and "http" not in re.sub('base64,[^"]*', "", text)
    facts = json.loads(re.findall(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)[0])
    assert [pair["first"] for pair in facts["pairs"]] == [0, 9, 18, 27] and facts["names"][1] == "sparse"
    assert VMoBAConfig.from_json(facts["configs"]["sparse"]) == SPARSE
    assert "{{" not in text


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = TinyPipeline(FAMILIES["wan2.1"])
    options: dict[str, Any] = {"prompts": ["a", "b"], "output": tmp_path, "progress": False}

    def stop(*_: Any, **__: Any) -> Any:
        if pipe.calls == 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(*_, **__)

    real = denoise.run_denoise
    monkeypatch.setattr(MODULE, "run_denoise", stop)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        compare(pipe, SPARSE, **options)
    assert "Finished denoises stay in" in caught.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == ["denoises"] and len(
        list((tmp_path / "denoises").iterdir())
    ) == 3
    monkeypatch.undo()
    first = compare(pipe, SPARSE, **options)
    assert pipe.calls == 4
    again = compare(pipe, SPARSE, **options)
    assert pipe.calls == 4 and again == first
    compare(pipe, CONFIGS, **options)  # the first config has another name now, and the same results
    assert pipe.calls == 6


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompts": []}, ValueError, "prompts must be one or more, got none"),
        ({"seeds": ()}, ValueError, "seeds must be one or more, got none"),
        ({"seeds": (-1,)}, ValueError, "seeds must be"),
        ({"configs": {}}, ValueError, "configs must have one or more names"),
        ({"configs": [SPARSE]}, TypeError, "configs must be a VMoBAConfig or a mapping"),
        ({"configs": {"full attention": SPARSE}}, ValueError, "other than 'full attention'"),
        ({"call": {"prompt": "a"}}, ValueError, "got prompt"),
        ({"fps": 0}, ValueError, "fps must be"),
    ],
)
def test_bad_arguments(changes: Mapping[str, Any], error: type[Exception], words: str, tmp_path: Path):
    options: dict[str, Any] = {"configs": SPARSE, "prompts": "a", "output": tmp_path / "new", "progress": False}
    pipe = TinyPipeline(FAMILIES["wan2.1"])
    options |= changes
    with pytest.raises(error, match=re.escape(words)):
        compare(pipe, options.pop("configs"), **options)
    assert not (tmp_path / "new").exists() and pipe.calls == 0


SMALL = "num_frames=8 height=48 width=64 num_inference_steps=4"


def test_configs_by_name():
    pipe = wan_pipeline()
    own = VMoBAConfig.preset("WanTransformer3DModel", "balanced")
    assert config_of("balanced", pipe) == ("balanced", own)
    assert config_of("wan2.2-a14b:fast", pipe)[1] == VMoBAConfig.preset("wan2.2-a14b", "fast")
    assert config_of("fast", DemoPipeline()) == ("fast", VMoBAConfig.fast())
    assert config_of("paper", pipe)[1] == VMoBAConfig.paper("inference")


def test_the_command_on_a_folder_of_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A tiny pipeline with all its parts; by the command it gives the videos that it gives itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = wan_pipeline()
    pipe.register_modules(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=4, d_model=TEXT_DIM, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ).eval(),
    )
    folder, out = tmp_path / "model", tmp_path / "out"
    pipe.save_pretrained(folder)
    SPARSE.save(tmp_path / "mine.json")
    options = [f"{name}={value}" for name, value in CALL.items()]
    command = ["compare", str(folder), "--prompt", "a cat", "--config", str(tmp_path / "mine.json"), "--set", *options]
    assert main([*command, "--output", str(out)]) == 0
    assert "mine" in capsys.readouterr().out
    found = compare(pipe, {"mine": SPARSE}, prompts="a cat", call=CALL, output=tmp_path / "own", progress=False)
    psnr = json.loads((out / "results.json").read_text())["summary"][1]["psnr"]
    assert psnr == pytest.approx(found.summary()[1].psnr, abs=0.01)


def test_the_command_on_the_model_that_ships(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    SPARSE.save(tmp_path / "mine.json")
    words = f"compare demo --config {tmp_path / 'mine.json'} fast --seeds 0 1 --output {tmp_path / 'out'} --set {SMALL}"
    assert main(words.split()) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["full", "mine", "fast"]
    assert "index.html" in lines[-1] and "denoise" in captured.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 25 < results["summary"][2]["psnr"] < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --prompts empty.txt", "empty.txt holds no prompt"),
        ("demo --prompts none.txt", "cannot read none.txt"),
        ("demo --prompt none.mp4", "prompt must be 'bunny' or a video file"),
        ("demo --config none.json", "cannot read none.json"),
        ("demo --config wan2.1-14b:slow", "--config wan2.1-14b:slow: speed must be"),
        ("demo --set num_frames", "--set must be NAME=VALUE"),
        ("demo --set num_frames=7", "num_frames must be a multiple of 4, got 7"),
        ("demo --set frames=8", "call must have arguments of DemoPipeline"),
        ("demo --image none.png", "there is no file none.png"),
        ("demo --image empty.txt", "cannot read empty.txt as a picture or a video"),
        ("demo --offload model", "--offload has no effect with the model that ships"),
        ("demo --seeds -1", "seeds must be"),
        ("demo --output empty.txt", "cannot make the folder empty.txt/denoises"),
        ("none/such/folder --prompt a", "there is no folder none/such/folder"),
        ("folder --prompt a", "cannot load folder by diffusers"),
        ("folder", "there is no prompt: give --prompt"),
        ("folder --prompt a --pipeline Piano", "--pipeline must be a pipeline class of diffusers"),
        ("folder --prompt a --dtype int8", "--dtype must be a floating dtype"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "folder").mkdir()
    before = set(tmp_path.rglob("*"))
    assert main(["compare", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("error: ") == 1
    last = captured.err.splitlines()[-1]
    assert last.startswith("vmoba-flex: error: ") and message in last and "Traceback" not in captured.err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {path for path in before if path.is_file()}


def test_out_of_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(MODULE, "run_denoise", fail)
    assert main(["compare", "demo", "--output", str(tmp_path / "out")]) == 2
    assert "error: out of memory (CUDA out of memory" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["denoises"]


@pytest.mark.usefixtures("heeds_sigint")
def test_ctrl_c_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real, done = denoise.run_denoise, []

    def interrupt(*arguments: Any, **options: Any) -> Any:
        if done:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(real(*arguments, **options))
        return done[-1]

    monkeypatch.setattr(MODULE, "run_denoise", interrupt)
    assert main(f"compare demo --output {tmp_path / 'out'} --set {SMALL}".split()) == 130
    assert capsys.readouterr().err.splitlines()[-1].strip() == "vmoba-flex: stopped by SIGINT"
    assert len(done) == 1
    assert [path.suffix for path in (tmp_path / "out" / "denoises").iterdir()] == [".safetensors"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["denoises"]
