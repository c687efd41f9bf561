"""What would be published: a source archive, the wheel that is built from it, its metadata, and the wheel installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from vmoba_flex import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("block_masks", "vmoba_flex")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives, as ``python -m build`` makes them: the wheel out of the source archive.

    Built from a copy, since setuptools writes next to its sources, where another run may do the same.
    """
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("vmoba_flex-*-py3-none-any.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Metadata:
    """Validated: every field is what the standard allows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


@pytest.mark.xdist_group("package")
def test_one_wheel_holds_both_packages(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for top in PACKAGES for path in (ROOT / top).rglob("*.py")}
    expected |= {f"{top}/py.typed" for top in PACKAGES}
    expected |= {f"vmoba_flex/demo/{name}" for name in ("bunny.mp4", "model.safetensors", "CREDITS.md")}
    assert expected <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)


@pytest.mark.xdist_group("package")
def test_metadata_is_ready_to_publish(metadata: Metadata, wheel: Path):
    assert (metadata.name, str(metadata.version)) == ("vmoba-flex", __version__)
    assert metadata.author == "vmoba_flex contributors"
    assert metadata.license_expression == "BSD-3-Clause"
    assert metadata.license_files == ["LICENSE", "vmoba_flex/demo/CREDITS.md"]
    licences = {name.partition(".dist-info/licenses/")[2] for name in zipfile.ZipFile(wheel).namelist()} - {""}
    assert licences == set(metadata.license_files)
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    assert metadata.summary and len(metadata.summary) < 512
    assert str(metadata.requires_python) == ">=3.11"
    assert metadata.provides_extra == list(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )


@pytest.mark.xdist_group("package")
def test_extras_bring_what_their_parts_import(metadata: Metadata):
    brought = {extra: set() for extra in metadata.provides_extra or ()}
    for one in metadata.requires_dist or ():
        for extra, names in brought.items():
            if one.marker and one.marker.evaluate({"extra": extra}):
                names.add(one.name)
    assert brought["bench"] >= {"numpy", "pytest-benchmark", "xformers"}
    assert brought["insight"] >= {"matplotlib", "numpy", "safetensors"}
    assert brought["demo"] >= brought["insight"] | {"av", "tqdm"}
    assert [extra for extra, names in brought.items() if "xformers" in names] == ["bench"]


@pytest.mark.xdist_group("package")
def test_the_source_archive_holds_the_packages(built: Path):
    (archive,) = built.glob("vmoba_flex-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "vmoba_flex/demo/bunny.mp4", "block_masks/py.typed"} <= names


@pytest.mark.xdist_group("package")
def test_the_wheel_runs(wheel: Path, tmp_path: Path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = "import vmoba_flex; print(vmoba_flex.__file__); from vmoba_flex.cli import main; main(['--version'])"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.splitlines() == [str(tmp_path / "vmoba_flex" / "__init__.py"), f"vmoba-flex {__version__}"]
