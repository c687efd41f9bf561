"""One rank: measures the rows together with the others."""

import functools
import gc
import os
import sys
import threading
import time
import warnings
from argparse import Namespace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.common.machine import error_text, print_trace, run_facts
from bench.common.report import DEVICE_LOST, Row, is_wanted
from bench.distributed.calls import Attention, agreed, milliseconds
from bench.distributed.report import HEADER, STEP, DistributedReport, line
from bench.distributed.rows import FULL, SMALL, DistributedSizes, Spec, specs
from bench.distributed.step import Step

# What one GPU and several may differ by: kernels that add up a gradient in any order round it differently.
_ALLOWED = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}
PACKAGES = ("diffusers", "nvidia-nccl-cu13", "nvidia-cudnn-cu13")


def rank_main(rank: int, size: int, args: Namespace, store: str, parent: int) -> None:
    """One rank, from start to end."""
    _end_with(parent)
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    # gloo carries the messages between rows.
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
        os._exit(DEVICE_LOST)  # other ranks may wait for this one: all are started again
    os._exit(0)  # ranks at different points cannot take a group down in order


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone."""

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
        # Rows on fewer GPUs run on all of them in parallel: all stay warm, and none waits.
        self.meshes = {n: init_device_mesh(args.device, (size // n, 1, n), mesh_dim_names=names) for n in args.gpus}
        self.specs = {spec.id: spec for spec in specs(sizes, args.gpus)}

    def lead(self, args: Namespace) -> None:
        """Rank 0: says which row is next, and keeps the file."""
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
        """The other ranks: measure what rank 0 says."""
        while (name := _tell()) is not None:
            self.measure(self.specs[name])

    def _describe(self, spec: Spec, run: int) -> Row:
        return {
            "id": spec.id, "run": run, "status": "running", "attention": spec.attention, "model": spec.model,
            "tokens": spec.tokens, "grid": list(spec.grid), "gpus": spec.gpus, "heads": self.sizes.heads,
            "head_dim": self.sizes.head_dim, "bytes_each": self.sizes.dtype.itemsize, "rule": repr(spec.rule),
            "tail": spec.tail,
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
        """The facts of a row, the same on all ranks."""
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
    """The name of the next row, which rank 0 passes; None at the end."""
    message = [name]
    dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    return message[0]
