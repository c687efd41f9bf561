"""Compiles the Triton kernels for GPUs that are not here, as their launchers launch them, and shows what they take.

python -m tests.target_kernels                                # all targets, dtypes and head dims: half an hour
python -m tests.target_kernels --targets sm80 --dims 128      # some
python -m tests.target_kernels --all                          # also the kernels that fit

It needs Triton and no GPU. ``test_targets.py`` holds the kernels to it.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from block_masks import plan_slots
from block_masks.attention import coarse_kernels, coarse_steps, padding_kernels
from block_masks.attention.row_attention import Room, attend_rows
from block_masks.launching import architecture
from block_masks.launching.launch import QuickLaunch
from block_masks.masks import list_kernels
from block_masks.plans import plan_kernels
from block_masks.plans.rows import _plan_on_gpu
from vmoba_flex import BlockPartition, cell_kernels, cell_slot_kernels
from vmoba_flex.groups import block_slots
from vmoba_flex.selection import (
    cell_gate_kernels,
    exact_kernels,
    gate_kernels,
    long_pool_kernels,
    short_pool_kernels,
)
from vmoba_flex.selection.select import SHORT
from vmoba_flex.selection.weights import Targets
from vmoba_flex.tail import Cells


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        triton: as Triton names it.
        architecture: as we do.
        shared: bytes of shared memory that a block may take.
    """

    triton: GPUTarget
    architecture: architecture.Architecture
    shared: int


# Bytes of a thread's registers that may be spilled: as many as are spilled before a loop, and loaded after it.
MAX_SPILLED = 64

PARTITION = BlockPartition((6, 10, 10), (2, 5, 5))

TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), "sm80", 163 * 1024),
    "sm86": Target(GPUTarget("cuda", 86, 32), "sm86", 99 * 1024),
    "sm89": Target(GPUTarget("cuda", 89, 32), "sm86", 99 * 1024),
    "sm90": Target(GPUTarget("cuda", 90, 32), "sm90", 227 * 1024),
    "sm100": Target(GPUTarget("cuda", 100, 32), "sm100", 227 * 1024),
    "sm120": Target(GPUTarget("cuda", 120, 32), "sm120", 99 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "cdna", 64 * 1024),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), "rdna", 64 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel takes.

    Attributes:
        kernel: its module and name.
        shared: bytes of shared memory.
        registers: of a thread.
        spilled: bytes of a thread that its registers do not hold.
        error: why it does not compile; empty if it does.
    """

    kernel: str
    shared: int = 0
    registers: int = 0
    spilled: int = 0
    error: str = ""

    def problem(self, target: Target) -> str:
        """What keeps it from running well on a target; empty if nothing does."""
        if self.error:
            return self.error
        words = [f"needs {self.shared / 1024:.1f} KB of {target.shared // 1024}"] * (self.shared > target.shared)
        words += [f"spills {self.spilled} B"] * (self.spilled > MAX_SPILLED)
        return ", ".join(words)


class _Driver:
    """Stands for a GPU of each target; a kernel that it compiled is never launched."""

    def __init__(self, name: str) -> None:
        self.target = TARGETS[name].triton
        self.index = list(TARGETS).index(name)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def compiling(name: str) -> Iterator[list[Compiled]]:
    """Compiles for a target what is launched inside, and does not run it: outputs hold anything."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        kernel = name_of(self)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                binary = run(self, *args, grid=grid, warmup=True, **options)
            except Exception as error:  # whatever stops a compiler
                words = str(error).strip().splitlines() or [""]
                found.append(Compiled(kernel, error=f"{type(error).__name__}: {words[0]}"[:100]))
                return
        compiled = Compiled(kernel, binary.metadata.shared, *_registers(binary.asm))
        if compiled not in found:
            found.append(compiled)

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(architecture, "architecture_of", return_value=TARGETS[name].architecture),
        mock.patch.object(driver, "_active", _Driver(name)),
    ):
        yield found


def name_of(kernel: Any) -> str:
    """The module and name of a kernel, without what all have in common."""
    return f"{kernel.__module__.rpartition('.')[2].removesuffix('_kernels')}.{kernel.__name__.strip('_')}"


def all_kernels() -> set[str]:
    """The names of all kernels of both packages."""
    root = Path(__file__).parent.parent
    names = set()
    for path in (path for package in ("block_masks", "vmoba_flex") for path in (root / package).rglob("*_kernels.py")):
        module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
        functions = [x.kernel if isinstance(x, QuickLaunch) else x for x in vars(module).values()]
        kernels = (x for x in functions if isinstance(x, JITFunction) and x.__name__.endswith("kernel"))
        names |= {name_of(kernel) for kernel in kernels}
    return names


