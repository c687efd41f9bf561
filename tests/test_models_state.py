"""What belongs to a forward stays with it: in threads, in recomputations, and whatever held when VMoBA was applied."""

# pyright: reportPrivateImportUsage=false
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("diffusers")

import diffusers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from tests.video_models import (
    BLOCKS,
    FAMILIES,
    GRID,
    OTHER_GRID,
    SPARSE,
    TURNED_GRID,
    Family,
    assert_close,
    assert_gradients_close,
    compile_blocks,
    dense_output,
    each_family,
    gradients,
    run,
    sparse_output,
)
from vmoba_flex import Threshold, TopK
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba

WAN = FAMILIES["wan2.1"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["wan2.1", "hunyuan", "cogvideox"])
def test_threads_do_not_see_each_other(name: str, compiled: bool):
    """Grids of as many tokens, and steps of which one is dense: a mix-up would raise no error."""
    family = FAMILIES[name]
    model = family.build()
    handle = apply_vmoba(model, dataclasses.replace(SPARSE, dense_steps=1))
    if compiled:
        torch.compiler.reset()
        compile_blocks(model, family)
    cases = [(GRID, 1), (TURNED_GRID, 1), (TURNED_GRID, 0)]
    inputs = [family.inputs(grid, seed=i) for i, (grid, _) in enumerate(cases)]
    expected = [
        sparse_output(family, one, grid) if step else dense_output(family, one)
        for one, (grid, step) in zip(inputs, cases, strict=True)
    ]
    found: list[list[Tensor]] = [[] for _ in cases]

    @torch.no_grad()
    def serve(i: int) -> None:
        handle.set_step(cases[i][1], 2)
        for _ in range(10):
            found[i].append(run(model, inputs[i]))

    if compiled:  # Dynamo itself compiles one thread at a time
        for i in range(len(cases)):
            serve(i)
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, wanted in zip(found, expected, strict=True):
        assert len(outputs) == (20 if compiled else 10)
        for output in outputs:
            assert_close(output, wanted)


class Elsewhere:
    """Defaults and modes that may hold where VMoBA is applied, and must change nothing."""

    @staticmethod
    def default_dtype(apply: Callable[[], Any]) -> Any:
        torch.set_default_dtype(torch.bfloat16)
        try:
            return apply()
        finally:
            torch.set_default_dtype(torch.float32)

    @staticmethod
    def inference_mode(apply: Callable[[], Any]) -> Any:
        with torch.inference_mode():
            return apply()

    @staticmethod
    def meta_device(apply: Callable[[], Any]) -> Any:
        with torch.device("meta"):
            return apply()


@pytest.mark.parametrize("where", ["default_dtype", "inference_mode", "meta_device"])
@pytest.mark.parametrize("rule", [TopK(2), Threshold(0.3, max_density=0.6)])
def test_what_holds_when_it_is_applied_changes_nothing(where: str, rule: Any):
    config, inputs = VMoBAConfig(*BLOCKS, rule), WAN.inputs()
    plain, model = WAN.build(), WAN.build()
    apply_vmoba(plain, config)

    def apply() -> Any:
        handle = apply_vmoba(model, config)
        if isinstance(rule, Threshold):
            handle.set_warmup(1.0)
        return handle

    handle = getattr(Elsewhere, where)(apply)
    for each in (plain, model):
        with torch.no_grad():
            run(each, inputs)
    output, expected = run(model, inputs), run(plain, inputs)
    assert_close(output, expected)
    assert_gradients_close(gradients(output, model), gradients(expected, plain))
    for processor in handle.states()["model"].processors:
        for x in (processor.density, processor.last.handle):
            assert (x.device.type, x.is_inference()) == ("cpu", False)
        assert processor.density.dtype == torch.float32


def save_matmuls(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, save_matmuls)
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "not reentrant": checkpoint_wrapper,
    "reentrant": functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
    "selective": functools.partial(checkpoint_wrapper, context_fn=selective),
}
TWO = [(GRID, 0), (TURNED_GRID, 1)]


def two_forwards(model: nn.Module, family: Family) -> Tensor:
    """Of grids of as many tokens, so that a wrong one would raise no error."""
    return torch.stack([run(model, family.inputs(grid, seed=seed)).flatten() for grid, seed in TWO])


def backward_gradients(output: Tensor, model: nn.Module) -> list[Tensor]:
    """``gradients`` by ``backward``, which reentrant checkpoints need."""
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in model.parameters()]
    model.zero_grad()
    return found


def plain_gradients(family: Family) -> list[Tensor]:
    model = family.build()
    apply_vmoba(model, SPARSE)
    return gradients(two_forwards(model, family), model)


