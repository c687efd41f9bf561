"""The Triton kernels, on the CPU: where Triton is installed, its interpreter runs them without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("script", ["run_selection_kernels", "run_row_kernels"])
def test_interpreted_kernels_equal_their_eager_forms(script):
    result = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-m", f"tests.{script}"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stderr
