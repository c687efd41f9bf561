"""Applied to pipelines: both experts, and dense first steps by the scheduler's count or the callback's."""

# pyright: reportPrivateImportUsage=false
import copy
import gc
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

from tests.video_models import (
    BLOCKS,
    FAMILIES,
    GRID,
    TEXT_DIM,
    assert_close,
    layers_of,
    reference,
    run,
    sparse_output,
)
from vmoba_flex import TopK
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba

WAN, COGVIDEOX = FAMILIES["wan2.1"], FAMILIES["cogvideox"]
STEPS = 8
# A quarter, rounded to whole steps: 2.
QUARTER = VMoBAConfig(*BLOCKS, TopK(2), dense_steps=0.25)


def wan_pipeline(scheduler: Any, experts: int = 1) -> Any:
    """A whole WanPipeline, but for text encoder and VAE."""
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=WAN.build(0),
        transformer_2=WAN.build(1) if experts == 2 else None,
        boundary_ratio=0.6 if experts == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cogvideox_pipeline() -> Any:
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=COGVIDEOX.build(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, *, steps: int = STEPS, seed: int = 0, **options: Any) -> Tensor:
    """The latents after all steps, with guidance: two model calls a step, or one of twice the batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 5
    frames, height, width = GRID
    return pipe(
        prompt_embeds=torch.randn(1, tokens, TEXT_DIM, generator=generator),
        negative_prompt_embeds=torch.randn(1, tokens, TEXT_DIM, generator=generator),
        num_frames=4 * (frames - 1) + 1,
        height=16 * height,
        width=16 * width,
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
        generator=generator,
        return_dict=False,
        **options,
    )[0]


def expected_sample(pipe: Any, family: Any, dense_steps: int, *, steps: int = STEPS) -> Tensor:
    """A stock pipeline whose models attend by the reference after the dense steps."""
    done = 0

    def count(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal done
        done = step + 1
        return tensors

    sparse = layers_of(GRID, TopK(2))

    def choose(layer: int) -> Any:
        return sparse(layer) if done >= dense_steps else None

    models = [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]
    with reference(models[0], family, choose):
        if len(models) == 1:
            return sample(pipe, steps=steps, callback_on_step_end=count)
        with reference(models[1], family, choose):
            return sample(pipe, steps=steps, callback_on_step_end=count)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_first_quarter_of_the_steps_is_dense_in_every_run(scheduler: str, experts: int):
    make = SCHEDULERS[scheduler]
    expected = expected_sample(wan_pipeline(make(), experts), WAN, 2)
    assert (expected - sample(wan_pipeline(make(), experts))).abs().mean() > 1e-2
    pipe = wan_pipeline(make(), experts)
    handle = apply_vmoba(pipe, QUARTER)
    for _ in range(2):
        assert torch.allclose(sample(pipe), expected, rtol=1e-4, atol=1e-4)
    # Another number of steps has another quarter.
    expected = expected_sample(wan_pipeline(make(), experts), WAN, 1, steps=4)
    assert torch.allclose(sample(pipe, steps=4), expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(sample(pipe), sample(wan_pipeline(make(), experts)))


def test_a_scheduler_exchanged_after_applying_is_followed():
    """``pipe.scheduler = OtherScheduler.from_config(...)`` is how users choose one."""
    pipe = wan_pipeline(SCHEDULERS["Euler"]())
    first = pipe.scheduler
    apply_vmoba(pipe, QUARTER)
    pipe.scheduler = SCHEDULERS["UniPC"]()
    expected = expected_sample(wan_pipeline(SCHEDULERS["UniPC"]()), WAN, 2)
    assert torch.allclose(sample(pipe), expected, rtol=1e-4, atol=1e-4)
    assert first is not pipe.scheduler


def test_both_experts_are_applied_and_removed():
    pipe = wan_pipeline(SCHEDULERS["Euler"](), experts=2)
    handle = apply_vmoba(pipe, VMoBAConfig(*BLOCKS, TopK(2)))
    summary = handle.summary()
    assert summary.count("temporal") - summary.count("spatiotemporal") == 2
    expected = expected_sample(wan_pipeline(SCHEDULERS["Euler"](), experts=2), WAN, 0)
    assert torch.allclose(sample(pipe), expected, rtol=1e-4, atol=1e-4)
    handle.set_enabled(False)
    assert_close(sample(pipe), sample(wan_pipeline(SCHEDULERS["Euler"](), experts=2)))
    handle.remove()
    for model in (pipe.transformer, pipe.transformer_2):
        assert {type(a.processor).__name__ for a in WAN.attentions(model)} == {"WanAttnProcessor"}


def test_the_callback_counts_for_a_scheduler_that_does_not():
    assert not hasattr(diffusers.CogVideoXDDIMScheduler(), "step_index")
    expected = expected_sample(cogvideox_pipeline(), COGVIDEOX, 2)
    pipe = cogvideox_pipeline()
    handle = apply_vmoba(pipe, QUARTER)
    for _ in range(2):
        output = sample(pipe, callback_on_step_end=handle.on_step_end)
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="on_step_end"):  # or all steps would be dense without a word
        sample(pipe)


def test_a_scheduler_that_does_not_count_needs_the_callback():
    """Or all steps would be dense without a word."""
    pipe = cogvideox_pipeline()
    apply_vmoba(pipe, QUARTER)
    with pytest.raises(ValueError, match="on_step_end"):
        sample(pipe)


def test_the_callback_may_also_be_used_with_a_scheduler_that_counts():
    expected = expected_sample(wan_pipeline(SCHEDULERS["Euler"]()), WAN, 2)
    pipe = wan_pipeline(SCHEDULERS["Euler"]())
    handle = apply_vmoba(pipe, QUARTER)
    for _ in range(2):
        output = sample(pipe, callback_on_step_end=handle.on_step_end)
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sample(pipe), expected, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_does_not_keep_its_step():
    def stop(pipe: Any, step: int, *_: Any) -> Any:
        if step == 5:
            raise StopError
        return {}

    expected = expected_sample(wan_pipeline(SCHEDULERS["Euler"]()), WAN, 2)
    pipe = wan_pipeline(SCHEDULERS["Euler"]())
    apply_vmoba(pipe, QUARTER)
    with pytest.raises(StopError):
        sample(pipe, callback_on_step_end=stop)
    assert torch.allclose(sample(pipe), expected, rtol=1e-4, atol=1e-4)


class StopError(Exception):
    pass


@pytest.mark.parametrize("counts", [True, False])
def test_a_callback_of_a_run_that_was_broken_off_says_nothing_of_the_next(counts: bool):
    pipe = wan_pipeline(SCHEDULERS["Euler"]()) if counts else cogvideox_pipeline()
    family = WAN if counts else COGVIDEOX
    expected = expected_sample(wan_pipeline(SCHEDULERS["Euler"]()) if counts else cogvideox_pipeline(), family, 2)
    handle = apply_vmoba(pipe, QUARTER)
    count = handle.on_step_end

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 5:
            raise StopError
        return count(pipe, step, timestep, tensors)

    with pytest.raises(StopError):
        sample(pipe, callback_on_step_end=stop)
    if counts:
        assert torch.allclose(sample(pipe), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="on_step_end"):
            sample(pipe)
    output = sample(pipe, callback_on_step_end=handle.on_step_end)
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_a_model_called_after_a_run_has_no_step():
    pipe = wan_pipeline(SCHEDULERS["UniPC"]())
    handle = apply_vmoba(pipe, QUARTER)
    sample(pipe)
    with pytest.raises(ValueError, match="dense_steps needs the denoising step"), torch.no_grad():
        run(pipe.transformer, WAN.inputs())
    handle.set_step(3, 4)
    with torch.no_grad():
        assert_close(run(pipe.transformer, WAN.inputs()), sparse_output(WAN, WAN.inputs()))
    handle.set_step(None)
    expected = expected_sample(wan_pipeline(SCHEDULERS["UniPC"]()), WAN, 2)
    assert torch.allclose(sample(pipe), expected, rtol=1e-4, atol=1e-4)


def test_a_scheduler_that_pipelines_only_copy_is_not_asked():
    class DiffusionForcingPipeline:
        def __init__(self) -> None:
            self.transformer, self.scheduler = WAN.build(), SCHEDULERS["UniPC"]()

    pipe = DiffusionForcingPipeline()
    apply_vmoba(pipe, QUARTER)
    with pytest.raises(ValueError, match="dense_steps needs the denoising step"), torch.no_grad():
        run(pipe.transformer, WAN.inputs())


def dense_steps_of(pipe: Any, **options: Any) -> list[bool]:
    """Whether each model call of a run was dense; with guidance there are two a step."""
    calls: list[bool] = []
    hook = pipe.transformer.register_forward_hook(
        lambda model, *_: calls.append(WAN.attentions(model)[0].processor.dense)
    )
    try:
        sample(pipe, **options)
    finally:
        hook.remove()
    assert calls[::2] == calls[1::2]
    return calls[::2]


FIRST_QUARTER = [True] * 2 + [False] * 6
OTHERS: dict[str, Callable[[Any], Any]] = {
    "the same parts": lambda pipe: diffusers.WanPipeline(**pipe.components),
    "a scheduler of its own": lambda pipe: diffusers.WanPipeline(
        **(pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    ),
    "from_pipe": diffusers.WanPipeline.from_pipe,
    "a view of the same pipeline": copy.copy,
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_steps_are_those_of_the_pipeline_that_runs(other: str, ran: bool):
    pipe = wan_pipeline(SCHEDULERS["UniPC"]())
    handle = apply_vmoba(pipe, QUARTER)
    if ran:
        assert dense_steps_of(pipe) == FIRST_QUARTER
    second = OTHERS[other](pipe)
    second.scheduler = copy.deepcopy(second.scheduler)
    second.set_progress_bar_config(disable=True)
    assert dense_steps_of(second) == FIRST_QUARTER
    assert dense_steps_of(second, callback_on_step_end=handle.on_step_end) == FIRST_QUARTER
    del pipe
    gc.collect()
    assert dense_steps_of(second) == FIRST_QUARTER


def test_a_modular_pipeline_gives_its_steps():
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.wan import before_denoise, denoise

    class Blocks(SequentialPipelineBlocks):
        block_classes: ClassVar[list[Any]] = [
            before_denoise.WanTextInputStep,
            before_denoise.WanSetTimestepsStep,
            before_denoise.WanPrepareLatentsStep,
            denoise.WanDenoiseStep,
        ]
        block_names: ClassVar[list[str]] = ["text", "timesteps", "latents", "denoise"]

    pipe: Any = Blocks().init_pipeline()
    pipe.update_components(transformer=WAN.build(), scheduler=SCHEDULERS["UniPC"]())
    pipe.set_progress_bar_config(disable=True)
    apply_vmoba(pipe, QUARTER)
    calls: list[bool] = []
    pipe.transformer.register_forward_hook(lambda model, *_: calls.append(WAN.attentions(model)[0].processor.dense))
    frames, height, width = GRID
    pipe(
        latents=torch.randn(1, 4, frames, 2 * height, 2 * width),
        prompt_embeds=torch.randn(1, 5, TEXT_DIM),
        negative_prompt_embeds=torch.randn(1, 5, TEXT_DIM),
        num_frames=4 * (frames - 1) + 1,
        height=16 * height,
        width=16 * width,
        num_inference_steps=STEPS,
        output="latents",
    )
    assert calls[::2] == calls[1::2] == FIRST_QUARTER


def test_two_pipelines_in_two_threads_count_their_own_steps():
    pipe = wan_pipeline(SCHEDULERS["UniPC"]())
    apply_vmoba(pipe, QUARTER)
    expected = {
        steps: expected_sample(wan_pipeline(SCHEDULERS["UniPC"]()), WAN, dense, steps=steps)
        for steps, dense in ((4, 1), (8, 2))
    }
    found: dict[int, Tensor] = {}

    def serve(steps: int) -> None:
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        found[steps] = sample(view, steps=steps)

    threads = [threading.Thread(target=serve, args=(steps,)) for steps in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for steps, wanted in expected.items():
        assert torch.allclose(found[steps], wanted, rtol=1e-4, atol=1e-4)


def test_a_summary_tells_of_a_model_that_replaced_the_applied_one():
    pipe = wan_pipeline(SCHEDULERS["Euler"]())
    handle = apply_vmoba(pipe, QUARTER)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert "another model" not in handle.summary()
    pipe.transformer = WAN.build(1)
    assert "transformer: no forward yet; the pipeline has another model now" in handle.summary()


class StrengthPipeline:
    """A run of any scheduler from a later step on, as diffusers' pipelines of video to video make it."""

    def __init__(self, scheduler: Any, callback_on_step_end: Any = None) -> None:
        self.transformer, self.scheduler, self.callback = WAN.build(), scheduler, callback_on_step_end

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(self, steps: int, skipped: int, callback: Any = None) -> list[bool]:
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps[skipped * self.scheduler.order :]
        self._num_timesteps = len(timesteps)
        calls, inputs = [], WAN.inputs(batch=1)
        for i, t in enumerate(timesteps):
            output = run(self.transformer, inputs | {"timestep": t[None]})
            calls.append(WAN.attentions(self.transformer)[0].processor.dense)
            inputs["hidden_states"] = self.scheduler.step(output, t, inputs["hidden_states"]).prev_sample
            if callback is not None:
                callback(self, i, t, {})
        return calls


