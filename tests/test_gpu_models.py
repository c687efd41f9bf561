"""``apply_vmoba`` on a CUDA GPU: compiled training steps and forwards against uncompiled ones."""

# pyright: reportPrivateImportUsage=false
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

pytest.importorskip("diffusers")

import diffusers

from vmoba_flex import ApproxBlocks, Threshold, VMoBAConfig, apply_vmoba

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_at_any_size")]

# More than 4,096 rows: where Inductor's mix-order reductions come in, see docs/models/README.md.
GRID = (8, 24, 24)
CONFIG = VMoBAConfig(ApproxBlocks(4), ApproxBlocks(16), ApproxBlocks(27), Threshold(0.25, max_density=0.25))


def build(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=64, freq_dim=64,
        ffn_dim=512, num_layers=3,
    )  # fmt: skip
    return model.to("cuda", dtype)


def inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    frames, height, width = GRID
    latents = torch.randn(1, 4, frames, 2 * height, 2 * width, generator=generator, device="cuda")
    text = torch.randn(1, 16, 64, generator=generator, device="cuda")
    timestep = torch.tensor([500], device="cuda")
    return {"hidden_states": latents.to(dtype), "timestep": timestep, "encoder_hidden_states": text.to(dtype)}


def gradients(model: Any) -> dict[str, Tensor]:
    model(**inputs()).sample.float().square().mean().backward()
    return {name: x.grad.float() for name, x in model.named_parameters() if x.grad is not None}


def rows(x: Tensor) -> Tensor:
    """A modulation row by row: one that was not written must not be hidden by the others."""
    return x.flatten(0, -2) if x.dim() > 1 and x[..., 0].numel() <= 6 else x.flatten()[None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dispatch", "backend"), [("packed", "triton"), ("packed", "auto"), ("shared", "auto")])
def test_compiled_training_steps_equal_uncompiled_ones(dispatch: str, backend: str, checkpointing: bool):
    config = dataclasses.replace(CONFIG, dispatch=dispatch, backend=backend)
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = build()
        apply_vmoba(model, config)
        if checkpointing:
            model.enable_gradient_checkpointing()
        with inductor_config.patch({"triton.mix_order_reduction": False}):
            if compiled:
                model.compile_repeated_blocks(fullgraph=True, dynamic=False)
            results.append(gradients(model))
    for name, truth in results[0].items():
        actual, expected = rows(results[1][name]), rows(truth)
        assert ((actual - expected).norm(dim=1) <= 0.3 * expected.norm(dim=1)).all(), name


@torch.no_grad()
@pytest.mark.parametrize("dispatch", ["packed", "shared", "tiles"])
def test_compiled_forwards_equal_uncompiled_ones(dispatch: str):
    torch.compiler.reset()
    model, stock = build(torch.float32), build(torch.float32)
    handle = apply_vmoba(model, dataclasses.replace(CONFIG, dispatch=dispatch))
    full, sparse = (x(**inputs(torch.float32)).sample for x in (stock, model))
    assert (sparse - full).norm() > 2e-3 * full.norm()
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    for enabled, expected in ((True, sparse), (False, full), (True, sparse)):
        handle.set_enabled(enabled)
        # Pairs at the cut may flip where the compiled gate rounds otherwise.
        assert (model(**inputs(torch.float32)).sample - expected).norm() <= 5e-4 * full.norm()


@torch.no_grad()
def test_cuda_graphs_serve_dense_and_sparse_steps():
    torch.compiler.reset()
    model, stock = build(torch.float32), build(torch.float32)
    handle = apply_vmoba(model, dataclasses.replace(CONFIG, dispatch="packed"))
    full, sparse = (x(**inputs(torch.float32)).sample for x in (stock, model))
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, mode="reduce-overhead")
    for enabled in (True, True, True, False, False, False, True, True):
        handle.set_enabled(enabled)
        torch.compiler.cudagraph_mark_step_begin()
        expected = sparse if enabled else full
        assert (model(**inputs(torch.float32)).sample - expected).norm() <= 5e-4 * full.norm()
