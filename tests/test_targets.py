"""Each kernel compiles for each GPU, fits its shared memory and does not spill: needs Triton, no GPU, and minutes.

``make test-targets`` runs this. What a case may fail at is named below; ``tests/target_kernels.py`` shows it in full.
"""

import importlib
import importlib.util
import itertools
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from tests.target_kernels import TARGETS, Compiled, compile_attention, compile_plans, name_of

pytestmark = pytest.mark.targets

ROOT = Path(__file__).parent.parent

# By target, dtype and head dim: kernels that do not fit, or spill. No other may.
KNOWN: dict[tuple[str, str, int], set[str]] = {}


def failing(target: str, found: list[Compiled]) -> dict[str, str]:
    problems = {one.kernel: one.problem(TARGETS[target]) for one in found}
    return {kernel: problem for kernel, problem in problems.items() if problem}


# float16 has bfloat16's tiles, and both dims up to 128 have the same ones.
@pytest.mark.parametrize(
    ("dtype", "dim"), [("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float16", 128), ("float32", 128)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_attention_fit(target: str, dtype: str, dim: int):
    found = failing(target, compile_attention(target, dtype, dim))
    assert found.keys() <= KNOWN.get((target, dtype, dim), set()), found


@pytest.mark.parametrize("target", TARGETS)
def test_other_kernels_fit(target: str):
    assert not failing(target, compile_plans(target))


def test_nothing_fails_where_it_must_not():
    promised = itertools.product(("sm80", "sm86", "sm89", "sm90", "sm100", "sm120"), ("bfloat16", "float16"), (64, 128))
    assert not KNOWN.keys() & set(promised)


def test_each_kernel_is_compiled():
    from triton.runtime.jit import JITFunction

    from block_masks.launching.launch import QuickLaunch

    modules = [
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for package in ("block_masks", "vmoba_flex")
        for path in (ROOT / package).rglob("*_kernels.py")
    ]
    functions = [getattr(x, "kernel", x) for module in modules for x in vars(module).values()
                 if isinstance(x, (QuickLaunch, JITFunction))]  # fmt: skip
    kernels = {name_of(function) for function in functions if function.__name__.endswith("kernel")}
    compiled = compile_attention("sm80", "bfloat16", 64) + compile_plans("sm80")
    assert kernels == {one.kernel for one in compiled}
