"""Measures the rows of the benchmark over several GPUs, on one of its ranks."""

import dataclasses
import functools
import gc
import math
import os
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from distributed_report import HEADER, STEP, DistributedReport, line
from distributed_step import Step
from machine import error_text, print_trace, run_facts
from report import DEVICE_LOST, Row, is_wanted
from shapes import Sizes3
from timing import batches
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vmoba_flex import BlockPartition, Threshold, vmoba_attention
from vmoba_flex.collectives import Ranks
from vmoba_flex.distributed import TokenShards
from vmoba_flex.distributed.exchange import Heads, Layout, to_heads, to_tokens

RULE = Threshold(0.25, pool="head", max_density=0.25)
# What one GPU and several may differ by: kernels that add up a gradient in any order round it otherwise.
_ALLOWED = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}
PACKAGES = ("diffusers", "nvidia-nccl-cu13", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True)
class DistributedSizes:
    """The sizes of one run of the script.

    Attributes:
        dtype: of query, key and value.
        heads: of all GPUs.
        head_dim: D.
        grids: latent video sizes from small to large, with 48 windows through all frames.
        windows: along height and width.
    """

    dtype: torch.dtype
    heads: int
    head_dim: int
    grids: tuple[Sizes3, ...]
    windows: tuple[int, int]

    def partition(self, grid: Sizes3) -> BlockPartition:
        """The blocks of a row."""
        return BlockPartition.spatial(grid, (grid[1] // self.windows[0], grid[2] // self.windows[1]))


FULL = DistributedSizes(torch.bfloat16, 12, 128, ((24, 36, 64), (32, 48, 72), (48, 72, 64)), (6, 8))
SMALL = DistributedSizes(torch.float32, 4, 16, ((3, 12, 16), (4, 12, 16)), (3, 4))


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row to measure; ``model`` is ``STEP`` for a training step, and empty for attention alone."""

    attention: str
    grid: Sizes3
    gpus: int
    model: str = ""

    @property
    def tokens(self) -> int:
        """Of all GPUs."""
        return math.prod(self.grid)

    @property
    def id(self) -> str:
        """The same for the same measurement."""
        what = f"{self.model}, {self.attention}" if self.model else self.attention
        return f"{what} | {self.tokens} tokens | {self.gpus} GPUs"


def specs(sizes: DistributedSizes, gpus: list[int]) -> Iterator[Spec]:
    """All rows, the most urgent first."""
    few, *more = sizes.grids

    def rows(attention: str, grid: Sizes3, model: str = "") -> Iterator[Spec]:
        yield from (Spec(attention, grid, n, model) for n in gpus)

    yield from rows("packed", few)
    yield from rows("packed", more[0])
    yield from rows("packed", few, STEP)
    for grid in (few, more[0]):
        yield from rows("dense", grid)
    yield from rows("dense", few, STEP)
    for attention in ("packed", "dense"):
        for grid in more[1:]:
            yield from rows(attention, grid)
    for grid in (few, more[0]):
        yield from rows("shared", grid)
    # A step of the most tokens takes minutes on few GPUs.
    for attention in ("packed", "dense"):
        for grid in more[1:]:
            yield Spec(attention, grid, max(gpus), STEP)
    for attention in ("packed", "dense"):
        yield from rows(attention, more[0], STEP)


def rank_main(rank: int, size: int, args: Namespace, store: str, parent: int) -> None:
    """The life of one rank."""
    _end_with(parent)
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    # gloo carries what ranks tell one another between rows.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    limit = timedelta(seconds=2 * args.row_limit_s)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    bench = Bench(SMALL if args.small else FULL, args)
    try:
        if rank == 0:
            bench.lead(args)
        else:
            bench.follow()
    except Exception as error:
        print(f"rank {rank}: {error_text(error)}", file=sys.stderr, flush=True)
        print_trace()
        os._exit(DEVICE_LOST)  # others may wait for this rank: all are started again
    os._exit(0)  # a group whose ranks are at different points cannot be taken down in order


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Bench:
    """One rank's part in measuring."""

    def __init__(self, sizes: DistributedSizes, args: Namespace) -> None:
        self.sizes, self.device, self.small = sizes, args.device, args.small
        size, names = dist.get_world_size(), ("copies", "ring", "ulysses")
        # Fewer GPUs than all measure the same side by side: all are as warm, and none waits.
        self.meshes = {n: init_device_mesh(args.device, (size // n, 1, n), mesh_dim_names=names) for n in args.gpus}
        self.specs = {spec.id: spec for spec in specs(sizes, args.gpus)}

    def lead(self, args: Namespace) -> None:
        """Rank 0's: says which row is next, and keeps the file."""
        self.report = report = DistributedReport.load(args.output) if args.add else DistributedReport(args.output)
        run = report.start_run(run_facts(args.device, args.command, PACKAGES))
        print(HEADER, flush=True)
        wanted = [spec for spec in self.specs.values() if is_wanted(spec.id, args.only)]
        rows = (
            (self._describe(spec, run), functools.partial(self._measure_all, spec))
            for spec in wanted
            if not report.has(spec.id)
        )
        report.fill(rows, args.started + args.budget_s, line)
        _tell(None)

    def follow(self) -> None:
        """The other ranks': does what it is told."""
        while (name := _tell()) is not None:
            self.measure(self.specs[name])

    def _describe(self, spec: Spec, run: int) -> Row:
        return {
            "id": spec.id, "run": run, "status": "running", "attention": spec.attention, "model": spec.model,
            "tokens": spec.tokens, "grid": list(spec.grid), "gpus": spec.gpus, "heads": self.sizes.heads,
            "head_dim": self.sizes.head_dim, "bytes_each": self.sizes.dtype.itemsize, "rule": repr(RULE),
            "blocks": self.sizes.partition(spec.grid).num_blocks, "wall_s": 0.0,
        }  # fmt: skip

    def _measure_all(self, spec: Spec, row: Row) -> bool:
        began = time.monotonic()
        _tell(spec.id)
        try:
            row |= self.measure(spec)
        except Exception as error:
            row["status"], row["error"] = "failed", error_text(error)
            self.report.save()
            raise
        row["wall_s"] = time.monotonic() - began
        row["status"] = "ok" if row["difference"] <= _ALLOWED[self.sizes.dtype] else "wrong"
        return True

    def measure(self, spec: Spec) -> Row:
        """What all ranks came to."""
        mesh = self.meshes[spec.gpus]
        if spec.model == STEP:
            with Step(spec.attention, spec.grid, mesh, self.device, self.small) as step:
                facts = {"difference": agreed(step.difference, self.device)}
                step.step()
                facts["forward_backward_ms"] = milliseconds(step.step, self.device)
                facts["density"] = step.density()
        else:
            facts = Attention(spec, self.sizes, mesh["ulysses"], self.device).measure()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return facts


def _tell(name: str | None = None) -> str | None:
    """What rank 0 says next."""
    message = [name]
    dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    return message[0]


def agreed(value: float, device: str) -> float:
    """The largest over all ranks."""
    largest = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median time on the slowest rank of a call that has been made before; all ranks make as many."""
    estimate = agreed(batches(call, 1, 1, device)[0], device)
    if estimate > 2000:
        return estimate
    calls = min(20, math.ceil(30 / max(estimate, 1e-3))) if device == "cuda" else 1
    count = 1 if device == "cpu" else 9 if estimate < 200 else 3 if estimate < 500 else 1
    return agreed(median(batches(call, count, calls, device)), device)


class Attention:
    """One attention over the ranks of a group: what they exchange, what they compute, and the whole."""

    def __init__(self, spec: Spec, sizes: DistributedSizes, group: DeviceMesh, device: str) -> None:
        self.group, self.device, self.sizes = group, device, sizes
        self.partition, self.dispatch = sizes.partition(spec.grid), spec.attention
        self.size, self.rank = spec.gpus, group.get_local_rank()
        generator = torch.Generator(device).manual_seed(0)  # the same on all ranks
        shape = (1, sizes.heads, spec.tokens, sizes.head_dim)
        self.whole = [torch.randn(shape, generator=generator, device=device).to(sizes.dtype) for _ in range(4)]
        self.layout = Layout.of(Ranks.of(group), TokenShards(), self.partition)
        self.local = [x.tensor_split(self.size, 2)[self.rank].contiguous() for x in self.whole]

    def measure(self) -> Row:
        """The facts of a row."""
        facts: Row = {"difference": 0.0, "density": self._density()}
        if self.size > 1:
            facts["difference"] = agreed(self._difference(), self.device)
        whole = self.local if self.size > 1 else self.whole
        facts |= self._times("", lambda *x: self._attend(*x, group=self.group if self.size > 1 else None), whole)
        if self.size > 1:
            heads = Heads.evenly(self.sizes.heads, self.size).counts[0]
            alone = [x[:, :heads].contiguous() for x in self.whole]
            self.whole.clear()
            facts |= self._times("compute_", self._attend, alone)
            del alone
            facts |= self._times("exchange_", self._exchange, self.local)
        return facts

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, group: Any = None) -> Tensor:
        return vmoba_attention(query, key, value, self.partition, RULE, dispatch=self.dispatch, group=group)

    def _exchange(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = Heads.evenly(self.sizes.heads, self.size)
        query, key, value = to_heads((query, key, value), self.layout, (heads,) * 3)
        return _Join.apply(to_tokens(value, self.layout, heads), query, key)

    def _density(self) -> float:
        with torch.no_grad():
            query, key, value, _ = self.whole
            _, stats = vmoba_attention(
                query, key, value, self.partition, RULE, dispatch=self.dispatch, return_stats=True
            )
        return float(stats.density.mean())

    def _backward(self, call: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        output = call(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, tensors[3])

    def _difference(self) -> float:
        """This rank's output and gradients against one GPU's."""
        expected = self._backward(self._attend, self.whole)
        actual = self._backward(functools.partial(self._attend, group=self.group), self.local)
        worst = 0.0
        for x, y in zip(actual, expected, strict=True):
            y = y.tensor_split(self.size, 2)[self.rank]
            if not torch.equal(x, y):
                worst = max(worst, float((x.float() - y.float()).norm() / y.float().norm()))
        return worst

    def _times(self, name: str, call: Callable[..., Tensor], tensors: list[Tensor]) -> Row:
        def forward() -> None:
            with torch.no_grad():
                call(*tensors[:3])

        def forward_backward() -> None:
            self._backward(call, tensors)

        for _ in range(3):
            forward()
            forward_backward()
        return {
            f"forward_{name}ms": milliseconds(forward, self.device),
            f"forward_backward_{name}ms": milliseconds(forward_backward, self.device),
        }


class _Join(torch.autograd.Function):
    """Its first argument, with gradients of the others as large as they are: what the exchange back has to send."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *ctx.saved_tensors
