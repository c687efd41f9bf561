"""What "auto" takes on other machines; where a machine comes from; and what happens when it cannot be had."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vmoba_flex import BlockPartition, TopK
from vmoba_flex.dispatch import machine, machine_file
from vmoba_flex.dispatch.choose import choose_dispatch
from vmoba_flex.dispatch.machine import HOPPER, Machine, machine_of, scaled, use_machine
from vmoba_flex.insight.crossover import Timing
from vmoba_flex.insight.profile import machine_from, write_profile

GPU = torch.device("cuda", 0)
AMPERE = scaled(2e14, 5e-6)


def first(of: Machine, gradients: bool) -> int:
    """The fewest thousands of tokens from which "auto" takes packed, which it keeps to with more."""
    with FakeTensorMode():

        def pick(tokens: int) -> str:
            query = torch.empty(1, 12, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=gradients)
            partition = BlockPartition((1, 1, tokens), (1, 1, -(-tokens // 48)))
            return choose_dispatch(query, query, query, partition, TopK(9), machine=of)[0]

        picked = [pick(1000 * thousands) for thousands in range(2, 80)]
    start = picked.index("packed")
    assert set(picked[:start]) == {"dense"} and set(picked[start:]) == {"packed"}
    return 2 + start


@pytest.mark.parametrize("gradients", [False, True])
def test_a_slower_gpu_changes_over_sooner_and_a_slower_host_later(gradients: bool):
    def of(machine: Machine) -> int:
        return first(machine, gradients)

    slow_host = scaled(HOPPER.dense_rate, 10e-6)
    assert of(AMPERE) < of(HOPPER) < of(slow_host)
    # Dense seconds grow with the square of the tokens: twice the launches pay from 1.41 times as many tokens on.
    assert of(slow_host) == pytest.approx(of(HOPPER) * 2**0.5, abs=1.5)
    assert of(AMPERE) == pytest.approx(of(HOPPER) * (2e14 / HOPPER.dense_rate) ** 0.5, abs=1.5)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """A GPU other than Hopper, whose rates the fixture's mock gives, in a process that knows none yet."""
    monkeypatch.delenv(machine.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine._log_once.cache_clear()
    machine._of_environment.cache_clear()
    with (
        mock.patch.object(machine, "_known", {}),
        mock.patch.object(machine, "_chosen", None),
        mock.patch.object(machine, "probe", return_value=(2e14, 5e-6)) as probe,
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch("torch.cuda.get_device_name", return_value="A GPU/8 GB"),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 9)),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
    ):
        yield probe


def test_a_gpu_is_measured_once_and_remembered_on_disk(gpu: mock.Mock):
    assert machine_of(GPU) == machine_of(GPU) == AMPERE
    machine._known.clear()  # another process
    assert machine_of(GPU) == AMPERE
    gpu.assert_called_once_with(GPU)
    path = machine.path_of(0)
    assert path.parent == machine_file.folder()
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert torch.__version__ in path.name and "/" not in path.name


def test_hopper_is_built_in_and_a_file_goes_before_it(gpu: mock.Mock):
    with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        assert machine_of(GPU) == HOPPER
        machine._known.clear()
        machine_file.write(machine.path_of(0), {"machine": dataclasses.asdict(AMPERE)})
        assert machine_of(GPU) == AMPERE
    gpu.assert_not_called()


def test_nothing_is_measured_inside_compile_or_capture(gpu: mock.Mock, caplog: pytest.LogCaptureFixture):
    def rate(x: torch.Tensor) -> torch.Tensor:
        return x * machine_of(GPU).dense_rate

    assert torch.compile(rate, fullgraph=True, backend="eager")(torch.ones(())) == HOPPER.dense_rate
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        assert machine_of(GPU) == HOPPER
    gpu.assert_not_called()
    ours = [record.getMessage() for record in caplog.records if record.name == machine.__name__]
    assert len(ours) == 1 and "an H200's times on A GPU/8 GB" in ours[0]
    assert machine_of(GPU) == AMPERE  # measured by the next call outside
    torch.compiler.reset()
    assert torch.compile(rate, fullgraph=True, backend="eager")(torch.ones(())) == AMPERE.dense_rate
    torch.compiler.reset()


def test_ranks_that_share_a_call_do_not_measure(gpu: mock.Mock):
    assert machine_of(GPU, ranks=2) == HOPPER
    use_machine(AMPERE)
    assert machine_of(GPU, ranks=2) == AMPERE
    gpu.assert_not_called()


