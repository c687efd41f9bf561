"""Measures the rows, one after another, in one process on the same tensors."""

import contextlib
import dataclasses
import functools
import math
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from bench.attention.checks import ERROR_FACTOR, Inputs, attended_pairs, expected_selection
from bench.attention.peers import CPU_PEERS, PEERS, TILE_PEERS, Peer, why_missing
from bench.attention.report import HEADER, AttentionReport, line
from bench.attention.rows import Contenders, Spec, described, specs
from bench.attention.shapes import FULL, SMALL, Case, Sizes
from bench.attention.stages import kernel_milliseconds, stage_milliseconds
from bench.common.machine import error_text, free_memory, print_trace, run_facts
from bench.common.report import Row
from bench.common.timing import milliseconds, peak_bytes
from vmoba_flex import vmoba_attention
from vmoba_flex.call import BACKENDS, DISPATCHES, Backend, Dispatch


def work(args: Namespace) -> int:
    """Measures what ``args`` ask for, within their budget; returns the exit status."""
    started = time.monotonic()
    sizes = SMALL if args.small else FULL
    # Each shape and grad mode of dense FlexAttention is a kernel; with fullgraph, more than the limit is an error.
    torch.compiler.config.recompile_limit = 128  # pyright: ignore[reportAttributeAccessIssue]
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    if args.device == "cpu":
        torch.set_num_threads(1)  # small tensors, and not the only process
    report = AttentionReport.load(args.output) if args.add else AttentionReport(args.output)
    bench = Bench(sizes, args, report)
    facts = run_facts(args.device, args.command) | {
        "shape": f"batch 1, head dim {sizes.head_dim}, {str(sizes.dtype).removeprefix('torch.')}",
        "error_factor": bench.error_factor,
    }
    run = report.start_run(facts)

    def rows() -> Iterator[tuple[Row, Callable[[Row], bool]]]:
        # One at a time: the best backend follows from earlier rows.
        for spec in map(bench.resolve, specs(sizes, args.sections, bench.contenders)):
            if report.has(spec.id):
                row = report.rows[spec.id]
                row["sections"] = list(dict.fromkeys([*row["sections"], spec.section]))
            else:
                yield described(spec, sizes, run), functools.partial(bench.measure, spec)

    print(HEADER, flush=True)
    return report.fill(rows(), started + args.budget_s, line)


