"""A model that is to be timed: built, checked against full attention, compiled."""

import contextlib
from statistics import median

import torch
from torch import Tensor

from bench.common.report import Row
from bench.common.timing import batches
from bench.models.dense import attending
from bench.models.report import CHECKPOINTED, FORWARD
from bench.models.rows import NONE, STOCK, Spec
from bench.models.shapes import ModelSizes, Part
from vmoba_flex.models import VMoBAHandle, apply_vmoba

# On a CPU graphs are only captured and split into forward and backward, to try it out.
COMPILERS = {"cuda": "inductor", "cpu": "aot_eager"}
# An unwritten slice has a relative error of 1; rounding in 16 bits through 30 layers stays below this.
_GRADIENT_ERROR = 0.5
_FEW_ROWS = 8


class Setup(contextlib.ExitStack):
    """A transformer with one attention, its blocks compiled, on one grid.

    Args:
        spec: a row; of its mode only whether it trains matters.
        part: the layers to build.
        sizes: of the run.
        device: ``"cuda"`` or ``"cpu"``.
        stock: full attention's output, to check against; None to check nothing.
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
        asked = spec.attention
        config = sizes.config(spec.grid, self.training, asked.dispatch, asked.density, asked.tail)
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
        """Keeps the uncompiled output, and gradients in training; returns the output."""
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
        """Compiles, and checks the output and the gradients.

        Raises:
            WrongError: if the output or a gradient is not finite, or a gradient differs from the uncompiled model's.
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
        """Median time and memory of a step or a forward, after ``warm_up``."""
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
            # Longer steps vary less.
            times += batches(call, 4 if times[0] < 1000 else 2 if times[0] < 3000 else 1, 1, self.device)
        density = {} if self.handle is None else {"density": mean_density(self.handle)}
        return {"ms": median(times), "runs": len(times), **memory, **density}


class StockOutput:
    """The uncompiled stock model's output, and by how much another correct attention may differ."""

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
    """A wrong result: the row is not timed."""


def mean_density(handle: VMoBAHandle) -> float:
    """Mean density of the layers' last calls, from the last column of the handle's table."""
    layers = handle.summary().splitlines()[2:]
    found = [float(layer.split()[-1]) for layer in layers]
    return sum(found) / len(found)


def _worst_row(gradient: Tensor, truth: Tensor) -> float:
    """The largest relative error of a gradient's rows if it has few, such as a modulation's; else of the whole."""
    rows = [x.float().flatten(0, -2) if x.dim() > 1 else x.float()[None] for x in (gradient, truth)]
    if len(rows[0]) > _FEW_ROWS:
        rows = [x.flatten()[None] for x in rows]
    difference, size = (rows[0] - rows[1]).norm(dim=1), rows[1].norm(dim=1)
    return (difference / size.clamp(min=1e-30)).max().item()


def relative_error(output: Tensor, truth: Tensor) -> float:
    """Norm of the difference / norm of the truth."""
    return ((output.float() - truth.float()).norm() / truth.float().norm()).item()
