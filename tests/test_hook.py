"""The hook at diffusers' dispatcher: whom it touches, and what happens where diffusers does not do what it needs."""

# pyright: reportPrivateImportUsage=false
import functools
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from tests.video_models import FAMILIES, SPARSE, assert_close, dense_output, run, sparse_output
from vmoba_flex import TopK
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.models import apply_vmoba, hook

WAN = FAMILIES["wan2.1"]


@torch.no_grad()
def test_a_stock_processor_shared_with_cross_attention_leaves_that_dense():
    model, inputs = WAN.build(), WAN.inputs()
    shared = model.blocks[0].attn1.processor  # pyright: ignore
    for block in model.blocks:  # pyright: ignore
        block.attn1.processor = block.attn2.processor = shared
    handle = apply_vmoba(model, SPARSE)
    assert_close(run(model, inputs), sparse_output(WAN, inputs))
    assert shared._attention_backend is shared._parallel_config is None
    assert all(block.attn2.processor is shared for block in model.blocks)  # pyright: ignore
    handle.remove()
    assert torch.equal(run(model, inputs), dense_output(WAN, inputs))


def test_no_user_can_name_the_backend():
    model: Any = WAN.build()
    apply_vmoba(model, SPARSE)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("vmoba")
    with pytest.raises(ValueError, match="vmoba"), attention_dispatch.attention_backend("vmoba"):
        pass


def _checks_the_config(*args: Any, parallel_config: Any = None, **options: Any) -> Any:
    if parallel_config is not None and not hasattr(parallel_config, "context_parallel_config"):
        raise TypeError("parallel_config must be a ParallelConfig")
    return dispatch_attention_fn(*args, parallel_config=parallel_config, **options)


def _looks_backends_up_by_name(*args: Any, backend: Any = None, **options: Any) -> Any:
    return dispatch_attention_fn(*args, backend=attention_dispatch.AttentionBackendName(str(backend)), **options)


def _drops_the_backend(*args: Any, backend: Any = None, parallel_config: Any = None, **options: Any) -> Any:
    return dispatch_attention_fn(*args, **options)


def _scales_before(query: Any, *args: Any, **options: Any) -> Any:
    return dispatch_attention_fn(query + 1, *args, **options)


@pytest.mark.parametrize(
    "dispatch", [_checks_the_config, _looks_backends_up_by_name, _drops_the_backend, _scales_before]
)
def test_a_dispatcher_that_does_otherwise_is_named_with_the_version(dispatch: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", dispatch)
    hook.our_backend.cache_clear()
    model = WAN.build()
    before = [attention.processor for attention in WAN.attentions(model)]
    try:
        with pytest.raises(RuntimeError, match=rf"diffusers {diffusers.__version__} must pass calls"):
            apply_vmoba(model, SPARSE)
    finally:
        hook.our_backend.cache_clear()
    assert [attention.processor for attention in WAN.attentions(model)] == before


class Direct:
    """Attends without the dispatcher."""

    _attention_backend = _parallel_config = None

    def __call__(self, attn: Any, hidden_states: Any, *args: Any) -> Any:
        return hidden_states


class WithoutConfig:
    """Names its backend only, as some of diffusers do."""

    _attention_backend = _parallel_config = None

    def __call__(self, attn: Any, hidden_states: Any, *args: Any) -> Any:
        return dispatch_attention_fn(hidden_states, hidden_states, hidden_states, backend=self._attention_backend)


@pytest.mark.parametrize(
    ("processor", "missing"), [(Direct, "dispatch_attention_fn"), (WithoutConfig, "_parallel_config")]
)
def test_a_processor_that_would_stay_dense_is_refused(processor: type, missing: str):
    model = WAN.build()
    WAN.attentions(model)[2].processor = processor()
    match = rf"blocks.2.attn1 must have .* got {processor.__name__} without {missing}.*{diffusers.__version__}"
    with pytest.raises(ValueError, match=match):
        apply_vmoba(model, SPARSE)


@torch.no_grad()
@pytest.mark.parametrize("option", [{"is_causal": True}, {"scale": 0.5}, {"dropout_p": 0.1}])
def test_a_call_that_would_not_be_as_asked_is_an_error(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model, inputs = WAN.build(), WAN.inputs()
    apply_vmoba(model, SPARSE)
    module: Any = __import__(type(model).__module__, fromlist=["x"])
    stock = module.dispatch_attention_fn
    monkeypatch.setattr(module, "dispatch_attention_fn", lambda *args, **options: stock(*args, **options | option))
    with pytest.raises(ValueError, match="without dropout, scale and order with VMoBA applied"):
        run(model, inputs)


@torch.no_grad()
def test_a_call_that_hands_over_no_layer_is_an_error(monkeypatch: pytest.MonkeyPatch):
    model, inputs = WAN.build(), WAN.inputs()
    apply_vmoba(model, VMoBAConfig(1, (2, 3), (2, 2, 3), TopK(2)))
    module: Any = __import__(type(model).__module__, fromlist=["x"])
    stock = module.dispatch_attention_fn
    drop = functools.wraps(stock)(lambda *args, **options: stock(*args, **options | {"parallel_config": None}))
    monkeypatch.setattr(module, "dispatch_attention_fn", drop)
    with pytest.raises(ValueError, match="must pass the parallel config of its processor, got one with NoneType"):
        run(model, inputs)
