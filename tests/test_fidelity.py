"""Paired denoises: the same noise, times, layers, what is kept on disk, and how near two videos are."""

# pyright: reportPrivateImportUsage=false
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import AutoencoderKLWan, WanPipeline

from tests.test_pipelines import SCHEDULERS
from tests.video_models import BLOCKS, FAMILIES, GRID, TEXT_DIM
from vmoba_flex import TopK, VMoBAConfig, apply_vmoba
from vmoba_flex.fidelity import Store, nearness, run_denoise
from vmoba_flex.fidelity.identity import identity_of, key_of

STEPS = 4
SPARSE = VMoBAConfig(*BLOCKS, TopK(2), dense_steps=1)
EVERYTHING = VMoBAConfig(*BLOCKS, TopK(density=1.0))
CALL = {
    "num_frames": 4 * (GRID[0] - 1) + 1,
    "height": 16 * GRID[1],
    "width": 16 * GRID[2],
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
}


def prompt(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 5, TEXT_DIM, generator=generator) for name in names}


def wan_pipeline(seed: int = 0) -> Any:
    """A whole tiny pipeline, with a decoder, but for the text encoder."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), scheduler=SCHEDULERS["UniPC"](),
        transformer=FAMILIES["wan2.1"].build(seed),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_denoise():
    pipe = wan_pipeline()
    expected = pipe(**prompt(), **CALL, generator=torch.Generator().manual_seed(3), output_type="np").frames[0]
    full = run_denoise(pipe, None, prompt(), 3, CALL)
    assert full.frames.shape == (9, 64, 96, 3) and full.frames.dtype == torch.uint8 and full.layers == ()
    assert np.array_equal(full.frames.numpy(), np.rint(255 * expected).astype(np.uint8))
    done = []
    sparse = run_denoise(pipe, SPARSE, prompt(), 3, CALL, progress=lambda: done.append(1))
    assert len(done) == len(sparse.step_seconds) == STEPS
    assert 0 < sum(sparse.step_seconds) < sparse.seconds
    assert not torch.equal(full.frames, sparse.frames)
    assert [layer.kind for layer in sparse.layers] == ["temporal", "spatial", "spatiotemporal"]
    for layer in sparse.layers:
        assert len(layer.density) == STEPS and layer.density[0] == 1
        assert len(set(layer.density[1:])) == 1 and layer.density[1] is not None and 0 < layer.density[1] < 1
    again = run_denoise(pipe, None, prompt(), 3, CALL)  # VMoBA is removed again
    assert torch.equal(again.frames, full.frames)
    # What attends everything changes what is shown by no more than one step of 255 somewhere.
    everything = run_denoise(pipe, EVERYTHING, prompt(), 3, CALL)
    assert (everything.frames.int() - full.frames.int()).abs().max() <= 1


def test_what_a_denoise_refuses():
    pipe = wan_pipeline()
    with pytest.raises(ValueError, match="must have no argument that prompts or seeds set, got prompt"):
        run_denoise(pipe, None, "a cat", 0, CALL | {"prompt": "a dog"})
    with pytest.raises(ValueError, match="got generator"):
        run_denoise(pipe, None, prompt(), 0, CALL | {"generator": torch.Generator()})
    with pytest.raises(TypeError, match="prompt must be a text or a mapping"):
        run_denoise(pipe, None, 3, 0, CALL)
    with pytest.raises(ValueError, match="must have an output_type of pixels, such as 'np', got 'latent'"):
        run_denoise(pipe, None, prompt(), 0, CALL | {"output_type": "latent"})
    with apply_vmoba(pipe, SPARSE), pytest.raises(ValueError, match="pipe must not have VMoBA applied"):
        run_denoise(pipe, None, prompt(), 0, CALL)


def test_keys_tell_denoises_apart():
    pipe = wan_pipeline()
    identity = identity_of(pipe)
    assert identity == identity_of(wan_pipeline()) != identity_of(wan_pipeline(seed=1))
    other = wan_pipeline()
    other.scheduler = SCHEDULERS["Euler"]()
    assert identity_of(other) != identity
    other = wan_pipeline()
    with torch.no_grad():
        other.vae.decoder.conv_out.bias[0] += 1
    assert identity_of(other) != identity
    options = [(None, prompt(), 0, CALL), (SPARSE, prompt(), 0, CALL), (None, prompt(1), 0, CALL)]
    options += [(None, prompt(), 1, CALL), (None, prompt(), 0, CALL | {"guidance_scale": 4.0})]
    options += [(dataclasses.replace(SPARSE, dense_steps=2), prompt(), 0, CALL)]
    keys = [key_of(identity, pipe, *option) for option in options]
    assert len(set(keys)) == len(keys)
    assert keys == [key_of(identity, pipe, *option) for option in options]


def test_a_store_keeps_what_is_finished(tmp_path: Path):
    denoise = run_denoise(wan_pipeline(), SPARSE, prompt(), 0, CALL)
    store = Store(tmp_path / "new")
    stored = store.get_or_run("a", lambda: denoise)
    assert stored == store.get_or_run("a", lambda: pytest.fail("is not run again"))
    for name in ("seconds", "step_seconds", "peak_bytes", "layers"):
        assert getattr(stored, name) == getattr(denoise, name)
    assert torch.equal(torch.cat(list(stored.runs())), denoise.frames) and stored.shape == denoise.frames.shape
    stored.path.write_bytes(stored.path.read_bytes()[:100])  # as another program might leave it
    assert store.get("a") is None
    with pytest.raises(KeyboardInterrupt):
        store.get_or_run("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [path.name for path in store.folder.iterdir()] == ["a.safetensors"]


def test_nearness_is_what_the_definitions_say():
    """By NumPy: windows one by one."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, (3, 14, 13, 3), dtype=np.uint8)
    second = np.clip(first + generator.integers(-20, 21, first.shape), 0, 255).astype(np.uint8)
    second[2] = first[2]
    weight = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / weight.sum() ** 2
    errors, similarities = [], []
    for a, b in zip(first / 255, second / 255, strict=True):
        errors.append(((a - b) ** 2).mean())
        found = []
        for y in range(14 - 10):
            for x in range(13 - 10):
                for channel in range(3):
                    p, q = (frame[y : y + 11, x : x + 11, channel] for frame in (a, b))
                    mp, mq = (weight * p).sum(), (weight * q).sum()
                    vp, vq = (weight * p * p).sum() - mp**2, (weight * q * q).sum() - mq**2
                    cov = (weight * p * q).sum() - mp * mq
                    top = (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2)
                    found.append(top / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2)))
        similarities.append(np.mean(found))
    one, other = (torch.from_numpy(video).split(2) for video in (first, second))
    near = nearness(one, other)
    assert near.frame_psnr == pytest.approx([-10 * np.log10(error) if error else 100 for error in errors])
    assert near.psnr == pytest.approx(-10 * np.log10(np.mean(errors)))
    assert near.frame_ssim == pytest.approx(similarities, abs=1e-4)
    assert near.ssim == pytest.approx(np.mean(similarities), abs=1e-4)
    small = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert nearness([small], [small]).ssim is None and nearness([small], [small]).psnr == 100
    with pytest.raises(ValueError, match="videos must have one size"):
        nearness([small], [small[:, :4]])
