"""Measures the rows of the end-to-end benchmark, one after another, in one process."""

import contextlib
import dataclasses
import functools
import sys
import time
import warnings
from argparse import Namespace
from statistics import median
from typing import Any

import torch
from machine import error_text, free_memory, print_trace, run_facts
from model_dense import attending
from model_report import CHECKPOINTED, FORWARD, HEADER, ModelReport, line
from model_shapes import FULL, NONE, SMALL, STOCK, ModelSizes, Part, Spec, shared_out, specs
from report import Row, is_wanted
from timing import batches
from torch import Tensor
from torch._inductor import config as inductor_config

from vmoba_flex.models import VMoBAHandle, apply_vmoba

# On a CPU graphs are captured and split into forward and backward, but not lowered: only whether it works is asked.
COMPILERS = {"cuda": "inductor", "cpu": "aot_eager"}
# A slice that is not written is off by all of itself; rounding in 16 bits, through 30 layers, is not.
_GRADIENT_ERROR = 0.5
_FEW_ROWS = 8
PACKAGES = ("diffusers", "transformers", "accelerate", "nvidia-cudnn-cu13")


def work(args: Namespace) -> int:
    """Measures what ``args`` ask for, within their budget; the exit status."""
    started = time.monotonic()
    sizes, device = _prepare(args)
    report = ModelReport.load(args.output) if args.add else ModelReport(args.output)
    bench = Bench(sizes, device)
    facts = run_facts(device, args.command, PACKAGES)
    run = report.start_run(facts)
    print(HEADER, flush=True)
    wanted = _wanted(args, report, sizes)
    rows = ((_describe(spec, sizes, device, run), functools.partial(bench.measure, spec)) for spec in wanted)
    return report.fill(rows, started + args.budget_s, line)


def compile_ahead(args: Namespace) -> int:
    """Compiles the blocks of every n-th group of rows and runs them once, for the caches on disk; measures nothing."""
    started = time.monotonic()
    sizes, device = _prepare(args)
    report = ModelReport.load(args.output) if args.add else ModelReport(args.output)
    wanted = _wanted(args, report, sizes)
    groups = {spec.compiled_as: spec for spec in reversed(wanted)}  # the most urgent of each group
    urgent = [spec for spec in wanted if groups[spec.compiled_as] is spec]
    first, step = args.ahead
    for spec in urgent[first::step]:
        for part in spec.model.parts:
            if time.monotonic() - started > args.compile_ahead_s:
                return 0
            few = dataclasses.replace(part, arguments={name: min(3, n) for name, n in part.arguments.items()})
            try:
                with Setup(spec, few, sizes, device) as setup:
                    setup.warm_up(spec.mode)
            except Exception as error:
                print(f"compiling ahead, {spec.id}: {error_text(error)}", file=sys.stderr)
            free_memory(device)
            torch.compiler.reset()
    return 0


def _wanted(args: Namespace, report: ModelReport, sizes: ModelSizes) -> list[Spec]:
    """This GPU's share of the rows asked for, but for those that are there."""
    wanted = (spec for spec in specs(sizes, args.device) if is_wanted(spec.id, args.only))
    return [spec for spec in shared_out(wanted, *args.share) if not report.has(spec.id)]


def _prepare(args: Namespace) -> tuple[ModelSizes, str]:
    import diffusers

    # On a GPU it leaves slices of the gradient of a modulation unwritten (torch 2.10 on, pytorch#193061).
    inductor_config.triton.mix_order_reduction = False
    # Each shape, kind of blocks and grad mode is a graph of its own; past torch's 8 that is an error here.
    torch.compiler.config.recompile_limit = 128  # pyright: ignore[reportAttributeAccessIssue]
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    diffusers.utils.logging.set_verbosity_error()
    if args.device == "cpu":
        torch.set_num_threads(1)  # small tensors, and not the only process
    return SMALL if args.small else FULL, args.device


