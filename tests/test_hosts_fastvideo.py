"""What FastVideo's VMOBA_ATTN runs: VMoBA, with a stub of FastVideo, and with its own modules where installed."""

import dataclasses
import json
import logging
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import hosts
from vmoba_flex import Remember, TopK, VMoBAConfig, vmoba_attention

GRID = (2, 4, 4)
SETTINGS = {
    "temporal_chunk_size": 1,
    "temporal_topk": 1,
    "spatial_chunk_size": [2, 2],
    "spatial_topk": 2,
    "st_chunk_size": [1, 2, 4],
    "st_topk": 2,
    "moba_select_mode": "topk",
    "first_full_layer": 1,
    "first_full_step": 3,
}
_BACKENDS = "fastvideo.attention.backends"


class Host:
    """FastVideo as far as a backend sees it: ``backend`` is its VMOBA_ATTN, ``plugin`` our module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: hosts.Kind) -> None:
        self.batch: Any = types.SimpleNamespace(timesteps=torch.arange(10))
        (stub if kind == "stub" else package)(monkeypatch)
        context = lambda: types.SimpleNamespace(forward_batch=self.batch)  # noqa: E731
        hosts.module(monkeypatch, "fastvideo.forward_context", get_forward_context=context)
        self.plugin = hosts.ours(monkeypatch, "fastvideo")
        self.backend: Any = self.plugin.VMOBAAttentionBackend

    def metadata(self, step: Any, settings: dict[str, Any] = SETTINGS) -> Any:
        """As the denoising stage makes it, of a latent of twice the grid's height and width."""
        latent = (GRID[0], 2 * GRID[1], 2 * GRID[2])
        arguments = {"current_timestep": step, "raw_latent_shape": latent, "patch_size": (1, 2, 2)}
        return self.backend.get_builder_cls()().build(**settings | arguments, device=torch.device("cpu"))

    def layer(self, i: int, **facts: Any) -> Any:
        """The attention of a layer, as FastVideo makes it."""
        arguments = {"num_heads": 2, "head_size": 8, "softmax_scale": 8**-0.5, "prefix": f"Wan.blocks.{i}.attn1.impl"}
        return self.backend.get_impl_cls()(num_kv_heads=2, **arguments | facts)


def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What FastVideo promises a backend."""

    class AttentionImpl: ...

    def layer_idx_from_prefix(prefix: str) -> int:
        parts = prefix.split(".")
        if "blocks" not in parts:
            raise ValueError(f"no index in {prefix!r}")
        return int(parts[parts.index("blocks") + 1])

    @dataclasses.dataclass
    class Metadata:
        current_timestep: Any
        patch_resolution: list[int]
        temporal_chunk_size: int
        temporal_topk: int
        spatial_chunk_size: Any
        spatial_topk: int
        st_chunk_size: Any
        st_topk: int
        moba_select_mode: str = "threshold"
        moba_threshold: float = 0.25
        moba_threshold_type: str = "query_head"
        first_full_layer: int = 0
        first_full_step: int = 12
        temporal_layer: int = 1
        spatial_layer: int = 1
        st_layer: int = 1

    class Builder:
        def build(self, raw_latent_shape: Any, patch_size: Any, device: Any, **facts: Any) -> Metadata:
            grid = [size // patch for size, patch in zip(raw_latent_shape, patch_size, strict=True)]
            return Metadata(patch_resolution=grid, **facts)

    class VMOBAAttentionBackend:
        get_impl_cls = staticmethod(lambda: AttentionImpl)
        get_builder_cls = staticmethod(lambda: Builder)

    hosts.module(
        monkeypatch, f"{_BACKENDS}.abstract", AttentionImpl=AttentionImpl, layer_idx_from_prefix=layer_idx_from_prefix
    )
    hosts.module(monkeypatch, f"{_BACKENDS}.vmoba", VMOBAAttentionBackend=VMOBAAttentionBackend)


def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastVideo's own backend, without the kernels that its own implementation needs."""
    hosts.packages(monkeypatch, "fastvideo", "fastvideo.attention", _BACKENDS)
    hosts.module(monkeypatch, "fastvideo.logger", init_logger=logging.getLogger)
    hosts.module(monkeypatch, "einops", rearrange=None)
    kernels = dict.fromkeys(("moba_attn_varlen", "process_moba_input", "process_moba_output"))
    hosts.module(monkeypatch, "fastvideo_kernel", **kernels)


@pytest.fixture(params=hosts.KINDS)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch, request.param)


