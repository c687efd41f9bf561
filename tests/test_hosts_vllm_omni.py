"""vLLM-Omni's attention backend, with a stub of vLLM-Omni, and with its own modules where they are installed."""

import dataclasses
import enum
import importlib
import logging
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import hosts
from vmoba_flex import TopK, VMoBAConfig, vmoba_attention
from vmoba_flex.approx_blocks import ApproxBlocks

GRID = (2, 4, 4)
VIDEO = 32
SPARSE = {"sparsity": 0.5}
_HOST = "vllm_omni.diffusion"
_BACKENDS = f"{_HOST}.attention.backends"


class Host:
    """vLLM-Omni as far as a backend sees it.

    Attributes:
        plugin: our module, loaded with it.
        context: the forward context, or None.
        parallel: degrees of the parallel config.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: hosts.Kind) -> None:
        self.cuda = True
        self.context: Any = types.SimpleNamespace(denoise_step_idx=3, total_denoise_steps=None)
        self.parallel: dict[str, int] = {}
        (stub if kind == "stub" else package)(monkeypatch, self)
        hosts.module(
            monkeypatch,
            f"{_HOST}.forward_context",
            get_forward_context=lambda: self.context,
            is_forward_context_available=lambda: self.context is not None,
        )
        config = types.SimpleNamespace(parallel_config=None)

        def current() -> Any:
            config.parallel_config = types.SimpleNamespace(**self.parallel)
            return config

        hosts.module(monkeypatch, f"{_HOST}.config", get_current_diffusion_config_or_none=current)
        monkeypatch.delenv("VMOBA_FLEX_CONFIG", raising=False)
        self.plugin = hosts.ours(monkeypatch, "vllm_omni")
        self.abstract: Any = importlib.import_module(f"{_BACKENDS}.abstract")
        self.registry: Any = importlib.import_module(f"{_BACKENDS}.registry")

    def metadata(self, **facts: Any) -> Any:
        return self.abstract.AttentionMetadata(**facts)

    def layout(self, **facts: Any) -> Any:
        return self.abstract.VideoTokenLayout(**facts)

    def layer(self, prefix: str = "blocks.1.attn1", sparse: dict[str, Any] | None = None, **facts: Any) -> Any:
        """The attention of a layer, as vLLM-Omni makes it."""
        arguments = {"num_kv_heads": 2, "qkv_layout": "BSND", "role": "self", "backend_explicit": True}
        made = self.registry.DiffusionAttentionBackendEnum.RAINFUSION_ATTN.get_class().get_impl_cls()
        kwargs = SPARSE if sparse is None else sparse
        return made(
            num_heads=2, head_size=8, softmax_scale=8**-0.5, prefix=prefix, backend_kwargs=kwargs, **arguments | facts
        )


def platform(host: Host) -> Any:
    return types.SimpleNamespace(
        **{f"is_{name}": lambda: False for name in ("rocm", "npu", "xpu", "musa")},
        is_cuda=lambda: host.cuda,
        get_diffusion_attn_backend_cls=lambda **_: f"{_BACKENDS}.sdpa.SDPABackend",
    )


def stub(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """What vLLM-Omni promises a backend."""

    class AttentionBackend:
        @classmethod
        def supports_attention_mask(cls, attention_spec: object = None) -> bool:
            return False

    class AttentionImpl:
        def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
            return self.forward_cuda(query, key, value, attn_metadata)

        def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
            raise NotImplementedError

    class Full(AttentionImpl):
        def __init__(self, **_: Any) -> None: ...

        def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
            mask = None if attn_metadata is None else attn_metadata.attn_mask
            return hosts.full_attention(
                query, key, value, mask if mask is None or mask.ndim > 2 else mask[:, None, None]
            )

    class FullBackend(AttentionBackend):
        @classmethod
        def supports_attention_mask(cls, attention_spec: object = None) -> bool:
            return True

        get_impl_cls = staticmethod(lambda: Full)

    @dataclasses.dataclass
    class AttentionMetadata:
        attn_mask: Tensor | None = None
        joint_query: Tensor | None = None
        extra: dict[str, Any] = dataclasses.field(default_factory=dict)
        full_attn_spans: Any = None
        video_layout: Any = None

    @dataclasses.dataclass
    class VideoTokenLayout:
        prefix_len: int | None = None
        latent_grid: tuple[int, int, int] | None = None
        used_len: int | None = None
        video_spans: tuple[Any, ...] = ()

    @dataclasses.dataclass
    class VideoTokenSpan:
        start: int
        latent_grid: tuple[int, int, int]
        role: str

        @property
        def length(self) -> int:
            frames, height, width = self.latent_grid
            return frames * height * width

    paths: dict[Any, str] = {}

    class DiffusionAttentionBackendEnum(enum.Enum):
        RAINFUSION_ATTN = "on an NPU"

        def get_class(self) -> Any:
            name, _, member = paths[self].rpartition(".")
            return getattr(importlib.import_module(name), member)

        def is_overridden(self) -> bool:
            return self in paths

    hosts.module(monkeypatch, "vllm_omni.platforms", current_omni_platform=platform(host))
    members = (AttentionBackend, AttentionImpl, AttentionMetadata, VideoTokenLayout, VideoTokenSpan)
    hosts.module(monkeypatch, f"{_BACKENDS}.abstract", **{one.__name__: one for one in members})
    hosts.module(
        monkeypatch,
        f"{_BACKENDS}.registry",
        DiffusionAttentionBackendEnum=DiffusionAttentionBackendEnum,
        register_diffusion_backend=paths.__setitem__,
    )
    hosts.module(
        monkeypatch,
        f"{_HOST}.attention.selector",
        get_attn_backend_for_role=lambda role, head_size, config=None, **_: (FullBackend, None),
        get_attn_backend_for_capability=lambda role: FullBackend,
    )


def package(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """vLLM-Omni's own backends, on a platform that says it has CUDA."""
    names = ("vllm_omni", _HOST, f"{_HOST}.attention", _BACKENDS, f"{_BACKENDS}.utils")
    hosts.packages(monkeypatch, *names)
    hosts.module(monkeypatch, "vllm.logger", init_logger=logging.getLogger)

    def resolve(path: str) -> Any:
        name, _, member = path.rpartition(".")
        return getattr(importlib.import_module(name), member)

    hosts.module(monkeypatch, "vllm.utils.import_utils", resolve_obj_by_qualname=resolve)
    hosts.module(monkeypatch, "vllm_omni.platforms", current_omni_platform=platform(host))


