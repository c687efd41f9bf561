"""What may import what, how long a module may be, and what importing the package must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from setuptools import find_packages

import vmoba_flex
from block_masks.launching.constant import constant_when_compiled

ROOT = Path(__file__).parent.parent
PACKAGES = ("block_masks", "vmoba_flex")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 250

# Modules and folders in the order in which data flows: each imports only what stands before it. A package's own name
# stands for its __init__.py.
ORDER = {
    "block_masks": ["checks", "precision", "launching", "plans", "masks", "attention", "block_masks"],
    "vmoba_flex": [
        *("reference_gates", "reference_selection", "reference", "version", "user_error", "told"),
        *("checks", "reorder", "axis", "block_order", "partition", "approx_blocks", "tail", "cell_kernels", "cells"),
        *("cell_slot_kernels", "cell_slots", "rules", "warmup"),
        *("part", "pieces", "groups", "inputs", "collectives"),
        *("selection", "call", "mask", "flex_inputs", "stats", "dispatch", "distributed", "attention"),
        *("paper", "dense_schedule", "by_steps", "remember", "presets", "layer"),
        *("config_fields", "config_json", "config"),
        *("module", "models", "hosts", "insight", "fidelity", "tuning", "vmoba_flex"),
        *("demo", "arguments", "load_pipeline", "compare_command", "tune_command", "cli"),
    ],
}


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """What a file imports, by dotted name: also inside functions and for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # A module of ours that is imported from its folder, or something of the folder's __init__.py.
            yield from (name if name in NAMES else node.module for name in names)


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, but for Python's own."""
    return {name.partition(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)


def kernels_of(path: Path) -> set[str]:
    """Modules of kernels are imported on their first use. Triton comes with torch where there is a GPU."""
    return {"triton", "flash_attn"} if path.name.endswith("_kernels.py") else set()


def place(name: str) -> tuple[str, str]:
    """The package that a module is in, and the entry of its order."""
    package, _, rest = name.partition(".")
    return package, rest.partition(".")[0] or package


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_against_the_way_of_the_data_only(path: Path):
    package, entry = place(name_of(path))
    for name in imports(path):
        if place(name)[0] == package and place(name)[1] != entry:
            assert ORDER[package].index(place(name)[1]) < ORDER[package].index(entry), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_order_names_each_module_and_folder(package: str):
    assert sorted(ORDER[package]) == sorted({place(name)[1] for name in NAMES if place(name)[0] == package})


def test_no_folder_imports_in_a_circle():
    within = {
        name: {other for other in imports(path) if other in NAMES and place(other) == place(name)}
        for name, path in NAMES.items()
    }
    while free := [name for name, needs in within.items() if not needs & within.keys()]:
        for name in free:
            del within[name]
    assert not within


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).startswith("block_masks")], ids=name_of)
def test_block_masks_imports_torch_only(path: Path):
    assert imported(path) <= {"torch", "block_masks"} | kernels_of(path)


# What needs more than torch: models of diffusers, hosts, and the extras.
OTHERS = {
    "hosts": {"fastvideo", "vllm_omni"},
    "models": {"diffusers"},
    "insight": {"matplotlib", "numpy", "safetensors"},
    "demo": {"av", "matplotlib", "numpy", "safetensors", "tqdm"},
    "load_pipeline": {"av", "diffusers"},
    "compare_command": {"av"},
    "fidelity": {"av", "matplotlib", "numpy", "safetensors", "torchmetrics", "tqdm"},
    "tuning": {"matplotlib"},
}


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).startswith("vmoba_flex")], ids=name_of)
def test_vmoba_flex_imports_block_masks_and_torch_only(path: Path):
    others = OTHERS.get(place(name_of(path))[1], set())
    assert imported(path) <= {"torch", "block_masks", "vmoba_flex"} | kernels_of(path) | others


