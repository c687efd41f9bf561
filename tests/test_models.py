"""Applied to the stock models of diffusers: what comes out, what the handle does, and what is refused."""

# pyright: reportPrivateImportUsage=false
import copy
import dataclasses
import pickle
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from tests.video_models import (
    BLOCKS,
    FAMILIES,
    GRID,
    KINDS,
    OTHER_GRID,
    SPARSE,
    TURNED_GRID,
    VARIANTS,
    Family,
    assert_close,
    assert_gradients_close,
    dense_output,
    each_family,
    gradients,
    layers_of,
    reference,
    run,
    sparse_output,
)
from vmoba_flex import BlockPartition, Tail, Threshold, TopK
from vmoba_flex.approx_blocks import ApproxBlocks
from vmoba_flex.call import Dispatch
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import VMoBAHandle, adapters, apply_vmoba, register_adapter
from vmoba_flex.rules import Rule

Snapshot = list[tuple[Any, ...]]

DENSE_RULES = {
    "dense": (TopK(2), "dense"),
    "all blocks, tiles": (TopK(density=1.0), "tiles"),
    "all blocks, packed": (TopK(density=1.0), "packed"),
    "the whole sum, tiles": (Threshold(1.0), "tiles"),
    "the whole sum, packed": (Threshold(1.0), "packed"),
}
SPARSE_RULES: dict[str, Rule | dict[str, Rule]] = {
    "top-k": TopK(2),
    "threshold": Threshold(0.3, max_density=0.6),
    "one per kind": {
        "temporal": TopK(1),
        "spatial": Threshold(0.4, pool="query"),
        "spatiotemporal": TopK(density=0.3, pool="head"),
    },
}


def snapshot(model: nn.Module) -> Snapshot:
    """Hooks, and processors and functions in the attributes, of all modules."""
    return [
        (
            module,
            *module._forward_pre_hooks.values(),
            *module._forward_hooks.values(),
            *module._backward_hooks.values(),
            *(value for value in vars(module).values() if callable(value)),
        )
        for module in model.modules()
    ]


def in_float32(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def assert_errs_no_more(output: Tensor, low: Tensor, exact: Tensor) -> None:
    """Holds an output's mean error to one and a half times that of another in the same dtype."""
    assert output.dtype == low.dtype != exact.dtype
    assert (output - exact).abs().mean() <= 1.5 * (low - exact).abs().mean()


class TestDense:
    """Rules that leave nothing out."""

    @each_family
    @torch.no_grad()
    @pytest.mark.parametrize("case", DENSE_RULES)
    def test_equals_the_stock_model_at_two_resolutions(self, family: Family, case: str):
        rule, dispatch = DENSE_RULES[case]
        model = family.build()
        cases = [family.inputs(GRID), family.inputs(OTHER_GRID), family.inputs(GRID, batch=1, seed=1)]
        expected = [run(model, inputs) for inputs in cases]
        apply_vmoba(model, VMoBAConfig(*BLOCKS, rule, dispatch=dispatch))
        for inputs, output in zip(cases, expected, strict=True):
            assert_close(run(model, inputs), output)

    @each_family
    @torch.no_grad()
    @pytest.mark.parametrize("case", ["dense", "all blocks, tiles", "all blocks, packed"])
    def test_errs_in_16_bit_no_more_than_the_stock_model(self, family: Family, case: str):
        rule, dispatch = DENSE_RULES[case]
        model, inputs = family.build(dtype=torch.bfloat16), family.inputs(dtype=torch.bfloat16)
        exact = run(family.build(dtype=torch.bfloat16).float(), in_float32(inputs))
        stock = run(model, inputs)
        apply_vmoba(model, VMoBAConfig(*BLOCKS, rule, dispatch=dispatch))
        assert_errs_no_more(run(model, inputs), stock, exact)

    @each_family
    @torch.no_grad()
    @pytest.mark.parametrize("dispatch", ["packed", "shared"])
    def test_cells_of_one_token_equal_the_stock_model(self, family: Family, dispatch: Dispatch):
        """Skipped blocks then take part token by token: grid, text and padding lie where they should."""
        model, inputs = family.build(), family.inputs()
        expected = run(model, inputs)
        apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(1), dispatch=dispatch, tail=Tail((1, 1, 1))))
        assert_close(run(model, inputs), expected)

    @each_family
    def test_gradients_equal_the_stock_models(self, family: Family):
        stock, model, inputs = family.build(), family.build(), family.inputs()
        apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(2), dispatch="dense"))
        assert_gradients_close(gradients(run(model, inputs), model), gradients(run(stock, inputs), stock))