@pytest.fixture(params=hosts.KINDS)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(monkeypatch, request.param)
    made.plugin.register()
    return made


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``(B, S, H, D)``."""
    q, k, v = torch.randn(3, 2, tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    return q, k, v


def expected(config: VMoBAConfig, layer: int, *qkv: Tensor, prefix: int = 0, suffix: int = 0) -> Tensor:
    plan = config.layer(layer, 40, 3, 20)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    partition = config.partition(plan.kind, GRID, prefix, suffix)
    return vmoba_attention(q, k, v, partition, plan.rule, tail=plan.tail).transpose(1, 2)


def test_the_entry_point_registers_on_cuda_only(monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parent.parent
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"vllm_omni.general_plugins": {"vmoba_flex": "vmoba_flex.hosts.vllm_omni:register"}}
    host = Host(monkeypatch, "stub")
    member = host.registry.DiffusionAttentionBackendEnum.RAINFUSION_ATTN
    host.cuda = False
    host.plugin.register()
    assert not member.is_overridden()
    host.cuda = True
    host.plugin.register()
    host.plugin.register()  # vLLM-Omni may call it twice
    assert member.get_class() is host.plugin.VMoBABackend
    assert host.plugin.VMoBABackend.get_name() == member.name
    assert host.plugin.VMoBABackend.supports_attention_mask()


@pytest.mark.parametrize("layer", range(4))
def test_a_video_is_attended_by_its_layers_blocks(host: Host, layer: int):
    qkv = tensors(VIDEO + 5)
    metadata = host.metadata(video_layout=host.layout(prefix_len=5, latent_grid=GRID))
    attention = host.layer(f"transformer.blocks.{layer}.attn1")
    config = host.plugin.config_of(SPARSE)
    output = attention.forward(*qkv, metadata)
    torch.testing.assert_close(output, expected(config, layer, *qkv, prefix=5))
    assert not torch.allclose(output, hosts.full_attention(*qkv))
    everything = host.layer(f"blocks.{layer}.attn1", {"sparsity": 0.0})
    torch.testing.assert_close(everything.forward(*qkv, metadata), hosts.full_attention(*qkv))


def test_padding_after_the_video_is_not_attended(host: Host):
    qkv = tensors(VIDEO + 6)
    layout = host.layout(prefix_len=2, latent_grid=GRID, used_len=VIDEO + 2)
    mask = (torch.arange(VIDEO + 6) < VIDEO + 2).expand(2, -1)
    metadata = host.metadata(video_layout=layout, attn_mask=mask, extra={"max_seqlen_q": VIDEO + 2})
    output = host.layer().forward(*qkv, metadata)
    valid = [x[:, : VIDEO + 2] for x in qkv]
    torch.testing.assert_close(output[:, : VIDEO + 2], expected(host.plugin.config_of(SPARSE), 1, *valid, prefix=2))
    assert output.shape == qkv[0].shape
    assert not output[:, VIDEO + 2 :].any()


def test_of_several_videos_the_target_has_blocks(host: Host):
    span = host.abstract.VideoTokenSpan
    spans = (span(1, (1, 2, 2), "reference"), span(7, GRID, "target"), span(7 + VIDEO, (1, 1, 2), "reference"))
    qkv = tensors(VIDEO + 10)
    metadata = host.metadata(video_layout=host.layout(used_len=VIDEO + 9, video_spans=spans))
    output = host.layer().forward(*qkv, metadata)[:, : VIDEO + 9]
    valid = [x[:, : VIDEO + 9] for x in qkv]
    torch.testing.assert_close(output, expected(host.plugin.config_of(SPARSE), 1, *valid, prefix=7, suffix=2))


def test_what_is_no_video_is_the_platforms(host: Host, caplog: pytest.LogCaptureFixture):
    qkv = tensors(VIDEO)
    layout = host.layout(prefix_len=0, latent_grid=GRID, used_len=VIDEO)
    attention = host.layer()
    pairs = torch.rand(2, 1, VIDEO, VIDEO) < 0.8
    for metadata, reason in [
        (None, "without a video_layout"),
        (host.metadata(), "without a video_layout"),
        (host.metadata(video_layout=layout, full_attn_spans=[[(0, 4)]] * 2), "full_attn_spans"),
        (host.metadata(video_layout=layout, joint_query=qkv[0]), "joint tokens"),
        (host.metadata(video_layout=layout, attn_mask=pairs), "a mask of other than padding"),
    ]:
        mask = None if metadata is None else metadata.attn_mask
        torch.testing.assert_close(attention.forward(*qkv, metadata), hosts.full_attention(*qkv, mask))
        assert reason in caplog.text
    caplog.clear()
    q, k, v = qkv
    cross = host.layer("blocks.1.attn2", role="cross")
    torch.testing.assert_close(cross.forward(q, k[:, :7], v[:, :7]), hosts.full_attention(q, k[:, :7], v[:, :7]))
    attention.forward(*qkv)
    assert not caplog.text  # each reason is logged once, cross-attention never


def test_dense_steps_and_layers(host: Host, caplog: pytest.LogCaptureFixture):
    qkv = tensors(VIDEO)
    metadata = host.metadata(video_layout=host.layout(prefix_len=0, latent_grid=GRID))
    full = hosts.full_attention(*qkv)
    attention = host.layer(sparse=SPARSE | {"start_step": 2, "end_step": 1, "skip_layers": [0, 2]})

    def is_dense(attention: Any, step: int | None, total: int | None = 10) -> bool:
        host.context = types.SimpleNamespace(denoise_step_idx=step, total_denoise_steps=total)
        return torch.allclose(attention.forward(*qkv, metadata), full, atol=1e-5)

    assert [is_dense(attention, step) for step in (0, 1, 2, 8, 9)] == [True, True, False, False, True]
    assert is_dense(attention, None)
    assert "does not tell its denoising step" in caplog.text
    with pytest.raises(ValueError, match="num_steps must be given where dense_steps has last steps") as raised:
        is_dense(attention, 5, None)
    assert raised.value.__notes__ == ["The host does not tell num_steps: give numbers of first steps, not shares."]
    skipped = host.layer("blocks.2.attn1", SPARSE | {"skip_layers": [0, 2]})
    assert is_dense(skipped, 5)
    host.context = None
    assert not torch.allclose(host.layer().forward(*qkv, metadata), full)  # it needs no step
    assert torch.equal(host.layer("attn1").forward(*qkv, metadata), full)
    assert "whose name has no index" in caplog.text


def test_a_file_has_the_whole_config(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    rule = [TopK(1), TopK(3), TopK(2)]
    config = VMoBAConfig(ApproxBlocks(2), (2, 2), (1, 2, 2), rule, dense_layers=[2])
    config.save(tmp_path / "config.json")
    monkeypatch.setenv("VMOBA_FLEX_CONFIG", str(tmp_path / "config.json"))
    qkv = tensors(VIDEO)
    metadata = host.metadata(video_layout=host.layout(prefix_len=0, latent_grid=GRID))
    output = host.layer(sparse={"sparsity": 0.8, "start_step": 0, "end_step": 0, "precision": "bf16"})
    plan = config.layer(1, 3)
    partition = config.partition(plan.kind, GRID)
    wanted = vmoba_attention(*(x.transpose(1, 2) for x in qkv), partition, plan.rule).transpose(1, 2)
    torch.testing.assert_close(output.forward(*qkv, metadata), wanted)
    with pytest.raises(ValueError, match="block_sparse must be left out where VMOBA_FLEX_CONFIG names a file, got"):
        host.layer()
    VMoBAConfig.fast().save(tmp_path / "config.json")
    with pytest.raises(ValueError, match="remember must be None with vLLM-Omni"):
        host.layer(sparse={})
    dataclasses.replace(config, dense_layers=[-1]).save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"dense_layers must be counted from the first layer here, .* got \(-1,\)"):
        host.layer(sparse={}).forward(*qkv, metadata)


def test_what_cannot_be_right_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ValueError, match=r"causal must be False for VMoBA, got True for 'blocks.1.attn1'"):
        host.layer(causal=True)
    for sparse, message in [
        ({"precision": "fp8"}, "precision of block_sparse must be 'bf16' for VMoBA, got 'fp8'"),
        ({"sparsity": 1.0}, r"sparsity of block_sparse must lie in \[0, 1\) for VMoBA, got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            host.layer(sparse=sparse)
    for name in ("ring_degree", "allgather_degree"):
        host.parallel = {name: 2}
        with pytest.raises(ValueError, match=f"{name} must be 1 for VMoBA, which chooses among all keys, got 2"):
            host.layer()
    qkv = tensors(VIDEO)
    for layout in [
        {"prefix_len": 1, "latent_grid": GRID},  # more than there are
        {"prefix_len": 0, "latent_grid": (2, 4, 3)},  # fewer than max_seqlen_q says
        {"prefix_len": 0},
        {"used_len": VIDEO, "video_spans": (host.abstract.VideoTokenSpan(0, (1, 4, 4), "target"),) * 2},
    ]:
        host.parallel = {}
        metadata = host.metadata(video_layout=host.layout(**layout), extra={"max_seqlen_q": VIDEO})
        with pytest.raises(ValueError, match=r"video_layout must (describe all|have one target video)"):
            host.layer().forward(*qkv, metadata)
    layout = host.layout(prefix_len=0, latent_grid=(2, 4, 3), used_len=VIDEO)  # the rest would pass for padding
    with pytest.raises(ValueError, match="video_layout must describe all 32 valid of 32 tokens, got 24"):
        host.layer().forward(*qkv, host.metadata(video_layout=layout))
    config = VMoBAConfig(1, (2, 2), (1, 2, 2), TopK(density=0.5, pool="global"))
    config.save(tmp_path / "config.json")
    monkeypatch.setenv("VMOBA_FLEX_CONFIG", str(tmp_path / "config.json"))
    host.layer(sparse={})
    for name in ("ulysses_degree", "tensor_parallel_size"):
        host.parallel = {name: 2}
        with pytest.raises(
            ValueError, match="pool must be 'query' or 'head' where ranks share out heads, got 'global'"
        ):
            host.layer(sparse={})