@pytest.mark.parametrize("wrapped", ["blocks", "attentions"])
@pytest.mark.parametrize("form", WRAPPERS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["wan2.1", "hunyuan"])
def test_torchs_checkpoints_recompute_in_their_own_forward(name: str, order: str, form: str, wrapped: str):
    family = FAMILIES[name]
    model = family.build()
    modules = set(family.layers(model) if wrapped == "blocks" else family.attentions(model))

    def wrap() -> None:
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=WRAPPERS[form], check_fn=lambda module: module in modules
        )

    if order == "before":
        wrap()
    handle = apply_vmoba(model, SPARSE)
    if order == "after":
        wrap()
    calls: list[int] = []
    for attention in family.attentions(model):
        attention.register_forward_pre_hook(lambda *_: calls.append(1))
    output = two_forwards(model, family)
    forwards = len(calls)
    assert_gradients_close(backward_gradients(output, model), plain_gradients(family))
    assert len(calls) == 2 * forwards or wrapped == "attentions"  # they were recomputed
    handle.remove()
    with torch.no_grad():
        assert torch.equal(run(model, family.inputs()), dense_output(family, family.inputs()))


@pytest.mark.parametrize("reentrant", [False, True])
class TestACheckpointOfOnesOwn:
    """Which recomputes layers where VMoBA cannot tell for which forward."""

    def build(self, reentrant: bool) -> nn.Module:
        model: Any = WAN.build()
        apply_vmoba(model, SPARSE)
        for block in model.blocks:
            inner = block.forward
            block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=reentrant)
        return model

    def test_runs_while_forwards_agree(self, reentrant: bool):
        model, plain = self.build(reentrant), WAN.build()
        apply_vmoba(plain, SPARSE)
        for grid in (GRID, OTHER_GRID):  # one after another
            inputs = WAN.inputs(grid)
            expected = gradients(run(plain, inputs), plain)
            assert_gradients_close(backward_gradients(run(model, inputs), model), expected)

    def test_is_refused_where_they_do_not(self, reentrant: bool):
        model = self.build(reentrant)
        output = two_forwards(model, WAN)
        with pytest.raises(RuntimeError, match=r"wait for backward: checkpoint with model.enable_grad"):
            backward_gradients(output, model)

    def test_a_layer_by_itself_is_refused(self, reentrant: bool):
        model = self.build(reentrant)
        with pytest.raises(RuntimeError, match="must run inside a forward of its model"), torch.no_grad():
            WAN.attentions(model)[0](torch.zeros(1, 72, 32), None, None, (torch.zeros(1, 72, 1, 16),) * 2)


@each_family
@torch.no_grad()
@pytest.mark.parametrize("dispatch", ["packed", "tiles", "dense"])
def test_a_layer_whose_scores_are_skipped_returns_its_value(family: Family, dispatch: str):
    """Perturbed-attention guidance. diffusers finds attention of its own classes only, and knows few processors."""
    model, inputs = family.build(), family.inputs()
    apply_vmoba(model, dataclasses.replace(SPARSE, dispatch=dispatch))
    config = diffusers.LayerSkipConfig(
        [1], fqn=family.blocks[0], skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    try:
        diffusers.hooks.apply_layer_skip(model, config)
    except AttributeError:  # Mochi's attention has no is_cross_attention
        pytest.skip("diffusers cannot skip layers of this family")
    expected = copy.deepcopy(model)
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(family.attentions(expected)[1]).remove_hook(
        "layer_skip_hook"
    )
    processor = family.attentions(expected)[1].processor
    processor.attend = lambda query, key, value, **_: value.transpose(1, 2).flatten(2)
    assert_close(run(model, inputs), run(expected, inputs))
    assert not torch.allclose(run(model, inputs), sparse_output(family, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_that_would_freeze_the_step_is_refused(strict: bool):
    model, inputs = WAN.build(), WAN.inputs()
    handle = apply_vmoba(model, dataclasses.replace(SPARSE, dense_steps=1))
    handle.set_step(1, 2)
    with pytest.raises(Exception, match=r"would freeze the grid and the denoising step"), torch.no_grad():
        torch.export.export(model, (), inputs, strict=strict)


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
@each_family
def test_a_model_compiled_whole_makes_no_graph_anew_from_step_to_step(family: Family, in_place: bool):
    if family.class_name in ("HunyuanVideo15Transformer3DModel", "MochiTransformer3DModel"):
        pytest.skip("the stock model has branches on data, and does not compile as a whole")
    torch.compiler.reset()
    model, inputs = family.build(), family.inputs()
    handle = apply_vmoba(model, VMoBAConfig(*BLOCKS, TopK(2), dense_steps=0.5))
    compiled: Any = model
    if in_place:
        model.compile(fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    dense, sparse = dense_output(family, inputs), sparse_output(family, inputs)
    for step in range(8):
        handle.set_step(step, 8)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            assert_close(run(compiled, inputs), dense if step < 4 else sparse)
