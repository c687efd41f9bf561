"""bench.attention and what all benchmarks share: a small run of each section; rows that fail, lie, die or hang."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.attention import peers, rows, run, worker
from bench.attention.report import AttentionReport
from bench.attention.rows import Contenders, specs
from bench.attention.shapes import FULL
from bench.common.supervisor import supervise
from vmoba_flex import BlockPartition, TopK, vmoba_attention

ROOT = Path(__file__).parent.parent


def test_small_run_measures_every_section_and_draws_it(tmp_path: Path):
    output, plot = tmp_path / "small.json", tmp_path / "plots" / "small.png"
    command = [sys.executable, "-m", "bench.attention.run", "--output", output, "--device", "cpu", "--small"]
    command += ["--plot", plot]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(output.read_text())
    assert report["formulas"]
    assert report["runs"][0]["versions"]["torch"] == torch.__version__
    assert report["runs"][0]["command"].startswith("python -m bench.attention.run --output bench/results/small.json")
    assert str(tmp_path) not in output.read_text()
    for section in ("main", "density", "low", "tokens", "paper", "stages", "auto"):
        rows = [row for row in report["rows"] if section in row["sections"]]
        ours = [row for row in rows if row["attention"] in ("tiles", "packed", "shared", "auto")]
        assert ours, section
        for row in ours:
            assert row["status"] == "ok", row
            if section != "stages":
                assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0
                assert 0 < row["error_ratio"] <= report["runs"][0]["error_factor"]
                assert row["forward_speed_up"] > 0 and row["forward_times_floor"] > 0
        assert not [row for row in rows if row["status"] in ("wrong", "failed", "running", "not run")], result.stderr
    stages = next(row["stages"] for row in report["rows"] if "stages" in row)
    for mode in ("forward", "forward_backward"):
        assert {"gate", "select", "plan", "gather", "attention", "merge"} <= stages[mode]["elapsed_ms"].keys()
        assert stages[mode]["kernels"]
    densities = {row["density"] for row in report["rows"] if "density" in row["sections"] and "density" in row}
    assert len(densities) >= 3
    ours = {"tiles", "packed", "shared", "auto"}
    assert {row["attention"] for row in report["rows"] if row["blocks"]} == ours | set(run.TILE_PEERS)
    low = [row for row in report["rows"] if "low" in row["sections"] and row["blocks"]]
    assert {(row["attention"], bool(row["tail"])) for row in low if row["attention"] in ours} == {
        (dispatch, tail) for dispatch in ("packed", "shared") for tail in (False, True)
    }
    peers_of = {row["attention"]: row["status"] for row in low if row["attention"] not in ours}
    # FlexAttention has no backward on a CPU.
    assert peers_of == {"FlexAttention, full tiles": "forward only", "FastVideo": "not installed"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "## density" in output.with_suffix(".md").read_text()


def test_rows_that_fail_or_lie_are_recorded_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    failures = []

    def failing(query, key, value):
        failures.append(1)
        raise RuntimeError(f"no kernel in {tmp_path}/lib/kernel.so")

    def out_of_memory(query, key, value):
        raise torch.OutOfMemoryError("tried to allocate 137 GiB")

    def missing():
        raise ModuleNotFoundError("No module named 'xformers'")

    stand_ins = {
        "FlashAttention-2": peers.CPU_PEERS["FlashAttention-2"],
        "cuDNN": peers.Peer(lambda: failing),
        "memory-efficient": peers.Peer(lambda: lambda query, key, value: value * float("nan")),
        "FlashAttention-4": peers.Peer(lambda: out_of_memory),
        "xformers": peers.Peer(missing),
    }
    monkeypatch.setattr(worker, "CPU_PEERS", stand_ins)
    monkeypatch.setattr(worker, "DISPATCHES", ("tiles", "unheard-of"))
    output = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--small", "--sections", "main", "--output", str(output)]
    assert worker.work(run.parse(arguments)) == 0

    def statuses() -> dict[str, str]:
        return {row["attention"]: row["status"] for row in json.loads(output.read_text())["rows"]}

    expected = {
        "FlashAttention-2": "ok",
        "cuDNN": "failed",
        "memory-efficient": "wrong",
        "FlashAttention-4": "out of memory",
        "xformers": "not installed",
        "tiles": "ok",
        "unheard-of": "unsupported",
    }
    # Packed rows are wanted whatever the table of dispatches holds.
    assert statuses() == expected | {"packed": "ok"}
    rows = {row["attention"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["cuDNN"]["error"] == "RuntimeError: no kernel in kernel.so"
    assert "forward_ms" not in rows["memory-efficient"]

    # Another environment, where what was missing is there: nothing else is measured again.
    monkeypatch.setitem(stand_ins, "xformers", stand_ins["FlashAttention-2"])
    assert worker.work(run.parse([*arguments, "--add"])) == 0
    assert statuses() == expected | {"packed": "ok", "xformers": "ok"}
    assert len(failures) == 1
    after = {row["attention"]: row for row in json.loads(output.read_text())["rows"]}
    for measured in ("forward_ms", "forward_backward_ms", "output_error", "wall_s"):
        assert after["tiles"][measured] == rows["tiles"][measured]


def test_the_command_line_knows_all_peers_and_sections():
    assert set(run.PEERS) == peers.PEERS.keys()
    assert set(run.TILE_PEERS) == peers.TILE_PEERS.keys()
    contenders = Contenders(("cuDNN",), ("cuDNN",), (), {}, ("auto", "packed"), ("triton",), False)
    assert {spec.section for spec in specs(FULL, list(run.SECTIONS), contenders)} == set(run.SECTIONS)


def test_a_wrong_tail_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(rows, "LOW_DENSITIES", (0.25,))
    sound = worker.vmoba_attention

    def without_tail(*inputs, tail=None, **options):
        return sound(*inputs, **options)

    monkeypatch.setattr(worker, "vmoba_attention", without_tail)
    output = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--small", "--sections", "low", "--output", str(output)]
    assert worker.work(run.parse(arguments)) == 0
    found = {(row["attention"], bool(row["tail"])): row["status"] for row in json.loads(output.read_text())["rows"]}
    assert all(found[dispatch, True] == "wrong" for dispatch in ("packed", "shared"))
    assert all(found[dispatch, False] == "ok" for dispatch in ("packed", "shared"))


def test_tiles_by_others_are_called_as_they_want(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def block_sparse_attn(query, key, value, block_map, sizes):
        calls.append((block_map, sizes))
        mask = block_map.repeat_interleave(64, 2).repeat_interleave(64, 3)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), None

    monkeypatch.setitem(sys.modules, "fastvideo_kernel", SimpleNamespace(block_sparse_attn=block_sparse_attn))
    query, key, value = torch.randn(3, 1, 2, 512, 8, generator=torch.Generator().manual_seed(0))
    partition, rule = BlockPartition((1, 1, 512), (1, 1, 64)), TopK(density=0.25)
    attend = peers.TILE_PEERS["FastVideo"].load()(partition, rule)
    expected = vmoba_attention(query, key, value, partition, rule, dispatch="shared")
    for _ in range(2):
        torch.testing.assert_close(attend(query, key, value), expected)
    (chosen, sizes), again = calls[0], calls[1]
    assert chosen is again[0]  # chosen once
    assert chosen.dtype == torch.bool and sizes.tolist() == [64] * 8 and sizes.dtype == torch.int32
    assert (chosen.sum(-1) == 2).all()


def test_no_row_starts_without_budget(tmp_path: Path):
    output = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--small", "--output", str(output), "--budget-s", "-1"]
    assert worker.work(run.parse(arguments)) == 0
    assert {row["status"] for row in json.loads(output.read_text())["rows"]} == {"not run"}


PROCESS = """
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
rows = json.loads(path.read_text())["rows"] if "--add" in sys.argv else []
def save(status):
    row = dict.fromkeys(["attention", "backend", "compiled", "rule", "kind", "inputs"], "")
    row |= {"id": str(len(rows)), "sections": [], "status": status, "tokens": 1, "heads": 1, "blocks": 0}
    path.write_text(json.dumps({"runs": [], "formulas": {}, "rows": [*rows, row]}))
