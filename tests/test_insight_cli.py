"""inspect, calibrate, plot and bench on the command line: files, pictures, and errors of one line."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.image
import pytest
import torch
from safetensors.torch import save_file

from tests.test_insight import CONFIG, record
from vmoba_flex import Tail, Threshold, VMoBAConfig
from vmoba_flex.cli import main
from vmoba_flex.insight import save


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with records and things that are none, and the current one."""
    monkeypatch.chdir(tmp_path)
    save([record(layer, seed=layer, step=step) for layer in range(3) for step in (0, 5)], tmp_path / "ok.safetensors")
    (tmp_path / "ok.json").write_text(CONFIG.to_json())
    (tmp_path / "large.json").write_text(CONFIG.to_json().replace("[3, 4]", "[30, 40]"))
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "key.json").write_text(CONFIG.to_json().replace("dense_steps", "dense_stops"))
    (tmp_path / "folder.png").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    facts = {"version": 1, "records": [{"grid": [1, 1, 1]}]}
    tensors = {"0.query": torch.zeros(1, 1, 1), "0.key": torch.zeros(1, 1, 1)}
    save_file(tensors, tmp_path / "keys.safetensors", {"vmoba_flex": json.dumps(facts)})
    save_file(tensors, tmp_path / "new.safetensors", {"vmoba_flex": json.dumps(facts | {"version": 2})})
    return tmp_path


