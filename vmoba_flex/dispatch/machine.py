"""A GPU and its host -> what they take for attention, by which ``"auto"`` decides.

An H200's is built in, for every Hopper GPU. Any other GPU is measured, in a few hundred milliseconds, when it is first
asked for, and the result is kept in a file. ``vmoba-flex bench`` measures more, and writes that file for any GPU.
Nothing is measured while a graph is compiled or captured.
"""

import dataclasses
import functools
import importlib.metadata
import logging
import os
from pathlib import Path

import torch

from block_masks.launching.architecture import is_hopper
from block_masks.launching.constant import constant_when_compiled
from vmoba_flex.dispatch.machine_file import folder, read, write
from vmoba_flex.dispatch.machine_probe import probe

_LOG = logging.getLogger(__name__)

VARIABLE = "VMOBA_FLEX_MACHINE"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Times of a GPU and its host. Where there are two, they are of forward, and of forward + backward.

    Attributes:
        dense_rate: operations per second of the fastest full attention, forward, in 16 bits.
        backward: full attention's forward + backward takes so many times its forward.
        packed_share: ``"packed"`` takes the first number plus the second times the density, as a share of the time of
            full attention.
        tail_share: a tail adds this number times its cells per token to that share.
        launches: but ``"packed"`` takes at least these seconds, in which the host launches it.
        flash_from: seconds of full attention from which FlashAttention-4 gains more than its launches cost.
    """

    dense_rate: float
    backward: float
    packed_share: tuple[float, float]
    tail_share: tuple[float, float]
    launches: tuple[float, float]
    flash_from: tuple[float, float]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            count = 1 if field.type is float else 2
            numbers = (value,) if count == 1 else tuple(value) if isinstance(value, tuple | list) else ()
            if len(numbers) != count or not all(type(x) in (int, float) and 0 < x < float("inf") for x in numbers):
                raise ValueError(f"{field.name} must be {count} finite number(s) above 0, got {value!r}")
            object.__setattr__(self, field.name, value if count == 1 else numbers)


# Measured on an H200 or H100 (bench/NOTES.md).
HOPPER = Machine(6.5e14, 3.5, (0.12, 1.3), (2.75, 2.97), (3.5e-3, 8e-3), (10e-3, 18e-3))
# Seconds in which a host with HOPPER's launches launches one operation, by machine_probe.py: an assumption, which
# bench/attention/auto.py checks.
HOPPER_LAUNCH = 5e-6

_chosen: Machine | None = None
_known: dict[int, Machine] = {}


def use_machine(machine: Machine | str | Path | None) -> None:
    """Has ``dispatch="auto"`` and ``backend="auto"`` decide by a machine, on all GPUs of this process.

    The environment variable ``VMOBA_FLEX_MACHINE`` does the same, with a path or ``built-in``; this call goes first.
    Graphs that are compiled already keep what they decided by. Ranks that share a call must be given the same machine.

    Args:
        machine: a ``Machine``; a file that ``vmoba-flex bench`` wrote; ``"built-in"`` for an H200's, which forbids
            measuring and reading files; None for each GPU's own, as without this call.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the file is not one.
    """
    global _chosen
    if isinstance(machine, (str, Path)):
        machine = named(str(machine))
    elif not isinstance(machine, (Machine, type(None))):
        raise TypeError(f"machine must be a Machine, a str, a Path or None, got {type(machine).__name__}")
    _chosen = machine


def named(name: str) -> Machine:
    """The machine of a name: ``built-in``, or the path of a file.

    Raises:
        ValueError: if the file cannot be read.
    """
    if name == "built-in":
        return HOPPER
    try:
        return Machine(**read(Path(name))["machine"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"machine must be 'built-in' or a file that vmoba-flex bench wrote, got {name!r} ({error})"
        ) from error


def machine_of(device: torch.device, ranks: int = 1) -> Machine:
    """The machine that a call on ``device`` decides by.

    Args:
        device: of query.
        ranks: how many share the call. Several decide by what was chosen for the process, or by what is built in, since
            each would measure other times, and all must decide alike.
    """
    return _machine(device.index or 0, ranks > 1, torch.compiler.is_compiling())


@constant_when_compiled
def _machine(index: int, shared: bool, compiling: bool) -> Machine:
    if _chosen is not None:
        return _chosen
    if name := os.environ.get(VARIABLE):
        return _of_environment(name)
    if shared or torch.cuda.device_count() == 0:  # fake tensors may be on a GPU that is not there
        return HOPPER
    found = _known.get(index) or _of_file(index)
    if found is None and not compiling and not torch.cuda.is_current_stream_capturing():
        found = _measured(index)
    if found is None:
        _log_once(
            f"auto decides by an H200's times on {torch.cuda.get_device_name(index)}: nothing is measured while a "
            "graph is compiled or captured. Call vmoba_attention once before, or run vmoba-flex bench"
        )
        return HOPPER
    _known[index] = found
    return found


@functools.cache
def _of_environment(name: str) -> Machine:
    return named(name)


def path_of(index: int) -> Path:
    """Where the times of a GPU are kept, by its name and the versions of what they depend on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    words = f"{torch.cuda.get_device_name(index)} torch {torch.__version__} triton {triton}"
    return folder() / f"{''.join(c if c.isalnum() or c in '.+' else '_' for c in words)}.json"


def _of_file(index: int) -> Machine | None:
    path = path_of(index)
    try:
        return Machine(**read(path)["machine"])
    except FileNotFoundError:
        return HOPPER if is_hopper(index) else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log_once(f"{path} is ignored, for it cannot be read ({error})")
        return HOPPER if is_hopper(index) else None


def _measured(index: int) -> Machine:
    try:
        rate, launch = probe(torch.device("cuda", index))
    except RuntimeError as error:  # no memory left, say
        _log_once(f"auto decides by an H200's times on {torch.cuda.get_device_name(index)}: measuring failed ({error})")
        return HOPPER
    machine = scaled(rate, launch)
    path = path_of(index)
    _LOG.info("auto measured %s: %.3g operations per second, %.3g us a launch", path.stem, rate, 1e6 * launch)
    try:
        write(path, {"machine": dataclasses.asdict(machine), "dense_rate": rate, "launch_seconds": launch})
    except OSError as error:
        _log_once(f"{path} cannot be written ({error}): each process measures anew")
    return machine


def scaled(dense_rate: float, launch: float, machine: Machine = HOPPER) -> Machine:
    """A machine with other rates.

    Args:
        dense_rate: operations per second of full attention.
        launch: seconds in which the host launches one operation.
        machine: whose other times it has.
    """
    one, both = (seconds * launch / HOPPER_LAUNCH for seconds in machine.launches)
    return dataclasses.replace(machine, dense_rate=dense_rate, launches=(one, both))


@functools.cache
def _log_once(words: str) -> None:
    _LOG.warning("%s", words)