class Setup(contextlib.ExitStack):
    """A transformer with one attention, its blocks compiled, on one grid.

    Args:
        spec: a row; its mode only says whether to train.
        part: the layers to build.
        sizes: of the run.
        device: ``"cuda"`` or ``"cpu"``.
        stock: what full attention comes to; None to check nothing.
    """

    def __init__(
        self, spec: Spec, part: Part, sizes: ModelSizes, device: str, stock: "StockOutput | None" = None
    ) -> None:
        super().__init__()
        self.device, self.training, self.facts = device, spec.mode != FORWARD, Row()
        self.model = spec.model.build(part, device, sizes.dtype)
        self.model.set_attention_backend(STOCK[device][0].backend)
        self.model.requires_grad_(self.training).train(self.training)
        self.inputs = spec.model.inputs(spec.grid, device, sizes.dtype)
        self.output: Tensor | None = None
        self.gradients: dict[str, Tensor] = {}
        self.handle: VMoBAHandle | None = None
        try:
            if spec.attention.dispatch:
                self._apply(spec, sizes, stock)
            else:
                if spec.attention.backend:
                    self.model.set_attention_backend(spec.attention.backend)
                self.enter_context(attending(self.model, spec.attention))
                if stock is not None and spec.attention != NONE:
                    self._expect_dense(stock, self.forward())
                    self._expect()
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=COMPILERS[device])
            self.optimizer = None
            if self.training:
                # Neither the learning rate nor decay moves the weights.
                parameters = list(self.model.parameters())
                self.optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
        except BaseException:
            self.close()
            raise

    def _apply(self, spec: Spec, sizes: ModelSizes, stock: "StockOutput | None") -> None:
        config = sizes.config(spec.grid, self.training, spec.attention.dispatch)
        handle = apply_vmoba(self.model, config)
        self.callback(handle.remove)
        self.handle = handle
        if stock is None:
            return
        handle.set_enabled(False)
        with attending(self.model, STOCK[self.device][0]):
            self._expect_dense(stock, self.forward())
        handle.set_enabled(True)
        self.facts["difference"] = relative_error(self._expect(), stock.output)

    def _expect(self) -> Tensor:
        """Keeps what the model comes to uncompiled, with gradients if it is to be trained; the output."""
        self._checkpoint(True)
        self.output = self._backward() if self.training else self.forward()
        if self.training:
            self.gradients = {name: x.grad for name, x in self.model.named_parameters() if x.grad is not None}
            self.model.zero_grad()
        return self.output

    def _expect_dense(self, stock: "StockOutput", output: Tensor) -> None:
        error = relative_error(output, stock.output)
        self.facts |= {"dense_error": error, "dense_budget": stock.budget}
        if not error <= stock.budget:
            raise WrongError(
                f"full attention differs from the stock model's by {error:.3g}, more than {stock.budget:.3g}"
            )

    def _checkpoint(self, checkpointing: bool) -> None:
        if checkpointing and self.training:
            self.model.enable_gradient_checkpointing()
        else:
            self.model.disable_gradient_checkpointing()

    def _call(self) -> Tensor:
        return self.model(**self.inputs)[0]

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The output ``(1, C, T, H, W)``."""
        return self._call()

    def step(self) -> None:
        """A training step."""
        assert self.optimizer is not None  # made for training
        self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(self) -> Tensor:
        output = self._call()
        output.float().square().mean().backward()
        return output.detach()

    def warm_up(self, mode: str) -> None:
        """Compiles, and looks at what comes out.

        Raises:
            WrongError: if the output or a gradient is not finite, or a gradient is not that of the uncompiled model.
        """
        self._checkpoint(mode == CHECKPOINTED)
        output = self._backward() if self.training else self.forward()
        results = {"output": output}
        if self.training:
            named = self.model.named_parameters()
            results |= {f"gradient of {name}": x.grad for name, x in named if x.grad is not None}
        for name, result in results.items():
            if not result.isfinite().all():
                raise WrongError(f"{name} is not finite")
        if self.output is not None:
            self.facts["compiled_error"] = relative_error(output, self.output)
        if self.gradients:
            errors = {name: _worst_row(results[f"gradient of {name}"], x) for name, x in self.gradients.items()}
            self.gradients = {}
            worst = max(errors, key=errors.__getitem__)
            self.facts["gradient_error"] = errors[worst]
            if not errors[worst] <= _GRADIENT_ERROR:
                raise WrongError(f"gradient of {worst} is off by {errors[worst]:.3g} of itself once compiled")
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def time(self) -> Row:
        """Median time and memory of what ``warm_up`` has tried."""
        call = self.step if self.training else self.forward
        cuda = self.device == "cuda"
        before, memory = 0, {}
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times = batches(call, 1, 1, self.device)
        if cuda:
            peak = torch.cuda.max_memory_allocated()
            memory = {"peak_gb": peak / 1e9, "extra_gb": (peak - before) / 1e9}
            # The longer a step, the less it varies.
            times += batches(call, 4 if times[0] < 1000 else 2 if times[0] < 3000 else 1, 1, self.device)
        density = {} if self.handle is None else {"density": mean_density(self.handle)}
        return {"ms": median(times), "runs": len(times), **memory, **density}


class StockOutput:
    """What the stock model comes to, uncompiled, and by how much another right attention may differ."""

    def __init__(self, spec: Spec, part: Part, sizes: ModelSizes, device: str) -> None:
        model = spec.model.build(part, device, sizes.dtype).eval()
        inputs = spec.model.inputs(spec.grid, device, sizes.dtype)
        outputs = []
        for attention in STOCK[device]:
            model.set_attention_backend(attention.backend)
            with torch.no_grad(), attending(model, attention):
                outputs.append(model(**inputs)[0])
        self.output = outputs[0]
        self.budget = 2 * relative_error(outputs[1], outputs[0]) + torch.finfo(sizes.dtype).eps


class WrongError(RuntimeError):
    """A result that a row must not be timed with."""


class Bench:
    """What rows share: the setup of the last one, and the outputs that they are compared with."""

    def __init__(self, sizes: ModelSizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        self.setup: tuple[Any, Setup] | None = None
        self.stock: dict[Any, StockOutput] = {}

    def measure(self, spec: Spec, row: Row) -> bool:
        """Fills the row, with an error's text if there is one; whether the device still works."""
        began = time.monotonic()
        try:
            self._measure(spec, row)
            row["status"] = "ok"
        except torch.OutOfMemoryError as error:
            row["status"], row["error"] = "out of memory", error_text(error)
        except WrongError as error:
            row["status"], row["error"] = "wrong", str(error)
        except ImportError as error:
            row["status"], row["error"] = "not installed", error_text(error)
        except Exception as error:
            row["status"], row["error"] = "failed", error_text(error)
            print_trace()
        row["wall_s"] = time.monotonic() - began
        if row["status"] == "ok":
            return True
        self._close()
        return free_memory(self.device)

    def _measure(self, spec: Spec, row: Row) -> None:
        total = 0.0
        parts = list(enumerate(spec.model.parts))
        if self.setup is not None and self.setup[0] == (*spec.compiled_as, parts[-1][0]):
            parts.reverse()  # the blocks of the last one are still compiled
        for index, part in parts:
            began = time.monotonic()
            setup = self._setup_of(spec, index, part)
            setup.warm_up(spec.mode)
            warm_up_s = time.monotonic() - began
            measured = setup.facts | setup.time() | {"warm_up_s": warm_up_s}
            row["parts"][index] |= measured
            total += measured["ms"] * part.of / part.layers
        parts = row["parts"]
        row["ms"] = total
        row["warm_up_s"] = sum(part["warm_up_s"] for part in parts)
        for name in (
            "peak_gb",
            "extra_gb",
            "dense_error",
            "dense_budget",
            "difference",
            "compiled_error",
            "gradient_error",
        ):
            if name in parts[0]:
                row[name] = max(part[name] for part in parts)
        if "density" in parts[0]:
            row["density"] = sum(part["density"] * part["of"] for part in parts) / sum(part["of"] for part in parts)

    def _setup_of(self, spec: Spec, index: int, part: Part) -> Setup:
        key = *spec.compiled_as, index
        if self.setup is None or self.setup[0] != key:
            self._close()
            grid = spec.model.name, spec.grid
            shape = *grid, index
            if spec.attention != NONE and shape not in self.stock:
                self.stock = {other: kept for other, kept in self.stock.items() if other[:-1] == grid}
                self.stock[shape] = StockOutput(spec, part, self.sizes, self.device)
                free_memory(self.device)
            stock = None if spec.attention == NONE else self.stock[shape]
            self.setup = key, Setup(spec, part, self.sizes, self.device, stock)
            free_memory(self.device)
        return self.setup[1]

    def _close(self) -> None:
        if self.setup is not None:
            self.setup[1].close()
            self.setup = None
            torch.compiler.reset()
            free_memory(self.device)