class TestSparse:
    """Rules that leave something out: dense attention under the reference's masks."""

    @each_family
    @pytest.mark.parametrize("case", SPARSE_RULES)
    def test_equals_dense_attention_with_the_references_masks(self, family: Family, case: str):
        rule = SPARSE_RULES[case]
        stock, models = family.build(), {"tiles": family.build(), "packed": family.build()}
        for dispatch, model in models.items():
            apply_vmoba(model, VMoBAConfig(*BLOCKS, rule, dispatch=dispatch))
        for grid in (GRID, OTHER_GRID):
            inputs = family.inputs(grid)
            with reference(stock, family, layers_of(grid, rule)):
                expected = run(stock, inputs)
            expected_gradients = gradients(expected, stock)
            for model in models.values():
                output = run(model, inputs)
                assert_close(output, expected)
                assert_gradients_close(gradients(output, model), expected_gradients)

    @each_family
    @torch.no_grad()
    @pytest.mark.parametrize("dispatch", ["tiles", "packed"])
    def test_errs_in_16_bit_no_more_than_the_reference(self, family: Family, dispatch: str):
        """In one layer: after it the inputs have rounded, and choices differ."""
        model, inputs = family.build(num_layers=1, dtype=torch.bfloat16), family.inputs(dtype=torch.bfloat16)
        exact_model = family.build(num_layers=1, dtype=torch.bfloat16).float()
        with reference(exact_model, family, layers_of(GRID, TopK(2))):
            exact = run(exact_model, in_float32(inputs))
        with reference(model, family, layers_of(GRID, TopK(2))):
            low = run(model, inputs)
        apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(2), dispatch=dispatch))
        assert_errs_no_more(run(model, inputs), low, exact)

    @torch.no_grad()
    @pytest.mark.parametrize("name", VARIANTS)
    def test_equals_the_reference_in_other_modes_of_a_family(self, name: str):
        family = VARIANTS[name]
        model, inputs = family.build(), family.inputs()
        with apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(density=1.0))):
            assert_close(run(model, inputs), dense_output(family, inputs))
        for grid in (GRID, OTHER_GRID):
            inputs = family.inputs(grid)
            with apply_vmoba(model, SPARSE):
                assert_close(run(model, inputs), sparse_output(family, inputs, grid))

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["wan2.1", "hunyuan"])
    def test_cycle_and_dense_layers_hold(self, name: str):
        family = FAMILIES[name]
        model, inputs = family.build(num_layers=6), family.inputs()
        kinds = ("spatial", "temporal")
        partitions = {"temporal": BlockPartition.temporal(GRID, 1), "spatial": BlockPartition.spatial(GRID, (2, 3))}
        with reference(model, family, lambda i: (partitions[kinds[i % 2]], TopK(2)) if i >= 3 else None):
            expected = run(model, inputs)
        apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(2), cycle=kinds, dense_layers=3))
        assert_close(run(model, inputs), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "mochi"])
    def test_approx_blocks_are_resolved_on_the_grid_that_arrives(self, name: str):
        family = FAMILIES[name]
        stock, model = family.build(), family.build()
        config = VMoBAConfig(ApproxBlocks(3), ApproxBlocks(4), ApproxBlocks(8), TopK(2))
        apply_vmoba(model, config)
        for grid in (GRID, OTHER_GRID):
            partitions = [config.partition(kind, grid) for kind in KINDS]
            with reference(stock, family, lambda i, partitions=partitions: (partitions[i % 3], TopK(2))):
                expected = run(stock, family.inputs(grid))
            assert_close(run(model, family.inputs(grid)), expected)

    @each_family
    @torch.no_grad()
    def test_grids_of_as_many_tokens_are_told_apart(self, family: Family):
        model = family.build()
        apply_vmoba(model, SPARSE)
        for grid in (GRID, TURNED_GRID, GRID):
            inputs = family.inputs(grid)
            assert_close(run(model, inputs), sparse_output(family, inputs, grid=grid))

    @torch.no_grad()
    def test_arguments_may_be_positional(self):
        family = FAMILIES["wan2.1"]
        model, inputs = family.build(), family.inputs()
        apply_vmoba(model, SPARSE)
        output = model(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"], return_dict=False)
        assert_close(output[0], sparse_output(family, inputs))


class TestHandle:
    """What ``apply_vmoba`` returns."""

    @each_family
    @torch.no_grad()
    def test_remove_restores_the_stock_model_bit_for_bit(self, family: Family):
        model, inputs = family.build(), family.inputs()
        before, expected = snapshot(model), run(model, inputs)
        handle = apply_vmoba(model, SPARSE)
        assert not torch.equal(run(model, inputs), expected)
        handle.remove()
        assert snapshot(model) == before
        assert torch.equal(run(model, inputs), expected)
        apply_vmoba(model, SPARSE)
        assert_close(run(model, inputs), sparse_output(family, inputs))

    @torch.no_grad()
    def test_disabled_asks_nothing_of_the_config(self):
        family = FAMILIES["wan2.1"]
        model, inputs = family.build(), family.inputs()
        handle = apply_vmoba(model, VMoBAConfig(100, (100, 100), (100, 100, 100), TopK(1), dense_steps=1))
        handle.set_enabled(False)
        assert torch.equal(run(model, inputs), dense_output(family, inputs))

    @torch.no_grad()
    def test_of_a_copy_is_its_own(self):
        family = FAMILIES["wan2.1"]
        model, inputs = family.build(), family.inputs()
        with pytest.raises(ValueError, match="model must have VMoBA applied, got none"):
            VMoBAHandle.of(model)
        handle = apply_vmoba(model, SPARSE)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            VMoBAHandle.of(other).remove()
            assert_close(run(other, inputs), dense_output(family, inputs))
        assert_close(run(model, inputs), sparse_output(family, inputs))
        assert VMoBAHandle.of(model).summary() == handle.summary()

    @torch.no_grad()
    def test_is_a_context_manager(self):
        family = FAMILIES["wan2.1"]
        model, inputs = family.build(), family.inputs()
        before = snapshot(model)
        with apply_vmoba(model, SPARSE):
            assert_close(run(model, inputs), sparse_output(family, inputs))
        assert snapshot(model) == before
        with pytest.raises(KeyError), apply_vmoba(model, SPARSE):
            raise KeyError
        assert snapshot(model) == before

    @each_family
    @torch.no_grad()
    def test_set_enabled_switches_to_dense_and_back(self, family: Family):
        model, inputs = family.build(), family.inputs()
        handle = apply_vmoba(model, SPARSE)
        handle.set_enabled(False)
        assert_close(run(model, inputs), dense_output(family, inputs))
        handle.set_enabled(True)
        assert_close(run(model, inputs), sparse_output(family, inputs))

    @each_family
    @torch.no_grad()
    def test_set_step_decides_on_dense_steps(self, family: Family):
        model, inputs = family.build(), family.inputs()
        dense, sparse = dense_output(family, inputs), sparse_output(family, inputs)
        for dense_steps, steps in ((2, {0, 1}), (0.25, {0}), (0.3, {0, 1})):
            handle = apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(2), dense_steps=dense_steps))
            for step in (0, 1, 2, 3, 0):
                handle.set_step(step, 4)
                assert_close(run(model, inputs), dense if step in steps else sparse)
            handle.remove()

    @each_family
    @torch.no_grad()
    def test_summary_has_a_row_for_each_layer(self, family: Family):
        rules = SPARSE_RULES["one per kind"]
        assert isinstance(rules, dict)
        stock, model, inputs = family.build(num_layers=4), family.build(num_layers=4), family.inputs()
        with reference(stock, family, layers_of(GRID, rules, dense_layers=1)) as densities:
            run(stock, inputs)
        handle = apply_vmoba(model, VMoBAConfig(*BLOCKS, rules, dense_layers=1))
        before = _rows(handle.summary())
        run(model, inputs)
        rows = _rows(handle.summary())
        assert len(before) == len(rows) == 4
        for i, row in enumerate(rows):
            assert KINDS[i % 3] in row and ("dense" in row) == (i < 1) and ("sparse" in row) == (i >= 1)
            assert repr(rules[KINDS[i % 3]]) in row
            assert "x".join(map(str, layers_of(GRID, rules)(i)[0].block)) in row  # pyright: ignore
            density = float(re.findall(r"\d\.\d+", row)[-1])
            expected = 1.0 if i < 1 else sum(densities[i]) / len(densities[i])
            assert density == pytest.approx(expected, abs=5e-3)
        handle.set_enabled(False)
        run(model, inputs)
        assert all("dense" in row and "sparse" not in row for row in _rows(handle.summary()))


