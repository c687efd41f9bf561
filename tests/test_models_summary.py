"""A handle's summary and the log say what ran in each layer, and why it is not what was asked for."""

import dataclasses
import logging
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("diffusers")

from tests.test_models_memory import KEPT
from tests.video_models import BLOCKS, FAMILIES, GRID, OTHER_GRID, SPARSE, compile_blocks, run
from vmoba_flex import Remember, Tail, TopK, VMoBAConfig
from vmoba_flex.models import apply_vmoba

WAN = FAMILIES["wan2.1"]
TOO_SMALL = "full attention takes 0.1 ms here"


def rows_of(summary: str) -> list[str]:
    """The attention, dispatch, kernels and reason of each layer."""
    head, *rows = summary.splitlines()[1:]
    start, density, why = (head.index(word) for word in ("attention  ", "last density", "why"))
    return [" ".join((row[start:density] + row[why:]).split()) for row in rows]


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (SPARSE, "", ["sparse packed eager"] * 3),
        (SPARSE, "disabled", ["dense - torch set_enabled(False)"] * 3),
        (SPARSE, "auto is dense", [f"dense dense torch {TOO_SMALL}"] * 3),
        (
            dataclasses.replace(SPARSE, dense_layers=[-1]),
            "",
            [*["sparse packed eager"] * 2, "dense - torch dense_layers"],
        ),
        (dataclasses.replace(SPARSE, dense_steps=3), "", ["dense - torch dense_steps"] * 3),
        (dataclasses.replace(SPARSE, dispatch="shared"), "", ["sparse shared eager"] * 3),
        (KEPT, "steps", ["remembered packed eager"] * 3),
        (KEPT, "steps, auto is dense", [f"dense dense torch {TOO_SMALL}"] * 3),
        (KEPT, "", ["sparse packed eager nothing is remembered"] * 3),
        (KEPT, "steps, gradients", ["sparse packed eager remember has no effect here"] * 3),
        (KEPT, "steps, another grid", ["sparse packed eager the call changed in mid-run: nothing is remembered"] * 3),
        (
            dataclasses.replace(KEPT, remember=Remember(max_bytes=1)),
            "steps",
            ["sparse packed eager the choice does not fit into max_bytes=1"] * 3,
        ),
    ],
)
def test_says_what_ran(config: VMoBAConfig, change: str, expected: list[str], caplog: pytest.LogCaptureFixture):
    model, auto = WAN.build(), ("dense", TOO_SMALL) if "auto is dense" in change else ("packed", "")
    handle, grid = apply_vmoba(model, config), GRID
    assert rows_of(handle.summary()) == ["- - -"] * 3
    handle.set_enabled("disabled" not in change)
    with (
        torch.set_grad_enabled("gradients" in change),
        mock.patch("vmoba_flex.dispatch.choose.choose_dispatch", return_value=auto),
        caplog.at_level(logging.INFO, "vmoba_flex"),
    ):
        for step in (0, 1, 2) if "steps" in change else (2,):
            grid = OTHER_GRID if "grid" in change and step == 2 else GRID
            handle.set_step(step, 4)
            for _ in range(2):
                run(model, WAN.inputs(grid))
    assert rows_of(handle.summary()) == expected
    lines = [one.getMessage() for one in caplog.records if one.levelno == logging.INFO]
    assert len(lines) == len(set(lines))
    assert lines[-1].startswith(f"WanTransformer3DModel, grid {'x'.join(map(str, grid))}: 1 x temporal")
    for row in expected:
        attention, dispatch, kernels, *why = row.split(" ", 3)
        words = f"al {attention}" + ("" if dispatch == "-" else f" by {dispatch} on {kernels}")
        assert words in lines[-1] and all(f"({reason})" in lines[-1] for reason in why)


@torch.no_grad()
def test_says_rule_tail_and_the_largest_density(caplog: pytest.LogCaptureFixture):
    model = WAN.build()
    config = VMoBAConfig(*BLOCKS, TopK(1), tail=Tail(2), cycle=("spatial",))
    with apply_vmoba(model, config) as handle, caplog.at_level(logging.INFO, "vmoba_flex"):
        run(model, WAN.inputs(GRID))
        row = handle.summary().splitlines()[-1]
    assert "4 of 3x2x3" in row and "TopK(k=1" in row and "Tail(cell=2)" in row and "0.250" in row
    assert "3 x spatial sparse by packed on eager, density at most 0.250 of 4 blocks, Tail(cell=2)" in caplog.text


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_models_say_the_same(
    gradients: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Without gradients an op runs Python; with them, what ran is noted as graphs are made."""
    torch.compiler.reset()
    monkeypatch.setattr("vmoba_flex.models.traced._notes", {})  # of all graphs in this process
    config = dataclasses.replace(SPARSE, dense_layers=[0], cycle=("spatial",))
    model, eager = WAN.build(num_layers=2), WAN.build(num_layers=2)
    found: Any = []
    for one in (model, eager):
        handle = apply_vmoba(one, config)
        if one is model:
            compile_blocks(model, WAN, "aot_eager")
            if gradients:
                model.enable_gradient_checkpointing()  # pyright: ignore
        with torch.set_grad_enabled(gradients), caplog.at_level(logging.INFO, "vmoba_flex"):
            for again in (False, True):
                with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
                    run(one, WAN.inputs(GRID))
        found.append((handle.summary(), [one.getMessage() for one in caplog.records if one.levelno == logging.INFO]))
        caplog.clear()
    assert found[0] == found[1]
    assert len(found[0][1]) == 1 and "sparse by packed" in found[0][1][0]
