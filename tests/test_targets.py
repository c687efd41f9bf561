"""Each kernel compiles for each GPU, fits its shared memory and does not spill: needs Triton, no GPU, and minutes.

``make test-targets`` runs what is promised; ``python -m tests.target_kernels`` shows everything.
"""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from tests.target_kernels import TARGETS, Compiled, all_kernels, compile_attention, compile_plans

pytestmark = pytest.mark.targets

# What is promised, see docs/gpus.md. Elsewhere kernels may spill, or need too much.
PROMISED = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")


def failing(target: str, found: list[Compiled]) -> dict[str, str]:
    problems = {one.kernel: one.problem(TARGETS[target]) for one in found}
    return {kernel: problem for kernel, problem in problems.items() if problem}


# float16 has bfloat16's tiles.
@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 64), ("bfloat16", 128), ("float16", 128)])
@pytest.mark.parametrize("target", PROMISED)
def test_kernels_of_attention_fit_and_do_not_spill(target: str, dtype: str, dim: int):
    assert not failing(target, compile_attention(target, dtype, dim))


@pytest.mark.parametrize("target", PROMISED)
def test_other_kernels_fit_and_do_not_spill(target: str):
    found = failing(target, compile_plans(target))
    # With its longest pools: 112 bytes.
    assert found.keys() <= ({"short_pool.short_kernel"} if target == "sm100" else set()), found


@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_of_attention_fit_cdna(dim: int):
    assert not failing("gfx942", compile_attention("gfx942", "bfloat16", dim))


def test_each_kernel_is_compiled():
    compiled = compile_attention("sm80", "bfloat16", 64) + compile_plans("sm80")
    assert all_kernels() == {one.kernel for one in compiled}