def test_inspect(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "ok.safetensors", "--config", "ok.json", "--json", "i.json", "--plot", "i.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6 * 2 + 1 and "256 sampled queries, seed 0" in lines[-1]
    results = json.loads((here / "i.json").read_text())
    assert len(results["heads"]) == 12 and results["rule"] == json.loads(CONFIG.to_json()) and results["rows"] == 256
    assert all(
        0 < head["density"] <= 1 and 0 < head["recall"] <= head["best_recall"] + 1e-6 for head in results["heads"]
    )
    assert matplotlib.image.imread(here / "i.png").shape[1] == 1320


def test_what_a_tail_adds_is_told(here: Path, capsys: pytest.CaptureFixture[str]):
    options = ["ok.safetensors", "--density", "0.2", "--pool", "query", "--tail", "4", "--gate", "spread"]
    assert main(["inspect", *options, "--json", "i.json", "--plot", "i.png"]) == 0
    results = json.loads((here / "i.json").read_text())
    assert results["tail"] == "Tail(cell=4)"
    assert all(head["recall"] < head["overlap"] < 1 for head in results["heads"])
    config = ["--output", "c.json", "--tail", "4", "--rows", "16", "--gates", "exact"]
    capsys.readouterr()
    assert main(["calibrate", "ok.safetensors", "--recall", "0.8", *config]) == 0
    assert capsys.readouterr().out.count("gate='exact'") == 3
    found = VMoBAConfig.from_json((here / "c.json").read_text())
    assert found.tail == Tail(4)
    assert isinstance(found.rule, Mapping) and all(
        getattr(rule, "gate", None) == "exact" for rule in found.rule.values()
    )
    for what, wide in (("choice", 1), ("density", 1400)):  # a panel more
        rule = ["--density", "0.2", "--pool", "query", "--tail", "4"]
        assert main(["plot", "ok.safetensors", "--output", f"{what}.png", "--what", what, *rule]) == 0
        assert matplotlib.image.imread(here / f"{what}.png").shape[1] > wide


@pytest.mark.parametrize("base", [[], ["--config", "ok.json"]])
def test_calibrate(here: Path, base: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["calibrate", "ok.safetensors", "--recall", "0.8", "--output", "c.json", *base]) == 0
    config = VMoBAConfig.from_json((here / "c.json").read_text())
    assert isinstance(config.rule, Mapping) and set(config.rule) == set(config.cycle)
    assert all(isinstance(rule, Threshold) and rule.max_density for rule in config.rule.values())
    assert config.dense_steps == (0 if base else 0.25)
    output = capsys.readouterr().out
    assert output.count("normalize='softmax'") == 3 and output.count("dense_steps: 0.25, as in the paper.") == (
        not base
    )
    # At 192 tokens full attention is faster than a launch, and the density may be too large as well.
    assert output.count(": auto runs full attention, ") == 3


@pytest.mark.parametrize(
    "options",
    [["mass", "--layer", "1"], ["choice", "--step", "5", "--query", "1,2,3", "--head", "1"], ["density"]],
    ids=str,
)
def test_plot(here: Path, options: list[str]):
    assert main(["plot", "ok.safetensors", "--output", "p.png", "--what", *options]) == 0
    assert min(matplotlib.image.imread(here / "p.png").shape[:2]) > 300


def test_bench(here: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--tokens", "512", "1024", "--heads", "1", "--head-dim", "8", "--density", "0.25", "--pool", "query"]
    assert main(["bench", *options, "--tail", "16", "--json", "b.json", "--plot", "b.png"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[1] == "1,024 tokens: timed at 8x11x11 = 968, the nearest with square frames."
    assert "full attention ms  sparse ms  speed up  density" in lines[2] and "forward + backward: " in lines[-1]
    assert [line.partition(":")[0] for line in captured.err.splitlines()] == [
        f"{tokens} tokens, {direction}" for tokens in (512, 968) for direction in ("forward", "forward + backward")
    ]
    results = json.loads((here / "b.json").read_text())
    assert (len(results["timings"]), results["tail"]) == (4, "Tail(cell=16)")
    assert matplotlib.image.imread(here / "b.png").shape[1] > 1000


OK = "ok.safetensors"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect missing.safetensors", "there is no file missing.safetensors"),
        ("inspect text.safetensors", "cannot read text.safetensors as safetensors"),
        ("inspect folder.png", "there is no file folder.png"),
        ("inspect other.safetensors", "other.safetensors holds no captured query and key"),
        ("inspect keys.safetensors", "keys.safetensors holds records that do not fit together"),
        ("inspect new.safetensors", "has version 2 of its format, not 1"),
        (f"inspect {OK} --rows 0", "rows must be at least 1, got 0"),
        (f"inspect {OK} --tail 0", "cell must be at least 1, got 0"),
        (f"inspect {OK} --config ok.json --tail 4", "--tail 4 has no effect with --config ok.json"),
        (f"inspect {OK} --tau 1.5", "tau must lie in (0, 1], got 1.5"),
        (f"inspect {OK} --config missing.json", "cannot read missing.json"),
        (f"inspect {OK} --config text.json", "text.json is no VMoBAConfig"),
        (f"inspect {OK} --config key.json", "key.json is no VMoBAConfig (text must have keys of"),
        (f"inspect {OK} --config large.json --json i.json --plot i.png", "spatial block must not be larger than grid"),
        (f"inspect {OK} --json i.txt", "must end in .json, got i.txt"),
        (f"inspect {OK} --json none/i.json", "cannot write none/i.json"),
        (f"inspect {OK} --plot folder.png", "cannot write folder.png, which is a folder"),
        (f"calibrate {OK} --recall 2 --output c.json", "recall must lie in (0, 1], got 2.0"),
        ("calibrate text.safetensors --recall 0.5 --output c.json", "cannot read text.safetensors"),
        (f"calibrate {OK} --density 0.5 --config large.json --output c.json", "must not be larger than grid"),
        (f"plot {OK} --layer 9", "no record has layer 9 and step None: name one of the recorded 0 and 0, 0 and 5"),
        (f"plot {OK} --what choice --query 9,0,0", "query must lie in the grid 4x6x8, got (9, 0, 0)"),
        (f"plot {OK} --what choice --head 7", "head must be one of the recorded [0, 1], got 7"),
        (f"plot {OK} --output p.jpg", "must end in .png, got p.jpg"),
        ("bench --tokens 5 --json b.json", "tokens must be at least one number of 512 or more, got [5]"),
        ("bench --heads 0", "heads must be at least 1, got 0"),
        ("bench --density 0", "density must lie in (0, 1], got 0.0"),
    ],
)
def test_bad_input_is_one_line(here: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("vmoba-flex: error: ") and message in captured.err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


@pytest.mark.parametrize("words", ["calibrate ok.safetensors", "plot ok.safetensors --what all", "inspect"])
def test_malformed_commands(words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2


@pytest.mark.parametrize(("gone", "words"), [("safetensors", "inspect x"), ("matplotlib", f"plot {OK}")])
def test_missing_extra_is_named(here: Path, gone: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gone else find(name))
    assert main(words.split()) == 2
    assert capsys.readouterr().err == (
        f"vmoba-flex: error: this needs {gone}: pip install {gone} (in a clone: pip install '.[insight]')\n"
    )