def mean_density(handle: VMoBAHandle) -> float:
    """Mean over the layers of what their last call attended, the last column of the handle's table."""
    layers = handle.summary().splitlines()[2:]
    found = [float(layer.split()[-1]) for layer in layers]
    return sum(found) / len(found)


def _worst_row(gradient: Tensor, truth: Tensor) -> float:
    """The largest relative error of a gradient's rows where there are few, such as a modulation's; else its own."""
    rows = [x.float().flatten(0, -2) if x.dim() > 1 else x.float()[None] for x in (gradient, truth)]
    if len(rows[0]) > _FEW_ROWS:
        rows = [x.flatten()[None] for x in rows]
    difference, size = (rows[0] - rows[1]).norm(dim=1), rows[1].norm(dim=1)
    return (difference / size.clamp(min=1e-30)).max().item()


def relative_error(output: Tensor, truth: Tensor) -> float:
    """The norm of the difference over that of the truth."""
    return ((output.float() - truth.float()).norm() / truth.float().norm()).item()


def _describe(spec: Spec, sizes: ModelSizes, device: str, run: int) -> Row:
    model, training = spec.model, spec.mode != FORWARD
    row: Row = {
        "id": spec.id,
        "status": "running",
        "model": model.name,
        "tokens": spec.tokens,
        "grid": spec.grid,
        "mode": spec.mode,
        "attention": spec.attention.name,
        "dense": spec.attention.is_dense,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "text_tokens": model.text_tokens,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "compiler": COMPILERS[device],
        "parts": [{"layers": part.layers, "of": part.of} for part in model.parts],
        "run": run,
    }
    if spec.attention.dispatch:
        config = sizes.config(spec.grid, training, spec.attention.dispatch)
        blocks = {kind: config.partition(kind, spec.grid) for kind in config.cycle}
        row |= {
            "dispatch": config.dispatch,
            "rule": repr(config.rule),
            "blocks": {kind: {"shape": blocks[kind].block, "count": blocks[kind].num_blocks} for kind in config.cycle},
        }
    return row
