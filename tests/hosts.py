"""Stubs of hosts, written from their contracts, in the place of packages that need a GPU or are no packages."""

import importlib
import importlib.util
import sys
import types
from typing import Any, Literal

import pytest
import torch.nn.functional as F
from torch import Tensor

# A stub throughout, or the modules of an installed package with stubs of what they need of others.
Kind = Literal["stub", "package"]
KINDS: tuple[Kind, ...] = ("stub", "package")


def full_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of tensors ``(B, S, H, D)``."""
    turned = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*turned, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> Any:
    """A module of this name and its packages, in place of whatever is installed."""
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        module(monkeypatch, parent)
    made = types.ModuleType(name)
    made.__path__ = []
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    if parent:
        monkeypatch.setattr(sys.modules[parent], last, made, raising=False)
    return made


def packages(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Packages of an installed host, without what their ``__init__`` would load."""
    spec = importlib.util.find_spec(names[0])
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{names[0]} is not installed")
    (root,) = spec.submodule_search_locations
    for name in names:
        folder = "/".join([root, *name.split(".")[1:]])
        module(monkeypatch, name).__path__ = [folder]


def ours(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A module of ``vmoba_flex.hosts``, loaded anew for the host that is there now."""
    import vmoba_flex.hosts

    full = f"vmoba_flex.hosts.{name}"
    monkeypatch.delitem(sys.modules, full, raising=False)
    monkeypatch.setattr(vmoba_flex.hosts, name, None, raising=False)
    loaded = importlib.import_module(full)
    monkeypatch.setitem(sys.modules, full, loaded)
    return loaded
