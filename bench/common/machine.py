"""The machine: facts for the results, errors as text, and whether the device still works after one."""

import datetime
import gc
import importlib.metadata
import platform
import re
import sys
import traceback
from typing import Any

import torch

# Distributions whose versions a table must state.
DISTRIBUTIONS = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "xformers", "vmoba-flex")


def run_facts(device: str, command: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Date, device, versions (also of ``packages``), and the command to repeat the run."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "versions": versions(packages),
        "command": command,
    }


def error_text(error: BaseException) -> str:
    """An error in one line, without the folders of the machine."""
    text = f"{type(error).__name__}: {error}".strip()
    return re.sub(r"(?:/[\w.+-]+)+/", "", " ".join(text.split()))[:400]


def print_trace() -> None:
    """Prints the end of the current exception's trace."""
    print(traceback.format_exc()[-1500:], file=sys.stderr)


def free_memory(device: str) -> bool:
    """Frees what nobody holds any more; returns whether the device still works."""
    if device != "cuda":
        return True
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the GPU no longer answers: {error_text(error)}", file=sys.stderr)
        return False
    return True


def versions(others: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of those of ``DISTRIBUTIONS`` and ``others`` that are installed."""
    found = {}
    for name in (*DISTRIBUTIONS, *others):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": str(torch.__version__)}
