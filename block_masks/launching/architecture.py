"""The architecture of a GPU: what kernels choose their tiles by."""

import functools
from typing import Literal

import torch

# NVIDIA's by compute capability: data centre and consumer parts of one generation differ in shared memory. AMD's by
# family: matrix cores of CDNA, wave instructions of RDNA.
Architecture = Literal["sm80", "sm86", "sm90", "sm100", "sm120", "cdna", "rdna"]


def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a device; ``"sm80"``, the least, for a CPU, on which Triton's interpreter runs kernels.

    Raises:
        ValueError: if it is a GPU that the kernels do not fit.
    """
    return (
        _of_gpu(torch.cuda.current_device() if device.index is None else device.index)
        if device.type == "cuda"
        else "sm80"
    )


@functools.cache
def _of_gpu(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return amd(properties.gcnArchName)
    return nvidia((properties.major, properties.minor), properties.name)


def nvidia(capability: tuple[int, int], name: str = "this GPU") -> Architecture:
    """The architecture with this compute capability; of later ones, the nearest that has no more shared memory."""
    major, minor = capability
    if major < 8:
        raise ValueError(
            f"device must have compute capability 8.0 (Ampere) or later for the Triton kernels, got {major}.{minor} "
            f"({name}): take dispatch='dense' there"
        )
    if major == 8:
        return "sm80" if minor in (0, 7) else "sm86"
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm120")


def amd(name: str) -> Architecture:
    """The architecture of a GPU by AMD's name of it, as in ``gfx942:sramecc+:xnack-``."""
    return "cdna" if name.startswith("gfx9") else "rdna"
