"""Choices that dense steps make and sparse steps attend: each pass its own, until the run ends."""

# pyright: reportPrivateImportUsage=false
import contextlib
import copy
import dataclasses
import functools
import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from tests.video_models import (
    BLOCKS,
    FAMILIES,
    GRID,
    SPARSE,
    TURNED_GRID,
    Family,
    assert_close,
    compile_blocks,
    run,
)
from vmoba_flex import BySteps, Remember, Tail, Threshold, TopK, vmoba_attention, vmoba_selection
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba
from vmoba_flex.selection.exact_gate import exact_gate

WAN = FAMILIES["wan2.1"]
KEPT = dataclasses.replace(SPARSE, dense_steps=1, remember=Remember())
FALLING = VMoBAConfig(
    *BLOCKS,
    BySteps({0: TopK(2), 0.5: Threshold(0.3, max_density=0.5), 5: TopK(1)}),
    dense_steps=2,
    tail=BySteps({0: None, 4: Tail(4)}),
    remember=Remember(),
)


class Spelled:
    """A model whose layers do by public calls what ``Remember`` says."""

    def __init__(self, family: Family, config: VMoBAConfig) -> None:
        self.model, self.config, self.kept = family.build(), config, {}
        self.step, self.num_steps, self.name = 0, 1, ""
        apply_vmoba(self.model, SPARSE)  # its projections
        for i, attention in enumerate(family.attentions(self.model)):
            attention.processor.attend = functools.partial(self.attend, i)

    def attend(
        self, i: int, query: Tensor, key: Tensor, value: Tensor, *, text_lengths: Tensor | None = None, **text: int
    ) -> Tensor:
        layer = self.config.layer(i, 3, self.step, self.num_steps)
        partition = self.config.partition(layer.kind, GRID, **text)
        shared = self.config.dispatch == "shared"
        for rule in layer.records:
            exact = dataclasses.replace(rule, gate="exact")
            self.kept[i, self.name, rule] = vmoba_selection(
                query, key, partition, exact, choice="tile" if shared else "token", as_bits=True
            )
        options: dict[str, Any] = {"dispatch": "dense"}
        rule = layer.rule
        if not layer.dense:
            rule, options["dispatch"], options["tail"] = None, self.config.dispatch, layer.tail
            options["selection"] = self.kept[i, self.name, layer.rule]
        output = vmoba_attention(query, key, value, partition, rule, text_lengths=text_lengths, **options)
        return output.transpose(1, 2).flatten(2)


def at(step: int, seed: int = 0, grid: Any = GRID, batch: int = 2, family: Family = WAN) -> dict[str, Any]:
    return family.inputs(grid, batch=batch, seed=10 * step + seed)


def steps_of(handle: Any, model: Any, steps: Any = range(4), num_steps: int = 4, seed: int = 0) -> list[Tensor]:
    outputs = []
    for step in steps:
        handle.set_step(step, num_steps)
        outputs.append(run(model, at(step, seed)))
    return outputs


def told_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("vmoba_flex")]


def bytes_kept(handle: Any) -> int:
    memory = handle.states()["model"].now.memory
    return 0 if memory is None else memory.nbytes()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "compiled", "changes"),
    [
        ("wan2.1", False, {}),
        ("wan2.1", True, {}),
        ("hunyuan", True, {"dispatch": "shared", "remember": Remember(on="cpu")}),
        ("hunyuan", False, {"dense_steps": 1, "remember": Remember(refresh=2)}),
        ("cogvideox", False, {"dense_steps": 0, "remember": Remember(refresh=3), "dispatch": "tiles"}),
    ],
)
def test_sparse_steps_attend_what_was_chosen(name: str, compiled: bool, changes: dict[str, Any]):
    family, config = FAMILIES[name], dataclasses.replace(FALLING, **changes)
    spelled, model = Spelled(family, config), family.build()
    handle = apply_vmoba(model, config)
    if compiled:
        torch.compiler.reset()
        compile_blocks(model, family)
    for step in range(6):
        handle.set_step(step, 6)
        spelled.step, spelled.num_steps = step, 6
        # Two passes by name, in turns, and two by their order.
        for i, which in enumerate(("uncond", "cond", None, None) if step == 3 else ("cond", "uncond", None, None)):
            spelled.name = which or str(i)
            inputs = at(step, seed=len(spelled.name) + i * (which is None), family=family)
            context = contextlib.nullcontext() if which is None else model.cache_context(which)
            with context, torch.compiler.set_stance("fail_on_recompile" if compiled and step + i else "default"):
                output = run(model, inputs)
            assert_close(output, run(spelled.model, inputs))
        assert (handle.summary().count("  remembered  ") == 3) == (not config.layer(0, 3, step, 6).dense)
    assert bytes_kept(handle) == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "recording"),
    [
        (FALLING, [1]),  # for three rules that follow
        (dataclasses.replace(FALLING, dispatch="shared"), [1]),
        (dataclasses.replace(KEPT, remember=Remember(refresh=3, max_bytes=1)), [0, 4]),  # nothing fits
    ],
)
def test_masses_are_made_once_for_all_rules_of_a_layer(
    config: VMoBAConfig, recording: list[int], monkeypatch: pytest.MonkeyPatch
):
    steps = []

    def counted(*inputs: Any) -> Tensor:
        steps.append(step)
        return exact_gate(*inputs)

    monkeypatch.setattr("vmoba_flex.selection.scores.exact_gate", counted)
    model = WAN.build()
    handle = apply_vmoba(model, config)
    for step in range(6):
        steps_of(handle, model, [step], 8)
    assert steps == [step for step in recording for _ in range(3)]  # of three layers


