"""The architecture of a GPU: what kernels choose their tiles by."""

import functools
from typing import Literal

import torch

from block_masks.launching.constant import constant_when_compiled

# NVIDIA's by compute capability: data centre and consumer parts of one generation differ in shared memory. AMD's by
# family: matrix cores of CDNA, wave instructions of RDNA.
Architecture = Literal["sm80", "sm86", "sm90", "sm100", "sm120", "cdna", "rdna"]


def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a device; ``"sm80"``, the least, for a CPU, on which Triton's interpreter runs kernels.

    Raises:
        ValueError: if it is a GPU that the kernels do not fit.
    """
    if device.type != "cuda":
        return "sm80"
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_gpu(index: int) -> Architecture:
    if torch.version.hip:
        return amd(torch.cuda.get_device_properties(index).gcnArchName)
    if reason := refusal(index):
        raise ValueError(reason)
    return nvidia(*torch.cuda.get_device_capability(index))


def nvidia(major: int, minor: int) -> Architecture:
    """The architecture with a compute capability of at least 8.0; of unknown ones, the nearest that is no larger."""
    if major == 8:
        return "sm80" if minor in (0, 7) else "sm86"
    if major == 9:
        return "sm90"
    return "sm100" if major in (10, 11) else "sm120"


def amd(name: str) -> Architecture:
    """The architecture of a GPU by AMD's name of it, as in ``gfx942:sramecc+:xnack-``."""
    return "cdna" if name.startswith("gfx9") else "rdna"


@constant_when_compiled
def refusal(index: int) -> str | None:
    """Why the Triton kernels do not run on a GPU; None if they do."""
    if torch.version.hip or torch.cuda.device_count() == 0:  # fake tensors may be on a GPU that is not there
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    return (
        "the device must have compute capability 8.0 (Ampere) or later, unless dispatch='dense', "
        f"got {torch.cuda.get_device_name(index)} with {major}.{minor}"
    )


def is_hopper(index: int) -> bool:
    """Whether a GPU is NVIDIA's Hopper. AMD's have capabilities too, which mean something else."""
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9