if len(rows) == 0:
    save("running"); os._exit(11)
if len(rows) == 1:
    save("running"); time.sleep(60)
if len(rows) == 2:
    save("failed"); sys.exit(75)
save("ok")
"""


def test_a_process_that_dies_hangs_or_loses_its_gpu_costs_one_row(tmp_path: Path):
    output = tmp_path / "x.json"
    command = [sys.executable, "-c", PROCESS, str(output)]
    assert supervise(command, output, 60, 1, AttentionReport) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "failed", "failed", "ok"]
    assert rows[0]["error"] == "the process ended with 11"
    assert rows[1]["error"] == "the process was stopped after 1 s"


def test_a_process_that_ends_between_rows_is_not_started_again(tmp_path: Path):
    assert supervise([sys.executable, "-c", "exit(3)"], tmp_path / "x.json", 60, 60, AttentionReport) == 3


FLASH_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_measuring_processes_cache_flash_kernels_unless_told_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv(FLASH_CACHE, raising=False)
    if given is not None:
        monkeypatch.setenv(FLASH_CACHE, given)
    code = f"import os, sys; sys.exit(10 + int(os.environ['{FLASH_CACHE}']))"
    command = [sys.executable, "-c", code]
    assert supervise(command, tmp_path / "x.json", 60, 60, AttentionReport) == 10 + int(expected)


def test_importing_what_starts_processes_changes_no_environment():
    runs = [f"bench.{name}.run" for name in ("attention", "models", "distributed", "quality")]
    code = f"import os; before = dict(os.environ); import {', '.join(runs)}; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