class Bench:
    """What rows share: the installed peers, and the inputs of the shape that was measured last."""

    def __init__(self, sizes: Sizes, args: Namespace, report: AttentionReport) -> None:
        self.sizes, self.device, self.report = sizes, args.device, report
        self.error_factor = args.error_factor or ERROR_FACTOR[sizes.dtype]
        self.peers = {name: peer for name, peer in _peers(self.device).items() if name in args.peers}
        checked = self.peers | TILE_PEERS
        self.missing = {name: why for name, peer in checked.items() if (why := why_missing(peer))}
        installed = [name for name in self.peers if name not in self.missing]
        fast = tuple(name for name in installed if self.peers[name].fast) or tuple(installed)
        self.contenders = Contenders(
            asked=tuple(self.peers),
            fast=fast,
            other=tuple(name for name in installed if name not in fast),
            tiles={name: peer.tile for name, peer in TILE_PEERS.items()},
            dispatches=tuple(name for name in DISPATCHES if name != "dense"),
            backends=tuple(name for name in BACKENDS if name != "auto") if self.device == "cuda" else ("auto",),
            compile=self.device == "cuda",
        )
        self.inputs: tuple[tuple[Any, ...], Inputs] | None = None

    def resolve(self, spec: Spec) -> Spec:
        """Names the backend where the spec asks for the best one."""
        if spec.backend != "best":
            return spec
        backend = self.report.fastest_backend(spec.attention, Case(self.sizes.grid, 1).tokens, self.sizes.heads[0])
        return dataclasses.replace(spec, backend=backend)

    def measure(self, spec: Spec, row: Row) -> bool:
        """Fills the row, with the error's text if it fails; returns whether the device still works."""
        began = time.monotonic()
        try:
            if spec.attention in self.missing:
                row["status"], row["error"] = "not installed", self.missing[spec.attention]
            else:
                self._measure(spec, row)
        except torch.OutOfMemoryError as error:
            row["status"], row["error"] = "out of memory", error_text(error)
        except Exception as error:
            ours = spec.attention not in self.peers and spec.attention not in TILE_PEERS
            refused = isinstance(error, (ValueError, NotImplementedError)) and ours
            row["status"], row["error"] = "unsupported" if refused else "failed", error_text(error)
            if not refused:
                print_trace()
        row["wall_s"] = time.monotonic() - began
        return row["status"] == "ok" or free_memory(self.device)

    def _measure(self, spec: Spec, row: Row) -> None:
        inputs = self._inputs_of(spec.case)
        tensors = [x.detach() for x in inputs.leaves]
        attend, context = self._attention(spec)

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(*tensors)

        def forward_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(*inputs.leaves), inputs.leaves, inputs.upstream)

        with context():
            if spec.stages:
                self._stages(row, forward, forward_backward)
                return
            selection = self._check(spec, row, inputs, forward)
            if row["status"] == "wrong":
                return
            size = inputs.upstream.numel() * inputs.upstream.element_size()
            self._time(row, "forward", forward, 1, size)
            try:
                gradients = forward_backward()
                if "main" in row["sections"]:
                    row["gradient_errors"] = self._gradient_errors(row, gradients, inputs, selection, spec)
                del gradients
                # The output and the gradients in query, key and value come on top of what was allocated before.
                self._time(row, "forward_backward", forward_backward, 4, size)
            except Exception as error:
                row["status"], row["error"] = "forward only", error_text(error)
                print_trace()
                return
        row["status"] = "ok"

    def _inputs_of(self, case: Case) -> Inputs:
        shape = case.grid, case.heads, case.inputs
        if self.inputs is None or self.inputs[0] != shape:
            self.inputs = None
            if self.device == "cuda":
                torch.compiler.reset()  # kernels of other shapes would count against the limit of them
            free_memory(self.device)
            self.inputs = shape, Inputs(case, self.sizes, self.device)
        return self.inputs[1]

    def _attention(self, spec: Spec) -> tuple[Callable[..., Any], Callable[[], Any]]:
        if spec.attention in self.peers:
            peer = self.peers[spec.attention]
            return peer.load(), peer.context
        partition, rule = spec.case.partition, spec.case.rule
        assert partition is not None  # a sparse case has both
        assert rule is not None
        if spec.attention in TILE_PEERS:
            return TILE_PEERS[spec.attention].load()(partition, rule), contextlib.nullcontext

        dispatch, backend = cast(Dispatch, spec.attention), cast(Backend, spec.backend)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return vmoba_attention(
                query, key, value, partition, rule, dispatch=dispatch, backend=backend, tail=spec.case.tail
            )

        if spec.compiled:
            return torch.compile(attend, fullgraph=True, dynamic=False), contextlib.nullcontext
        return attend, contextlib.nullcontext

    def _check(self, spec: Spec, row: Row, inputs: Inputs, forward: Callable[[], Tensor]) -> Tensor | None:
        """Sets the row's error and facts of its selection, and status "wrong" if the error is too large."""
        case, output = spec.case, forward()
        if output.shape != inputs.upstream.shape:
            raise RuntimeError(f"output has shape {tuple(output.shape)}, not {tuple(inputs.upstream.shape)}")
        row["key_pairs"] = float(case.heads * case.tokens**2)
        if case.partition is None:
            return self._judge(spec, row, inputs, output, None)
        selection = expected_selection("shared" if spec.attention in TILE_PEERS else spec.attention, inputs, case)
        row["density"], pairs = attended_pairs(selection, case)
        # "auto" may attend all keys where that is faster.
        if spec.attention == "auto" and inputs.error(output, None, case) < inputs.error(output, selection, case):
            row["check"] = "attends all keys"
            return self._judge(spec, row, inputs, output, None)
        row["key_pairs"] = pairs
        return self._judge(spec, row, inputs, output, selection)

    def _judge(self, spec: Spec, row: Row, inputs: Inputs, output: Tensor, selection: Tensor | None) -> Tensor | None:
        error = inputs.error(output, selection, spec.case, flips=spec.compiled)
        if not math.isfinite(error):
            row["status"], row["error"] = "wrong", f"the output's error is {error}"
            return selection
        row["output_error"] = error
        try:
            budget = inputs.flex_error(spec.case)
        except Exception as failure:
            row["check"] = "no budget"
            print(f"FlexAttention gives no budget: {error_text(failure)}", file=sys.stderr)
            return selection
        row["error_ratio"] = row["output_error"] / budget
        if row["error_ratio"] > self.error_factor:
            row["status"] = "wrong"
            row["error"] = f"error {row['output_error']:.3g} is over {self.error_factor} x {budget:.3g}"
        return selection

    def _gradient_errors(
        self, row: Row, gradients: tuple[Tensor, ...], inputs: Inputs, selection: Tensor | None, spec: Spec
    ) -> list[float] | None:
        try:
            return inputs.gradient_errors(gradients, selection, spec.case, spec.attention)
        except torch.OutOfMemoryError as error:
            row["check"] = f"gradients unchecked: {error_text(error)}"
            return None

    def _time(self, row: Row, mode: str, call: Callable[[], Any], results: int, size: int) -> None:
        peak = peak_bytes(call, self.device)
        if peak is not None:
            row[f"{mode}_extra_gb"] = (peak - results * size) / 1e9
        row[f"{mode}_ms"] = milliseconds(call, self.device)

    def _stages(self, row: Row, forward: Callable[[], Any], forward_backward: Callable[[], Any]) -> None:
        row["stages"] = {}
        for mode, call in (("forward", forward), ("forward_backward", forward_backward)):
            call()
            repeats = 5 if self.device == "cuda" else 1
            row["stages"][mode] = {"elapsed_ms": stage_milliseconds(call, self.device, repeats)}
            row["status"] = "ok"
            try:
                row["stages"][mode] |= kernel_milliseconds(call, self.device)
            except Exception as error:  # a machine may not let its GPU be profiled
                row["error"] = f"no profile: {error_text(error)}"


def _peers(device: str) -> dict[str, Peer]:
    return PEERS if device == "cuda" else CPU_PEERS
