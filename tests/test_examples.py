"""What the README and the docs tell their readers works as it stands.

A fence of Python says after its language how it runs: not at all (``no-run``: it needs a GPU, weights or a prompt),
under ``torchrun``, or in this process if it says nothing.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from vmoba_flex.models import adapters

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCES = [
    (f"{page.relative_to(ROOT)}-{number}", *fence)
    for page in PAGES
    for number, fence in enumerate(re.findall(r"^```([^\n]+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
]


def marked(mark: str) -> list[Any]:
    """The examples of all pages whose fence starts with these words."""
    return [pytest.param(code, id=name) for name, words, code in FENCES if words == mark]


def needs(code: str) -> None:
    """Skips an example on a package that is not installed."""
    for package in ("diffusers", "fastvideo"):
        if re.search(rf"^(from|import) {package}\b", code, re.MULTILINE):
            pytest.importorskip(package)


@pytest.mark.parametrize("code", marked("python"))
def test_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.chdir(tmp_path)  # for files that they write
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))  # what an example registers stays in it
    needs(code)
    # Classes and Dynamo look their module up by name, and Dynamo remembers it: one of its own for each example.
    module = types.ModuleType(re.sub(r"\W", "_", request.node.name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, module.__dict__)


def run_on_two_ranks(code: str, folder: Path) -> None:
    """Runs an example as its page says: by torchrun, as a script of its own."""
    (script := folder / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


ON_ANY_DEVICE = [example for example in marked("python torchrun") if "diffusers" not in example.values[0]]
ON_GPUS = [example for example in marked("python torchrun") if "diffusers" in example.values[0]]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="takes no GPU, or two")
@pytest.mark.parametrize("code", ON_ANY_DEVICE)
def test_examples_run_under_torchrun(code: str, tmp_path: Path):
    run_on_two_ranks(code, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("code", ON_GPUS)
def test_examples_run_under_torchrun_on_gpus(code: str, tmp_path: Path):
    needs(code)
    run_on_two_ranks(code, tmp_path)


@pytest.mark.parametrize("code", marked("python no-run"))
def test_examples_that_do_not_run_name_what_exists(code: str):
    needs(code)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module} has no {missing}"


def test_fences_say_what_they_hold():
    known = {"python", "python torchrun", "python no-run", "bash"}
    assert [(name, words) for name, words, _ in FENCES if words not in known] == []


def test_each_kind_of_example_is_found():
    assert sum(str(example.id).startswith("README") for example in marked("python")) >= 2
    assert (len(ON_ANY_DEVICE), len(ON_GPUS)) == (3, 1)
    assert len(marked("python no-run")) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).is_file(), link
