"""What may import what, and what importing the package must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK_MASKS = sorted((ROOT / "block_masks").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file names in imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def kernels_of(path: Path) -> set[str]:
    """Modules of kernels are imported on their first use. Triton comes with torch where there is a GPU."""
    return {"triton", "flash_attn"} if path.name.endswith("_kernels.py") else set()


@pytest.mark.parametrize("path", BLOCK_MASKS, ids=lambda path: path.name)
def test_block_masks_imports_torch_alone(path):
    assert imported(path) <= {"torch", "block_masks"} | kernels_of(path)


def test_core_modules_import_block_masks_and_torch_alone():
    for path in (ROOT / "vmoba_flex").glob("*.py"):
        assert imported(path) <= {"torch", "block_masks", "vmoba_flex"} | kernels_of(path), path


def test_reference_imports_nothing_that_it_checks():
    assert imported(ROOT / "vmoba_flex" / "reference.py") == {"torch"}
    assert imported(ROOT / "tests" / "oracle_numpy.py") == {"numpy"}


@pytest.mark.parametrize("module", ["vmoba_flex", "vmoba_flex.cli"])
def test_importing_stays_light(module):
    heavy = ["diffusers", "matplotlib", "hypothesis", "av", "xformers"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