def _registers(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, where spilled values go."""
    if "amdgcn" in asm:
        numbers = {key: int(n) for key, n in re.findall(r"\.(\w+): +(\d+)", asm["amdgcn"])}
        return numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", words)
    return int(registers), int(stack)


def launch_attention(dtype: torch.dtype, dim: int) -> None:
    """Rows, slots, coarse keys, cells and gates: what depends on dtype and head dim."""
    selected = torch.rand(2, 300, 2) < 0.5
    slots = plan_slots(torch.arange(300) // 150, [150, 150])
    query, key, value = (torch.zeros(2, 300, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    lse = torch.zeros(2, 300)
    rooms = Room(2, 24), Room(1, 12)
    output, _ = attend_rows(query, key, value, selected, slots, rooms=rooms, scale=1.0, backend="triton")
    output.backward(torch.zeros_like(output))
    query, key, value = (x.detach() for x in (query, key, value))
    coarse = coarse_steps.CoarseKeys(key[:, :70], value[:, :70], torch.zeros(70), torch.arange(70) // 35)
    coarse_kernels.merge_coarse(query, coarse, selected, query, lse, (query, lse), 1.0)
    coarse_kernels.coarse_backward(query, coarse, selected, query, lse, lse, query, 1.0)
    coarse_kernels.split_grad(query, query, lse, lse, lse)
    if dtype != torch.float32:  # padding is of FlashAttention-4's
        padding = torch.zeros(1, 2, dtype=torch.int32)
        padding_kernels.padding_lse(query[None], key[None, :, :2], padding, selected[None], 1.0, 1)
        padding_kernels.remove_padding(query, lse, lse)
    tokens = torch.zeros(1, 2, PARTITION.num_tokens, dim, dtype=dtype)
    cells = Cells(PARTITION, (1, 2, 3))
    cell_kernels.cell_means(tokens, cells)
    means = torch.zeros(1, 2, cells.total, dim, dtype=dtype)
    cell_kernels.cell_means_backward(means, cells)
    of_blocks = block_slots(PARTITION, tokens.device)
    index = of_blocks.slot_key, of_blocks.key_slot
    moved = cell_slot_kernels.slots_and_means(tokens, tokens, *index, cells)
    cell_slot_kernels.slots_and_means_backward((moved[0], moved[1]), (means, means), index[1], cells)
    stats = cell_gate_kernels.cell_stats(tokens, cells)
    gate_kernels.block_means(tokens, PARTITION)
    exact_kernels.group_lse(tokens, tokens, PARTITION, 0, PARTITION.num_tokens, 1.0, PARTITION.num_blocks)
    if dtype != torch.float32:  # which takes plain PyTorch
        gate_kernels.gate(tokens, tokens, PARTITION, 0, PARTITION.num_tokens)
        for spread in (False, True):
            cell_gate_kernels.cell_scores(tokens, stats, PARTITION.num_blocks, 0, PARTITION.num_tokens, spread)


def launch_plans() -> None:
    """Plans, lists and selections, whose kernels are the same for all dtypes and head dims."""
    selected, key_group = torch.rand(2, 300, 2) < 0.5, torch.arange(300) // 150
    _plan_on_gpu(selected, 24, 2, 128)
    plan_kernels.place_keys(key_group, 2, 4, 128)
    list_kernels.list_tiles(selected)
    cell_kernels.cell_groups(Cells(PARTITION, (1, 2, 3)), torch.device("cpu"))
    pools = torch.zeros(2, 20_000), torch.zeros(1, 20_000, dtype=torch.bool)
    for targets in (Targets(4, None, True), Targets(None, 0.25, True), Targets(4, 0.25, False)):
        for length in (12, 72, SHORT):
            of_queries = torch.zeros(2, 300, length), torch.zeros(300, length, dtype=torch.bool)
            short_pool_kernels.take_short(*of_queries, targets)
        long_pool_kernels.take_long(*pools, targets)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIMS = (64, 128, 256)


def compile_attention(target: str, dtype: str, dim: int) -> list[Compiled]:
    """The kernels that depend on dtype and head dim."""
    with compiling(target) as found:
        launch_attention(DTYPES[dtype], dim)
    return found


def compile_plans(target: str) -> list[Compiled]:
    """The other kernels."""
    with compiling(target) as found:
        launch_plans()
    return found


def main() -> None:
    """Writes a table in Markdown: what does not fit, or everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=DIMS)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    write = sys.stdout.write
    write(f"torch {torch.__version__}, Triton {triton.__version__}\n\n")
    write("| target | dtype | head dim | kernel | shared KB | registers | spilled B | problem |\n" + "|---" * 8 + "|\n")
    for name in arguments.targets:
        cases = [*itertools.product(arguments.dtypes, arguments.dims), ("all", 0)]
        for dtype, dim in cases:
            found = compile_plans(name) if dtype == "all" else compile_attention(name, dtype, dim)
            wrong = [(one, one.problem(TARGETS[name])) for one in found]
            if not arguments.all:
                largest = max(found, key=lambda one: one.shared)
                fits = f"| {name} | {dtype} | {dim} | {len(found)} kernels | {largest.shared / 1024:.0f} | | | |\n"
                wrong = [(one, problem) for one, problem in wrong if problem]
                write(fits if not wrong else "")
            for one, problem in wrong:
                numbers = f"{one.shared / 1024:.1f} | {one.registers} | {one.spilled}"
                write(f"| {name} | {dtype} | {dim} | {one.kernel} | {numbers} | {problem} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