COUNTING: dict[str, Callable[[], Any]] = SCHEDULERS | {
    "DPM": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "Heun, two calls a step": diffusers.FlowMatchHeunDiscreteScheduler,
}


@pytest.mark.parametrize(
    ("dense_steps", "skipped", "dense"), [(0.5, 0, 4), (0.5, 2, 2), (0.5, 1, 3), (3, 2, 1), (2, 5, 0)]
)
@pytest.mark.parametrize("scheduler", COUNTING)
def test_a_run_that_starts_late_has_the_steps_of_the_whole_schedule(
    scheduler: str, dense_steps: float, skipped: int, dense: int
):
    """So dense steps have the highest noise; of 8 steps, ``skipped`` are left out."""
    pipe = StrengthPipeline(COUNTING[scheduler]())
    handle = apply_vmoba(pipe, VMoBAConfig(*BLOCKS, TopK(2), dense_steps=dense_steps))
    expected = [True] * dense + [False] * (8 - skipped - dense)
    if pipe.scheduler.order == 2:  # the last step has one call
        expected = [step for step in expected for _ in range(2)][:-1]
    for callback in (None, handle.on_step_end, None):
        assert pipe(8, skipped, callback) == expected


def test_a_scheduler_that_was_not_started_says_no_step():
    pipe = wan_pipeline(SCHEDULERS["UniPC"]())
    apply_vmoba(pipe, QUARTER)
    with pytest.raises(ValueError, match="dense_steps needs the denoising step"), torch.no_grad():
        run(pipe.transformer, WAN.inputs())
