"""Attention over the ranks of a group: what they exchange, what they compute, and the whole call."""

import functools
import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bench.common.report import Row
from bench.common.timing import batches
from bench.distributed.rows import DistributedSizes, Spec
from vmoba_flex import Tail, vmoba_attention
from vmoba_flex.call import Dispatch
from vmoba_flex.collectives import Ranks
from vmoba_flex.distributed import TokenShards
from vmoba_flex.distributed.exchange import Heads, Layout, to_heads, to_tokens


def agreed(value: float, device: str) -> float:
    """The largest value over all ranks."""
    largest = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median milliseconds of a call on the slowest rank; all ranks make equally many calls."""
    estimate = agreed(batches(call, 1, 1, device)[0], device)
    if estimate > 2000:
        return estimate
    calls = min(20, math.ceil(30 / max(estimate, 1e-3))) if device == "cuda" else 1
    count = 1 if device == "cpu" else 9 if estimate < 200 else 3 if estimate < 500 else 1
    return agreed(median(batches(call, count, calls, device)), device)


class Attention:
    """One attention over the ranks of a group: what they exchange, what they compute, and the whole call."""

    def __init__(self, spec: Spec, sizes: DistributedSizes, group: DeviceMesh, device: str) -> None:
        self.group, self.device, self.sizes = group, device, sizes
        self.partition = sizes.partition(spec.grid)
        self.dispatch: Dispatch = spec.attention
        self.rule, self.tail = spec.rule, Tail() if spec.tail else None
        self.size, self.rank = spec.gpus, group.get_local_rank()
        generator = torch.Generator(device).manual_seed(0)  # the same on all ranks
        shape = (1, sizes.heads, spec.tokens, sizes.head_dim)
        self.whole = [torch.randn(shape, generator=generator, device=device).to(sizes.dtype) for _ in range(4)]
        self.layout = Layout.of(Ranks.of(group), TokenShards(), self.partition)
        self.local = [x.tensor_split(self.size, 2)[self.rank].contiguous() for x in self.whole]

    def measure(self) -> Row:
        """Error, density and times: a row's facts."""
        facts: Row = {"difference": 0.0, "density": self._density()}
        if self.size > 1:
            facts["difference"] = agreed(self._difference(), self.device)
        whole = self.local if self.size > 1 else self.whole
        facts |= self._times("", lambda *x: self._attend(*x, group=self.group if self.size > 1 else None), whole)
        if self.size > 1:
            heads = Heads.evenly(self.sizes.heads, self.size).counts[0]
            own = [x[:, :heads].contiguous() for x in self.whole]
            self.whole.clear()
            facts |= self._times("compute_", self._attend, own)
            del own
            facts |= self._times("exchange_", self._exchange, self.local)
        return facts

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, group: Any = None) -> Tensor:
        return vmoba_attention(
            query, key, value, self.partition, self.rule, dispatch=self.dispatch, tail=self.tail, group=group
        )

    def _exchange(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = Heads.evenly(self.sizes.heads, self.size)
        query, key, value = to_heads((query, key, value), self.layout, (heads,) * 3)
        return _Join.apply(to_tokens(value, self.layout, heads), query, key)

    def _density(self) -> float:
        with torch.no_grad():
            query, key, value, _ = self.whole
            _, stats = vmoba_attention(
                query, key, value, self.partition, self.rule, dispatch=self.dispatch, return_stats=True
            )
        return float(stats.density.mean())

    def _backward(self, call: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        output = call(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, tensors[3])

    def _difference(self) -> float:
        """The worst relative error of this rank's output and gradients against one GPU's."""
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
    """Returns its first argument, and gives the others gradients of their size for the exchange back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *ctx.saved_tensors
