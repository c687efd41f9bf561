"""The command line as a process: options that exclude one another, signals, outputs that cannot be written, help."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.test_insight import CONFIG, record
from vmoba_flex import __version__, cli, rules
from vmoba_flex.arguments import parse
from vmoba_flex.cli import main
from vmoba_flex.insight import save
from vmoba_flex.user_error import UserError

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "vmoba_flex.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with records and a config."""
    monkeypatch.chdir(tmp_path)
    save([record(layer) for layer in range(3)], "ok.safetensors")
    CONFIG.save("ok.json")
    return tmp_path


def command(*words: str, **options) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": hear_signals} | options
    return subprocess.Popen([*COMMAND, *words], text=True, env=ENVIRONMENT, **options)


def hear_signals() -> None:
    """Undoes what nohup, or a shell that starts these tests in the background, has it ignore."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


@pytest.mark.parametrize("words", ["--help", "--version", "demo --help", "inspect --help", "bench --help"])
def test_help_needs_no_torch(words: str):
    code = f"import sys; sys.argv[1:] = {words.split()}; from vmoba_flex.cli import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\nassert not 'torch' in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], text=True, env=ENVIRONMENT, capture_output=True, check=True)
    assert result.stdout.startswith("usage: vmoba-flex" if "--help" in words else f"vmoba-flex {__version__}\n")


@pytest.mark.parametrize(("option", "choices"), [("pool", rules.POOLS), ("normalize", rules.NORMALIZE)])
def test_choices_are_those_of_the_rules(option: str, choices: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    for choice in choices:
        assert getattr(parse(["inspect", "x", f"--{option}", choice]), option) == choice
    with pytest.raises(SystemExit):
        parse(["inspect", "x", f"--{option}", "other"])
    assert re.findall(r"'(\w+)'", capsys.readouterr().err.partition("choose from")[2]) in ([], list(choices))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{reading} --config ok.json {option}", f"{shown} has no effect with --config ok.json")
        for reading in ("inspect ok.safetensors", "plot ok.safetensors --what density")
        for option, shown in [
            ("--tau 0.9", "--tau 0.9"),
            ("--tau 0.25", "--tau 0.25"),
            ("--density 0.5", "--density 0.5"),
            ("--pool head", "--pool head"),
            ("--normalize minmax", "--normalize minmax"),
            ("--max-density 0.5", "--max-density 0.5"),
        ]
    ]
    + [
        (f"{command} --density 0.5 {option}", f"{option} has no effect with --density 0.5")
        for command in ("inspect ok.safetensors", "plot ok.safetensors --what choice", "bench")
        for option in ("--tau 0.9", "--normalize softmax", "--max-density 0.5")
    ]
    + [
        (f"plot ok.safetensors --what {what} {option}", f"{option} has no effect with --what {what}")
        for what, options in {
            "mass": ["--config ok.json", "--tau 0.9", "--density 0.9", "--pool query", "--head 1", "--query 1,2,3"],
            "choice": ["--rows 9", "--seed 1"],
            "density": ["--layer 0", "--step 0", "--head 0", "--query 0,0,0"],
        }.items()
        for option in options
    ]
    + [
        ("plot ok.safetensors --tau 0.9", "--tau 0.9 has no effect with --what mass"),
        ("demo --density 0.5 --tau 0.9", "--tau 0.9 has no effect with --density 0.5"),
    ],
)
def test_options_without_an_effect_are_refused(
    here: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
):
    before = set(here.iterdir())
    assert main(words.split()) == 2
    assert capsys.readouterr() == ("", f"vmoba-flex: error: {message}: leave one of them out\n")
    assert set(here.iterdir()) == before


@pytest.mark.parametrize("words", ["inspect ok.safetensors", "inspect --help", "--version"])
def test_a_full_device_is_one_line(here: Path, words: str):
    with open("/dev/full", "w") as full:
        process = command(*words.split(), stdout=full)
        _, errors = process.communicate()
    assert process.returncode == 2
    assert errors == ("vmoba-flex: error: cannot write the report (No space left on device): give it a place to go\n")


@pytest.mark.parametrize("words", ["inspect ok.safetensors", "bench --help"])
def test_a_reader_that_is_gone_is_no_error(here: Path, words: str):
    reader, writer = os.pipe()
    os.close(reader)
    process = command(*words.split(), stdout=writer)
    os.close(writer)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "")


def test_a_closed_stdout_is_one_line(here: Path):
    script = f"{' '.join(COMMAND)} inspect ok.safetensors >&-"
    result = subprocess.run(script, shell=True, text=True, env=ENVIRONMENT, stderr=subprocess.PIPE)
    assert result.returncode == 2
    assert result.stderr == "vmoba-flex: error: cannot write the report (stdout is closed): give it a place to go\n"


def written(metadata: str) -> None:
    """A file of records with this text for what it says of them."""
    save_file({"a": torch.zeros(1)}, "bad.safetensors", {"vmoba_flex": metadata})


@pytest.mark.parametrize(
    ("metadata", "words", "message"),
    [
        ('{"version": 1, "records": []}', "inspect bad.safetensors", "bad.safetensors holds no records"),
        ('{"version": 1, "records": []}', "calibrate bad.safetensors --recall 0.5", "bad.safetensors holds no records"),
        ("[" * 10**5, "inspect bad.safetensors", "bad.safetensors holds records that do not fit together"),
        ("null", "inspect bad.safetensors", "bad.safetensors holds records that do not fit together"),
        ("", f"inspect ok.safetensors --tail {10**30}", f"cell must be below 2**31, got {10**30}"),
        ("", "plot ok.safetensors --rows 0", "rows must be at least 1, got 0"),
        ("", f"inspect ok.safetensors --seed {10**30}", "seed must lie in -2**63..2**63 - 1"),
        (
            "",
            "inspect ok.safetensors --json ok.safetensors/a.json",
            "cannot write ok.safetensors/a.json (Not a directory)",
        ),
        ("", f"inspect ok.safetensors --json {'a' * 300}.json", "(File name too long)"),
        ("", "inspect ok.safetensors --json .json", "so its name must end in .json, got .json"),
    ],
)
def test_odd_files_and_numbers_are_one_line(
    here: Path, metadata: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
):
    written(metadata)
    before = set(here.iterdir())
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vmoba-flex: error: ") and message in line
    assert set(here.iterdir()) == before


def test_a_report_that_the_encoding_lacks_letters_for_is_written(here: Path):
    (here / "é").mkdir()
    words = ["calibrate", "ok.safetensors", "--recall", "0.5", "--output", "é/ü.json"]
    result = subprocess.run([*COMMAND, *words], env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert result.returncode == 0 and b"Config: \\xe9/\\xfc.json" in result.stdout and (here / "é" / "ü.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is something to write")
def test_a_profile_needs_a_gpu(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--tokens", "512", "--profile", "p.json"]) == 2
    assert "--profile p.json has no effect without a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_the_exit_code_does_not_need_stderr(here: Path, redirection: str):
    script = f"{' '.join(COMMAND)} inspect ok.safetensors --tau 0.5 --density 0.5 {redirection}"
    assert subprocess.run(script, shell=True, env=ENVIRONMENT).returncode == 2


@pytest.mark.usefixtures("heeds_sigint")
@pytest.mark.parametrize("then", [ImportError("half loaded"), UserError("no file"), None])
def test_a_signal_that_was_swallowed_still_counts(
    here: Path, then: Exception | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def command(_: object) -> str:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        if then is not None:
            raise then
        signal.raise_signal(signal.SIGTERM)  # at once, as a process group sends: files are being deleted
        monkeypatch.setattr(cli, "_SECONDS_TO_DELETE", 0.0)
        signal.raise_signal(signal.SIGINT)
        return "never"

    monkeypatch.setattr(cli, "_command", lambda _: command)
    assert main(["inspect", "ok.safetensors"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "vmoba-flex: stopped by SIGTERM\n"


def wait_for(done, process: subprocess.Popen[str]) -> None:
    while not done():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("words", "wait"),
    [
        ("bench --tokens 8192 --json b.json", 0.0),
        ("bench --tokens 8192 --json b.json", 1.5),
        ("calibrate ok.safetensors ok.safetensors --recall 0.9 --rows 100000", 0.0),
        ("demo --output demo.png", 0.0),
    ],
)
def test_a_signal_ends_in_one_line_and_leaves_nothing(here: Path, words: str, wait: float, number: signal.Signals):
    before = set(here.iterdir())
    process = command(*words.split())
    wait_for(lambda: set(here.iterdir()) != before, process)  # the draft of what it is to write
    time.sleep(wait)
    process.send_signal(number)
    output, errors = process.communicate()
    assert (process.returncode, output) == (128 + number, "")
    assert errors.splitlines()[-1].endswith(f"vmoba-flex: stopped by {number.name}") and "Traceback" not in errors
    assert set(here.iterdir()) == before


def test_an_ignored_signal_stays_ignored(here: Path):
    process = command(
        *["bench", "--tokens", "512", "--heads", "1", "--head-dim", "8", "--json", "b.json"], preexec_fn=ignore_hang_up
    )
    wait_for(lambda: any(path.name.startswith(".b.json") for path in here.iterdir()), process)
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.returncode == 0 and (here / "b.json").exists()


def ignore_hang_up() -> None:
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