def tensors(tokens: int = 32) -> list[Tensor]:
    """Query, key and value ``(B, S, H, D)``."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, 2, 8, generator=generator, requires_grad=True) for _ in range(3)]


def expected(config: VMoBAConfig, layer: int, qkv: list[Tensor], step: int | None = 5) -> Tensor:
    plan = config.layer(layer, 40, step, 10)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    dispatch = "dense" if plan.dense else "auto"
    return vmoba_attention(q, k, v, config.partition(plan.kind, GRID), plan.rule, dispatch=dispatch).transpose(1, 2)


def test_layers_do_what_fastvideos_json_says(host: Host):
    host.plugin.install()
    qkv, config = tensors(), VMoBAConfig.from_json(json.dumps(SETTINGS))
    full = hosts.full_attention(*qkv)
    for layer in range(5):
        for step in (2, 3):
            output = host.layer(layer).forward(*qkv, host.metadata(step))
            torch.testing.assert_close(output, expected(config, layer, qkv, step))
            assert torch.allclose(output, full, atol=1e-5) == (layer == 0 or step == 2)
    two = {"moba_select_mode": "threshold", "moba_threshold": 0.4, "moba_threshold_type": "head_global"}
    output = host.layer(2).forward(*qkv, host.metadata(5, SETTINGS | two))  # of another model in the same process
    torch.testing.assert_close(output, expected(VMoBAConfig.from_json(json.dumps(SETTINGS | two)), 2, qkv))


def test_training_has_gradients_and_no_dense_step(host: Host):
    host.plugin.install()
    host.batch = None
    qkv, config = tensors(), VMoBAConfig.from_json(json.dumps(SETTINGS | {"first_full_step": 0}))
    output = host.layer(2).forward(*qkv, host.metadata(torch.tensor([900, 20])))
    wanted = expected(config, 2, qkv)
    torch.testing.assert_close(output, wanted)
    weights = torch.randn_like(output)
    torch.testing.assert_close(*(torch.autograd.grad(one, qkv, weights) for one in (output, wanted)))


def test_a_config_replaces_the_json(host: Host):
    config = VMoBAConfig(1, (2, 2), (1, 2, 2), [TopK(1), TopK(3), TopK(2)], dense_steps=(0.25, 1))
    host.plugin.install(config)
    qkv = tensors()
    full = hosts.full_attention(*qkv)
    dense = [torch.allclose(host.layer(1).forward(*qkv, host.metadata(i)), full, atol=1e-5) for i in range(10)]
    assert dense == [True] * 3 + [False] * 6 + [True]
    plan = config.layer(2, 3, 5, 10)
    partition = config.partition(plan.kind, GRID)
    wanted = vmoba_attention(*(x.transpose(1, 2) for x in qkv), partition, plan.rule).transpose(1, 2)
    torch.testing.assert_close(host.layer(2).forward(*qkv, host.metadata(5)), wanted)
    host.plugin.install()  # and back
    torch.testing.assert_close(host.layer(0).forward(*qkv, host.metadata(5)), full)


def test_what_cannot_be_right_is_refused(host: Host):
    with pytest.raises(TypeError, match="config must be a VMoBAConfig or None, got str"):
        host.plugin.install("wan.json")
    config = VMoBAConfig(1, (2, 2), (1, 2, 2), TopK(1), dense_steps=1)
    with pytest.raises(ValueError, match="remember must be None with FastVideo"):
        host.plugin.install(dataclasses.replace(config, remember=Remember()))
    host.plugin.install()
    with pytest.raises(ValueError, match=r"causal must be False for VMoBA, got True for 'Wan.blocks.1.attn1.impl'"):
        host.layer(1, causal=True)
    with pytest.raises(ValueError, match="index"):
        host.layer(1, prefix="attn1.impl")
    q, k, v = tensors()
    text = tensors(40)
    message = r"query and key must have the 32 tokens of the grid \(2, 4, 4\) and no others, got"
    for tokens in ((q, k[:, :30], v[:, :30]), text):
        with pytest.raises(ValueError, match=message):
            host.layer(1).forward(*tokens, host.metadata(5))
    competing = {"moba_select_mode": "threshold", "moba_threshold_type": "overall"}
    host.layer(1).forward(q, k, v, host.metadata(5, SETTINGS | competing))
    with pytest.raises(ValueError, match="pool must be 'query' or 'head' where ranks share out heads, got 'global'"):
        host.layer(1, num_heads=4).forward(q, k, v, host.metadata(5, SETTINGS | competing))
    host.plugin.install(dataclasses.replace(config, dense_steps=0.25))
    host.batch = None
    with pytest.raises(ValueError, match="num_steps must be given where dense_steps is a share"):
        host.layer(1).forward(q, k, v, host.metadata(5))
