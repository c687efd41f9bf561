"""Whether FlashAttention-4 can be used here.

It is young: some of its versions gave wrong log-sum-exps, or wrong gradients at some head dims. So it is used only in
the version that was tried, and only after small problems on the same device, dtype and head dims have come out right,
forward, and backward where gradients are wanted.
"""

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks.attention.row_attention import Room, attend_rows
from block_masks.attention.slot_attention import attend_slots
from block_masks.launching.architecture import is_hopper
from block_masks.plans.moves import from_slots, to_slots
from block_masks.plans.slots import Slots, plan_slots

_LOG = logging.getLogger(__name__)

VERSION = "4.0.0b36"

T = TypeVar("T")
Ways = dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]

# The sizes of groups, and how many of their keys are there. Whole tiles take another way than cut ones.
_PROBLEMS = (([128, 384, 256], None), ([100, 300, 77], None), ([100, 300, 77], [100, 190, 0]))


def refusal(
    device: int, dtype: torch.dtype, head_dim: int, value_dim: int, of_slots: bool, backward: bool
) -> str | None:
    """Why FlashAttention-4 cannot run here, or None if it can.

    The first call for each combination of arguments runs small problems and reads their results back to the host. Each
    reason is logged once, as a warning if the right version is installed.

    Args:
        device: index of a CUDA device.
        dtype: of query, key and value.
        head_dim: of query and key.
        value_dim: of value.
        of_slots: whether it is asked for by ``attend_slots``, and not by ``attend_packed``.
        backward: whether gradients are wanted: most of FlashAttention-4's kernels are for them, and long to compile.
    """
    reason = _reason(device, dtype, head_dim, value_dim, of_slots, backward)
    if reason:
        _log(logging.WARNING if _version() == VERSION else logging.INFO, reason)
    return reason


@functools.cache
def _log(level: int, reason: str) -> None:
    _LOG.log(level, "attention does not run on FlashAttention-4: %s", reason)


def _reason(
    device: int, dtype: torch.dtype, head_dim: int, value_dim: int, of_slots: bool, backward: bool
) -> str | None:
    version = _version()
    if version is None:
        return "flash-attn-4 is not installed"
    if version != VERSION:
        return f"flash-attn-4 must be {VERSION}, found {version}"
    if not is_hopper(device):
        return f"the device must be a Hopper GPU, got {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype must be float16 or bfloat16, got {dtype}"
    if backward and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    error = _worst_error(device, dtype, head_dim, value_dim, of_slots, backward)
    if isinstance(error, str):
        return f"it failed on small problems ({error})"
    return None if error <= 2 else f"its error is {error:.1f} times that of other kernels on small problems"


@functools.cache
def _version() -> str | None:
    """What is installed; it takes a millisecond to find out."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _worst_error(
    device: int, dtype: torch.dtype, head_dim: int, value_dim: int, of_slots: bool, backward: bool
) -> float | str:
    """The largest ratio of its error to that of other kernels, over output and gradients; or what it raises."""
    generator = torch.Generator("cpu").manual_seed(0)
    problems = _PROBLEMS if dtype == torch.bfloat16 or not of_slots else _PROBLEMS[:1]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def ratios() -> list[float] | str:
        torch.cuda.set_device(device)  # of this thread
        found = []
        for sizes, there in problems:
            tokens = sum(sizes)
            group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
            group_lengths = None if there is None else torch.tensor([there], dtype=torch.int32, device=device)
            make = _slot_ways if of_slots else _packed_ways
            slots = plan_slots(group, sizes, sorted_keys=True)
            ways = make(group, slots, group_lengths, head_dim**-0.5, generator)
            inputs = random(2, tokens, head_dim), random(2, tokens, head_dim), random(2, tokens, value_dim)
            grad = random(2, tokens, value_dim)
            results = []
            for name, way in ways.items():
                leaves = [(x.float() if name == "exact" else x).detach().requires_grad_(backward) for x in inputs]
                try:
                    output = way(*leaves)
                    gradients = torch.autograd.grad(output, leaves, grad.to(output.dtype)) if backward else ()
                except Exception as error:  # a young library's kernels may fail in any way
                    if name != "flash":
                        raise
                    # Whatever stops it, on this device it cannot be used.
                    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
                results.append([x.detach().float() for x in (output, *gradients)])
            for exact, other, flash in zip(*results, strict=True):
                found.append(((flash - exact).norm() / (other - exact).norm()).item())
        return found

    found = undisturbed(ratios)
    if isinstance(found, str):
        return found
    return max(found) if all(ratio == ratio for ratio in found) else float("inf")


def undisturbed(call: Callable[[], T]) -> T:
    """Calls in a thread of its own, where nothing that the caller is in holds.

    The caller may be inside an op, where nothing is differentiated; in a checkpoint, which counts what is saved; in
    inference mode or autocast; or have set a default device.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _packed_ways(
    group: Tensor, slots: Slots, group_lengths: Tensor | None, scale: float, generator: torch.Generator
) -> Ways:
    """Attention of two heads whose queries chose groups each for itself."""
    selected = (torch.rand((2, len(group), len(slots.group_sizes)), generator=generator) < 0.6).to(group.device)
    if group_lengths is not None:
        selected, group_lengths = selected & (group_lengths > 0), group_lengths.expand(2, -1)

    def through(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend_rows(
                query, key, value, selected, slots,
                rooms=(Room(2, 42), Room(1, 21)), scale=scale, backend=backend, group_lengths=group_lengths,
            )[0]  # fmt: skip

        return attend

    return {"exact": through("eager"), "other": through("triton"), "flash": through("flash")}


def _slot_ways(
    group: Tensor, slots: Slots, group_lengths: Tensor | None, scale: float, generator: torch.Generator
) -> Ways:
    """Attention of two heads whose tiles of slots chose groups."""
    shape = (1, 2, len(slots.tile_group), len(slots.group_sizes))
    selected = torch.rand(shape, generator=generator).to(group.device) < 0.5
    selected[..., 0] = True
    mask = selected[0].index_select(1, slots.key_slot // slots.tile_size)[..., group]
    valid = None
    if group_lengths is not None:
        valid = slots.valid(group_lengths)
        mask = mask & valid.slots[0, slots.key_slot]

    def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = to_slots(query[None], slots), *(to_slots(x[None], slots, valid) for x in (key, value))
        output, _ = attend_slots(query, key, value, selected, slots, scale, group_lengths)
        return from_slots(output, slots)[0]

    masked = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, scale=scale)
    return {"exact": masked, "other": masked, "flash": flash}
