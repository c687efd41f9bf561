"""The machine: what results state of it, what they state of errors, and whether it still works after one."""

import datetime
import gc
import platform
import re
import sys
import traceback
from typing import Any

import torch
from peers import versions


def run_facts(device: str, command: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Date, device, versions, among them those of ``packages``, and the command to repeat the run."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "versions": versions(packages),
        "command": command,
    }


def error_text(error: BaseException) -> str:
    """An error in one line, without the folders of whoever ran into it."""
    text = f"{type(error).__name__}: {error}".strip()
    return re.sub(r"(?:/[\w.+-]+)+/", "", " ".join(text.split()))[:400]


def print_trace() -> None:
    """The end of the trace of the exception at hand."""
    print(traceback.format_exc()[-1500:], file=sys.stderr)


def free_memory(device: str) -> bool:
    """Frees what nobody holds any more; whether the device still works."""
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