BAD_FILES = {
    "half": '{"format": 1, "mach',
    "another format": '{"format": 2, "machine": {}}',
    "a field too few": '{"format": 1, "machine": {"dense_rate": 1.0}}',
    "no numbers": json.dumps({"format": 1, "machine": dataclasses.asdict(HOPPER) | {"launches": ["a", 1]}}),
    "no rate": json.dumps({"format": 1, "machine": dataclasses.asdict(HOPPER) | {"dense_rate": 0}}),
    "one of two": json.dumps({"format": 1, "machine": dataclasses.asdict(HOPPER) | {"launches": [1.0]}}),
    "a list": "[]",
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_an_unreadable_file_is_logged_and_measured_anew(gpu: mock.Mock, text: str, caplog: pytest.LogCaptureFixture):
    path = machine.path_of(0)
    path.parent.mkdir()
    path.write_text(text)
    assert machine_of(GPU) == AMPERE
    assert len(caplog.records) == 1 and str(path) in caplog.text
    assert machine_file.read(path)["machine"] == json.loads(json.dumps(dataclasses.asdict(AMPERE)))
    gpu.assert_called_once()
    path.write_text(text)
    with pytest.raises(ValueError, match="machine must be 'built-in' or a file that vmoba-flex bench wrote, got "):
        use_machine(path)


def test_a_folder_that_cannot_be_written_is_logged(gpu: mock.Mock, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "vmoba_flex").write_text("no folder")
    assert machine_of(GPU) == machine_of(GPU) == AMPERE
    gpu.assert_called_once()
    assert "cannot be written" in caplog.text


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "machine.json"
    machine_file.write(path, {"machine": {"old": 1}})
    with pytest.raises(TypeError):
        machine_file.write(path, {"machine": object()})
    assert machine_file.read(path)["machine"] == {"old": 1}
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_gpu_without_room_to_measure_takes_what_is_built_in(gpu: mock.Mock, caplog: pytest.LogCaptureFixture):
    gpu.side_effect = torch.OutOfMemoryError("no memory")
    assert machine_of(GPU) == HOPPER
    assert "measuring failed (no memory)" in caplog.text


@pytest.mark.parametrize("choose", ["variable", "call"])
def test_a_user_chooses_or_forbids(gpu: mock.Mock, choose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def take(name: str) -> Machine:
        if choose == "call":
            use_machine(name)
        else:
            monkeypatch.setenv(machine.VARIABLE, name)
        return machine_of(GPU)

    path = tmp_path / "mine.json"
    machine_file.write(path, {"machine": dataclasses.asdict(AMPERE)})
    assert take(str(path)) == AMPERE
    assert take("built-in") == HOPPER
    gpu.assert_not_called()
    with pytest.raises(ValueError, match=r"machine must be 'built-in' or a file .*, got 'missing.json'"):
        take("missing.json")


def test_what_is_no_machine():
    with pytest.raises(TypeError, match="machine must be a Machine, a str, a Path or None, got int"):
        use_machine(3)  # pyright: ignore[reportArgumentType]
    for name, value in (("dense_rate", -1.0), ("backward", float("nan")), ("launches", (1.0,)), ("flash_from", "no")):
        with pytest.raises(ValueError, match=f"{name} must be .* finite"):
            dataclasses.replace(HOPPER, **{name: value})


def timings(density: float, seconds: Callable[[int, float, bool], tuple[float, float]]) -> list[Timing]:
    return [Timing(n, each, *seconds(n, density, each), density) for n in (1024, 32768) for each in (False, True)]


def test_a_profile_finds_the_machine_that_was_timed():
    def seconds(tokens: int, density: float, backward: bool) -> tuple[float, float]:
        dense = 4 * 12 * tokens**2 * 64 / AMPERE.dense_rate * (AMPERE.backward if backward else 1)
        constant, factor = AMPERE.packed_share
        return dense, max(AMPERE.launches[backward], (constant + factor * density) * dense)

    found = machine_from([x for density in (0.1, 0.2, 0.5) for x in timings(density, seconds)], 12, 64)
    for field in dataclasses.fields(Machine):
        assert getattr(found, field.name) == pytest.approx(getattr(AMPERE, field.name)), field.name


def test_a_profile_is_what_auto_then_decides_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def crossover(tokens: Sequence[int], rule: TopK, *, progress: Callable[[Timing], None], **_: Any) -> list[Timing]:
        assert rule.density is not None
        # Wins from 1024 tokens on at density 0.5, and never at 0.9.
        found = [
            Timing(n, each, n / 1024, 1.0 if rule.density < 0.6 else n, rule.density)
            for n in tokens
            for each in (False, True)
        ]
        for one in found:
            progress(one)
        return found

    path = tmp_path / "new" / "machine.json"
    with mock.patch("vmoba_flex.insight.profile.crossover", crossover):
        lines = write_profile(path, 1, 8, tokens=(512, 2048), densities=(0.5, 0.9))
    assert lines[1:3] == ["  packed, density 0.5: 1,024 / 1,024", "  packed, density 0.9: never / never"]
    assert str(path) in lines[-1]
    assert "profile 24 of 24: 2,048 tokens, density 0.9, forward + backward: 2,048,000.0 ms" in capsys.readouterr().err
    facts = machine_file.read(path)
    assert len(facts["crossovers"]) == 3 * 2 * 2
    with mock.patch.object(machine, "_chosen", None):
        use_machine(path)
        assert machine_of(GPU) == Machine(**facts["machine"])