def _rows(summary: str) -> list[str]:
    """The rows of the layers, which begin with a layer's name."""
    return [line for line in summary.splitlines() if re.match(r"\w+\.\d+\.", line)]


class TestAdapters:
    """Models of one's own."""

    @torch.no_grad()
    def test_a_class_derived_from_a_supported_one(self):
        family = FAMILIES["wan2.1"]
        model, inputs = family.build(), family.inputs()
        model.__class__ = type("OwnVideoModel", (type(model),), {})
        apply_vmoba(model, SPARSE)
        assert_close(run(model, inputs), sparse_output(family, inputs))

    def test_a_registered_one_comes_first(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))
        model = FAMILIES["wan2.1"].build()
        stock = adapters.find_adapter(model)
        model.__class__ = type("OwnVideoModel", (type(model),), {})
        register_adapter("OwnVideoModel", dataclasses.replace(stock, refuse=lambda model: "not this one"))
        with pytest.raises(ValueError, match="not this one"):
            apply_vmoba(model, SPARSE)
        with pytest.raises(TypeError, match=r"OwnVideoModel.*got Linear"):
            apply_vmoba(nn.Linear(2, 2), SPARSE)

    def test_bad_adapters(self):
        with pytest.raises(ValueError, match="class_name must have no adapter yet, got 'WanTransformer3DModel'"):
            register_adapter("WanTransformer3DModel", adapters._ADAPTERS["WanTransformer3DModel"])
        with pytest.raises(TypeError, match="adapter must be an Adapter, got int"):
            register_adapter("OwnVideoModel", 3)
        with pytest.raises(TypeError, match=r"layers must be a tuple of paths such as .blocks.\*.attn1., got 'blocks'"):
            adapters.Adapter("blocks", lambda model, arguments: (1, 1, 1))  # pyright: ignore
        with pytest.raises(TypeError, match="class_name must be a str"):
            register_adapter(nn.Linear, adapters._ADAPTERS["WanTransformer3DModel"])


