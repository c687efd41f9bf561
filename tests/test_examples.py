"""What the README tells its readers works as it stands, and a wheel holds what it should."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=["plain", "fast"])
def test_readme_examples_run(code):
    exec(code, {})


def test_readme_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


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