@torch.no_grad()
def test_the_choice_matters_and_is_dropped_with_its_run():
    model, other = WAN.build(), WAN.build()
    handle, gate = apply_vmoba(model, KEPT), apply_vmoba(other, dataclasses.replace(KEPT, remember=None))
    outputs, of_gate = steps_of(handle, model, range(3)), steps_of(gate, other, range(3))
    assert_close(outputs[0], of_gate[0])
    assert not torch.allclose(outputs[2], of_gate[2], rtol=1e-3, atol=1e-3)
    assert handle.summary().splitlines()[0].endswith(f"; remembered: {bytes_kept(handle):,} bytes on the device, "
                                                     f"at most {bytes_kept(handle):,} in this run")  # fmt: skip
    assert bytes_kept(handle) > 0
    assert_close(steps_of(handle, model)[2], outputs[2])  # another run, with a choice of its own
    assert bytes_kept(handle) == 0
    steps_of(handle, model, range(3))
    handle.remove()
    assert handle.states() == {} and "cache_context" not in vars(model)


@torch.no_grad()
@pytest.mark.parametrize("case", ["begins sparse", "batch", "grid", "goes back", "too large", "copy", "disabled"])
def test_without_a_choice_layers_choose_by_their_gate_and_say_so_once(case: str, caplog: pytest.LogCaptureFixture):
    config = dataclasses.replace(KEPT, remember=Remember(max_bytes=1)) if case == "too large" else KEPT
    model, other = WAN.build(), WAN.build()
    handle = apply_vmoba(model, config)
    apply_vmoba(other, dataclasses.replace(KEPT, remember=None, dense_steps=0))
    inputs = at(2)
    if case == "disabled":
        handle.set_enabled(False)
    if case not in ("begins sparse", "goes back"):
        steps_of(handle, model, range(1))
    handle.set_enabled(True)
    if case == "goes back":
        steps_of(handle, model, range(4))
    if case == "copy":
        model = copy.deepcopy(model)
        handle = type(handle).of(model)
    if case == "batch":
        inputs = at(2, batch=1)
    if case == "grid":
        inputs = at(2, grid=TURNED_GRID)
    handle.set_step(2, 4)
    with caplog.at_level(logging.WARNING, "vmoba_flex"):
        for _ in range(2):
            assert_close(run(model, inputs), run(other, inputs))
    words = {"batch": "changed in mid-run", "grid": "changed in mid-run", "too large": "max_bytes=1"}
    told = told_of(caplog)
    if case != "too large":
        assert sum(words.get(case, "nothing is kept for step 2 of 4") in line for line in told) == 1
    assert len(told) == len(set(told)) <= 2
    assert "  remembered  " not in handle.summary()


@torch.no_grad()
def test_a_refresh_serves_a_run_that_begins_sparse():
    config = dataclasses.replace(KEPT, remember=Remember(refresh=3))
    model, spelled = WAN.build(), Spelled(WAN, dataclasses.replace(config, dense_steps=0))
    handle = apply_vmoba(model, config)
    spelled.num_steps = 7
    for step, as_step in ((2, 0), (3, 1)):  # nothing is kept for the first
        spelled.step = as_step
        handle.set_step(step, 7)
        assert_close(run(model, at(step)), run(spelled.model, at(step)))


def test_gradients_take_the_gate(caplog: pytest.LogCaptureFixture):
    model, other = WAN.build(), WAN.build()
    handle, gate = apply_vmoba(model, KEPT), apply_vmoba(other, dataclasses.replace(KEPT, remember=None))
    assert_close(torch.stack(steps_of(handle, model)), torch.stack(steps_of(gate, other)))
    (told,) = told_of(caplog)
    assert "no effect with gradients or a warm-up" in told


@torch.no_grad()
def test_threads_keep_their_own():
    model, alone = WAN.build(), WAN.build()
    expected = steps_of(apply_vmoba(alone, KEPT), alone)
    handle, others = apply_vmoba(model, KEPT), []
    handle.set_step(0, 4)
    first = [run(model, at(0))]

    def serve() -> None:
        with torch.no_grad():
            others.extend(steps_of(handle, model, seed=5))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert_close(torch.stack(first + steps_of(handle, model, range(1, 4))), torch.stack(expected))
    assert len(others) == 4


@torch.no_grad()
def test_pipelines_name_their_passes_and_end_their_runs():
    from tests.test_pipelines import SCHEDULERS, sample, wan_pipeline

    pipe = wan_pipeline(SCHEDULERS["Euler"](), experts=2)
    config = dataclasses.replace(KEPT, dense_steps=0.25, remember=Remember(refresh=4))
    handle = apply_vmoba(pipe, config)
    first = sample(pipe)
    for state in handle.states().values():
        assert state.told.reasons == set()
        assert state.now.memory is None or state.now.memory.nbytes() == 0
    memory = handle.states()["transformer_2"].now.memory
    assert memory is not None and memory.peak > 0
    assert {name for (name, _), _ in memory.layers} == {"cond", "uncond"}
    assert torch.equal(sample(pipe), first)
    handle.remove()
    with apply_vmoba(pipe, dataclasses.replace(config, remember=None)):
        assert not torch.allclose(sample(pipe), first)