def peft(model: nn.Module) -> nn.Module:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_v"]))  # pyright: ignore[reportArgumentType]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # pyright: ignore
    "PEFT": peft,
    "DataParallel": nn.DataParallel,
    "a module of one's own": lambda model: Trainer(model),
}


class Trainer(nn.Module):
    """Keeps the model as ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Pipeline:
    """Has a transformer."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


@torch.no_grad()
@pytest.mark.parametrize("form", WRAPPERS)
def test_a_model_inside_a_wrapper(form: str):
    family = FAMILIES["wan2.1"]
    model, inputs = family.build(), family.inputs()
    wrapped = WRAPPERS[form](model)
    for target in (wrapped, Pipeline(wrapped)):
        handle = apply_vmoba(target, SPARSE)
        assert_close(run(wrapped, inputs), sparse_output(family, inputs))
        with pytest.raises(ValueError, match="must not have VMoBA applied yet"):
            apply_vmoba(model, SPARSE)
        assert VMoBAHandle.of(wrapped).states()["model"] is next(iter(handle.states().values()))
        VMoBAHandle.of(target).remove()
        assert_close(run(wrapped, inputs), dense_output(family, inputs))
    # Wrapped after applying.
    apply_vmoba(model, SPARSE)
    again = wrapped if form == "PEFT" else WRAPPERS[form](model)
    assert_close(run(again, inputs), sparse_output(family, inputs))
    VMoBAHandle.of(again).remove()