def test_reference_imports_nothing_that_it_checks():
    assert imported(ROOT / "vmoba_flex" / "reference_gates.py") == {"torch"}
    own = {"vmoba_flex.reference_gates", "vmoba_flex.reference_selection"}
    for name in ("reference_selection", "reference"):
        assert set(imports(ROOT / "vmoba_flex" / f"{name}.py")) <= {"math", "typing", "torch"} | own
    assert imported(ROOT / "tests" / "oracle_numpy.py") == {"numpy"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_can_be_read_at_once(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_the_wheel_holds_every_folder():
    found = find_packages(str(ROOT), include=[f"{package}*" for package in PACKAGES])
    assert sorted(found) == sorted({name_of(path.parent / "__init__.py") for path in MODULES})


@pytest.mark.parametrize("module", ["vmoba_flex", "vmoba_flex.cli"])
def test_importing_stays_light(module):
    heavy = ["diffusers", "matplotlib", "hypothesis", "av", "xformers"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def python(code: str) -> str:
    """What a new interpreter prints that runs ``code``."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_a_name_loads_its_module_when_it_is_used():
    modules = "[m in sys.modules for m in ('torch', 'torch._dynamo')]"
    code = f"import sys, vmoba_flex; print({modules}); from vmoba_flex import *; print({modules})"
    assert python(code).splitlines() == ["[False, False]", "[True, False]"]


@pytest.mark.parametrize("module", ["distributed", "insight", "demo.show"])
def test_no_module_loads_the_compiler(module: str):
    assert python(f"import sys, vmoba_flex.{module}; print('torch._dynamo' in sys.modules)").strip() == "False"


def test_importing_takes_hardly_longer_than_torch():
    """The least processor seconds of some runs, taken in turns; the first ones, which fill caches, are not counted."""

    def seconds(code: str) -> float:
        return float(python(f"import time; start = time.process_time(); {code}; print(time.process_time() - start)"))

    runs = ("import torch", "import torch, vmoba_flex", "from vmoba_flex import *")
    times = [[seconds(code) for code in runs] for _ in range(6)][1:]
    torch_only, package, every_name = map(min, zip(*times, strict=True))
    assert package < 1.1 * torch_only
    assert every_name < 1.5 * torch_only  # registers ops, a seventh; loading the compiler doubles it


def test_names_are_those_of_their_modules():
    assert dir(vmoba_flex) == sorted(vmoba_flex.__all__)
    assert set(vmoba_flex._MODULES) | {"__version__"} == set(vmoba_flex.__all__)
    for name in vmoba_flex._MODULES:
        assert getattr(vmoba_flex, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'vmoba_flex' has no attribute 'attend'"):
        _ = vmoba_flex.attend
    with pytest.raises(ImportError, match="cannot import name 'attend'"):
        from vmoba_flex import attend  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_each_name_at_its_module():
    tree = ast.parse((ROOT / "vmoba_flex" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: (node.module or "").removeprefix("vmoba_flex.") for node in imports for alias in node.names}
    assert seen == vmoba_flex._MODULES


def test_the_old_name_of_approx_blocks_warns():
    with pytest.warns(DeprecationWarning, match="AboutBlocks is now ApproxBlocks"):
        assert vmoba_flex.AboutBlocks is vmoba_flex.ApproxBlocks  # pyright: ignore[reportAttributeAccessIssue]


def test_constants_are_marked_as_torch_marks_them():
    def ours() -> None: ...
    def theirs() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert constant_when_compiled(ours) is ours
    assert vars(ours) == vars(theirs) != {}


def test_a_name_may_be_used_for_the_first_time_in_a_graph():
    code = """
import torch, vmoba_flex
def plan(x):
    partition = vmoba_flex.VMoBAConfig.paper("training").partition("spatial", (2, 4, 4))
    return vmoba_flex.vmoba_selection(x, x, partition, vmoba_flex.TopK(2))
print(torch.compile(plan, fullgraph=True, backend="eager")(torch.ones(1, 1, 32, 8)).sum().item())
"""
    assert python(code).strip() == "64"
