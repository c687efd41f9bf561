"""The launch settings of the kernels that attend, by architecture, width and dtype.

Hopper's were timed (bench/NOTES.md). The others are the largest of those tried that compile for their target, fit its
shared memory, and do not spill or spill least; ``tests/target_kernels.py`` compiles each. docs/gpus.md has the table.
"""

import dataclasses

import torch

from block_masks.launching.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Tile:
    """The settings of one kernel.

    Attributes:
        rows: queries, or packed rows, of a tile.
        keys: slots, or coarse keys, of a tile.
        warps: of a program.
        stages: of the pipeline that loads the tiles of a loop; 1 for none.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class AttendLaunch:
    """Settings of ``attend_kernels``.

    Attributes:
        forward: of the output of rows.
        query: of the gradient of rows.
        key: of the gradients of slots.
        descriptors: whether tiles are read through tensor memory descriptors.
    """

    forward: Tile
    query: Tile
    key: Tile
    descriptors: bool = False


@dataclasses.dataclass(frozen=True)
class CoarseLaunch:
    """Settings of ``coarse_kernels``.

    Attributes:
        merge: of coarse keys merged into an output.
        query: of the gradient of queries.
        key: of the gradients of coarse keys.
    """

    merge: Tile
    query: Tile
    key: Tile


_HOPPER = AttendLaunch(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), descriptors=True)
_HOPPER_WIDE = AttendLaunch(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
_HOPPER_FLOAT32 = AttendLaunch(Tile(64, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
_AMPERE = AttendLaunch(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2))
_AMPERE_WIDE = AttendLaunch(Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 4, 2))
_SMALL_FLOAT32 = AttendLaunch(Tile(32, 16, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
_CDNA = AttendLaunch(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
_CDNA_WIDE = AttendLaunch(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1))
_RDNA = AttendLaunch(Tile(64, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
_TINY = AttendLaunch(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))

# By architecture: 16 bits up to 128 dims and up to 256, float32 up to 128 and up to 256.
_ATTEND: dict[Architecture, tuple[AttendLaunch, AttendLaunch, AttendLaunch, AttendLaunch]] = {
    "sm80": (_AMPERE, _AMPERE_WIDE, _SMALL_FLOAT32, _TINY),
    "sm86": (_AMPERE, _AMPERE_WIDE, _SMALL_FLOAT32, _TINY),
    "sm90": (_HOPPER, _HOPPER_WIDE, _HOPPER_FLOAT32, _HOPPER_FLOAT32),
    "sm100": (_HOPPER, _HOPPER_WIDE, _SMALL_FLOAT32, _TINY),
    "sm120": (_AMPERE, _AMPERE_WIDE, _SMALL_FLOAT32, _TINY),
    "cdna": (_CDNA, _CDNA_WIDE, _HOPPER_FLOAT32, _TINY),
    "rdna": (_RDNA, _TINY, _TINY, _TINY),
}

_COARSE_HOPPER = CoarseLaunch(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 3))
_COARSE_HOPPER_WIDE = CoarseLaunch(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1))
_COARSE_FLOAT32 = CoarseLaunch(Tile(64, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
_COARSE_AMPERE = CoarseLaunch(Tile(64, 32, 4, 3), Tile(128, 32, 8, 2), Tile(32, 64, 4, 3))
_COARSE_WIDE = CoarseLaunch(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1))
_COARSE_SMALL_FLOAT32 = CoarseLaunch(Tile(32, 16, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
_COARSE_CDNA = CoarseLaunch(Tile(64, 32, 4, 3), Tile(128, 32, 8, 1), Tile(32, 64, 4, 2))
_COARSE_RDNA = CoarseLaunch(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 64, 8, 1))
_COARSE_TINY = CoarseLaunch(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
_COARSE: dict[Architecture, tuple[CoarseLaunch, CoarseLaunch, CoarseLaunch, CoarseLaunch]] = {
    "sm80": (_COARSE_AMPERE, _COARSE_WIDE, _COARSE_SMALL_FLOAT32, _COARSE_TINY),
    "sm86": (_COARSE_AMPERE, _COARSE_WIDE, _COARSE_SMALL_FLOAT32, _COARSE_TINY),
    "sm90": (_COARSE_HOPPER, _COARSE_HOPPER_WIDE, _COARSE_FLOAT32, _COARSE_FLOAT32),
    "sm100": (_COARSE_HOPPER, _COARSE_WIDE, _COARSE_SMALL_FLOAT32, _COARSE_TINY),
    "sm120": (_COARSE_AMPERE, _COARSE_WIDE, _COARSE_SMALL_FLOAT32, _COARSE_TINY),
    "cdna": (_COARSE_CDNA, _COARSE_HOPPER_WIDE, _COARSE_FLOAT32, _COARSE_TINY),
    "rdna": (_COARSE_RDNA, _COARSE_TINY, _COARSE_TINY, _COARSE_TINY),
}


def attend_launch(architecture: Architecture, width: int, dtype: torch.dtype) -> AttendLaunch:
    """Settings for the wider of head dim and value dim, as a power of two."""
    return _ATTEND[architecture][_column(width, dtype)]


def coarse_launch(architecture: Architecture, width: int, dtype: torch.dtype) -> CoarseLaunch:
    """Settings for the wider of head dim and value dim, as a power of two."""
    return _COARSE[architecture][_column(width, dtype)]


def _column(width: int, dtype: torch.dtype) -> int:
    return 2 * (dtype == torch.float32) + (width > 128)


def dot_precision(architecture: Architecture, dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 as three products of TF32 parts, where tensor cores have it."""
    return "tf32x3" if dtype == torch.float32 and architecture not in ("cdna", "rdna") else "ieee"