class Foreign:
    """A processor that is not the model's stock one."""


@pytest.fixture
def untouched() -> Iterator[nn.Module]:
    """A model that the test must leave as it was."""
    family = FAMILIES["hunyuan"]
    model = family.build()
    inputs = family.inputs()
    with torch.no_grad():
        expected = run(model, inputs)
    before = snapshot(model)
    yield model
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(run(model, inputs), expected)


class TestBadInput:
    """Each a clear error that leaves the model as it was."""

    @each_family
    def test_applying_twice(self, family: Family):
        model = family.build()
        handle = apply_vmoba(model, SPARSE)
        before = snapshot(model)
        for target in (model, types.SimpleNamespace(transformer=model)):
            with pytest.raises(ValueError, match="must not have VMoBA applied yet"):
                apply_vmoba(target, SPARSE)
        assert snapshot(model) == before
        with torch.no_grad():
            assert_close(run(model, family.inputs()), sparse_output(family, family.inputs()))
        handle.remove()

    def test_an_unknown_model(self):
        names = sorted({family.class_name for family in FAMILIES.values()})
        for target in (nn.Linear(2, 2), types.SimpleNamespace(transformer=nn.Linear(2, 2))):
            with pytest.raises(TypeError, match="got Linear") as error:
                apply_vmoba(target, SPARSE)
            assert all(name in str(error.value) for name in names) and "register_adapter" in str(error.value)
        with pytest.raises(TypeError, match="got int"):
            apply_vmoba(3, SPARSE)

    def test_a_second_expert_that_cannot_be_applied_leaves_the_first_as_it_was(self, untouched: nn.Module):
        pipe = types.SimpleNamespace(transformer=untouched, transformer_2=nn.Linear(2, 2))
        with pytest.raises(TypeError, match="got Linear"):
            apply_vmoba(pipe, SPARSE)

    def test_a_config_of_another_type(self, untouched: nn.Module):
        with pytest.raises(TypeError, match="config must be a VMoBAConfig, got TopK"):
            apply_vmoba(untouched, TopK(2))

    def test_more_dense_layers_than_layers(self, untouched: nn.Module):
        with pytest.raises(ValueError, match="dense_layers must be at most num_layers = 3, got 4"):
            apply_vmoba(untouched, VMoBAConfig(*BLOCKS, TopK(2), dense_layers=4))

    @each_family
    def test_a_foreign_processor_in_one_layer(self, family: Family):
        model = family.build()
        family.attentions(model)[1].processor = Foreign()
        before = snapshot(model)
        with pytest.raises(ValueError, match="Foreign"):
            apply_vmoba(model, SPARSE)
        assert snapshot(model) == before

    @each_family
    def test_blocks_larger_than_the_grid_that_arrives(self, family: Family):
        model = family.build()
        apply_vmoba(model, VMoBAConfig(4, (4, 4), (2, 2, 3), TopK(1)))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"temporal block must not be larger than grid \(3, 4, 6\)"):
            run(model, family.inputs(GRID))
        assert snapshot(model) == before
        with torch.no_grad():
            run(model, family.inputs(OTHER_GRID))

    @each_family
    def test_k_above_the_blocks_of_the_grid_that_arrives(self, family: Family):
        model = family.build()
        apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(4)))
        with pytest.raises(ValueError, match=r"k must lie in 1..num_blocks = 1..3, got 4"):
            run(model, family.inputs(GRID))

    @each_family
    def test_dense_steps_without_a_step(self, family: Family):
        model, inputs = family.build(), family.inputs()
        handle = apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(2), dense_steps=1))
        with pytest.raises(ValueError, match=r"step.*set_step"):
            run(model, inputs)
        handle.set_step(1, 2)
        with torch.no_grad():
            assert_close(run(model, inputs), sparse_output(family, inputs))

    def test_steps_out_of_range(self):
        handle = apply_vmoba(FAMILIES["wan2.1"].build(), VMoBAConfig(*BLOCKS, TopK(2), dense_steps=1))
        with pytest.raises(ValueError, match=r"step must lie in 0..num_steps - 1 = .*3, got 4"):
            handle.set_step(4, 4)
        with pytest.raises(TypeError, match="enabled must be a bool, got 1"):
            handle.set_enabled(1)

    @each_family
    def test_a_processor_put_back_by_another_hand(self, family: Family):
        """A half-applied model would be sparse in some layers and silently dense in others."""
        model, inputs = family.build(), family.inputs()
        with torch.no_grad():
            expected = run(model, inputs)
        stock = family.attentions(model)[1].processor
        handle = apply_vmoba(model, SPARSE)
        family.attentions(model)[1].processor = stock
        with pytest.raises(ValueError, match=r"\.1\."):
            run(model, inputs)
        handle.remove()
        with torch.no_grad():
            assert torch.equal(run(model, inputs), expected)

    @pytest.mark.parametrize("missing", ["num_frames", "all"])
    def test_ltx_without_its_grid(self, missing: str):
        """Some of diffusers' LTX pipelines give coordinates instead."""
        family = FAMILIES["ltx"]
        model, inputs = family.build(), family.inputs()
        apply_vmoba(model, SPARSE)
        for name in ("num_frames", "height", "width") if missing == "all" else (missing,):
            inputs.pop(name)
        inputs["video_coords"] = torch.zeros(2, 3, 72)
        with pytest.raises(ValueError, match="num_frames"):
            run(model, inputs)

    def test_a_grid_that_does_not_match_the_tokens(self):
        family = FAMILIES["ltx"]
        model, inputs = family.build(), family.inputs()
        apply_vmoba(model, SPARSE)
        inputs |= {"num_frames": 4, "video_coords": torch.zeros(2, 3, 72)}
        with pytest.raises(ValueError, match="72"):
            run(model, inputs)

    @pytest.mark.parametrize("name", ["LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"])
    def test_an_ltx_pipeline_without_a_grid(self, name: str):
        import diffusers

        model = FAMILIES["ltx"].build()
        before = snapshot(model)
        parts = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = getattr(diffusers, name)(**parts, scheduler=scheduler, transformer=model)
        with pytest.raises(ValueError, match=rf"must not be a {name}.*LTXPipeline.from_pipe\(pipe\)"):
            apply_vmoba(pipe, SPARSE)
        assert snapshot(model) == before
        handle = apply_vmoba(diffusers.LTXPipeline.from_pipe(pipe), SPARSE)
        assert repr(handle) == "VMoBAHandle(transformer: 3 layers)"
        handle.remove()
        assert repr(handle) == "VMoBAHandle(removed)"

    def test_a_block_causal_skyreels(self):
        family = FAMILIES["skyreels"]
        model = family.build()
        model._set_ar_attention(3)  # pyright: ignore
        before = snapshot(model)
        with pytest.raises(ValueError, match="num_frame_per_block"):
            apply_vmoba(model, SPARSE)
        assert snapshot(model) == before
        model._set_ar_attention(1)  # pyright: ignore
        apply_vmoba(model, SPARSE)
        model._set_ar_attention(3)  # pyright: ignore
        with pytest.raises(ValueError, match="num_frame_per_block"), torch.no_grad():
            run(model, family.inputs())
