"""What the README and the docs tell their readers works as it stands, and a wheel holds what it should."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.ranks import RankPool
from vmoba_flex.models import adapters

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))  # what an example registers stays in it
    if re.search(r"^(from|import) diffusers\b", code, re.MULTILINE):
        pytest.importorskip("diffusers")
    exec(code, {"__name__": "example"})  # classes that are made there need the name of a module


TOGETHER = re.findall(r"```python torchrun\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)


def on_a_rank(code: str) -> None:
    """Runs an example on a rank that is in a group already, and may have no accelerator, for which diffusers looks."""
    if "diffusers" in code:
        torch.accelerator.device_count = lambda: 1
    with mock.patch("torch.distributed.init_process_group"):
        exec(code, {"__name__": "example"})


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("code", TOGETHER, ids=range(len(TOGETHER)))
def test_examples_run_on_several_ranks(rank_pool: RankPool, code: str):
    if "diffusers" in code:
        pytest.importorskip("diffusers")
    rank_pool.run(on_a_rank, code)


def test_there_are_examples_for_several_ranks():
    assert len(TOGETHER) == 4


def test_readme_has_examples():
    assert sum(str(example.id).startswith("README") for example in EXAMPLES if example.id) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).is_file(), link


def test_one_wheel_holds_both_packages(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vmoba_flex-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        p.relative_to(ROOT).as_posix() for top in ("vmoba_flex", "block_masks") for p in (ROOT / top).rglob("*.py")
    }
    expected |= {f"{top}/py.typed" for top in ("vmoba_flex", "block_masks")} | {"vmoba_flex/demo/bunny.mp4"}
    assert expected <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"vmoba_flex", "block_masks"}
