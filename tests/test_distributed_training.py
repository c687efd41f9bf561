"""Attention shared out over ranks together with torch's other kinds of parallelism: FSDP2, and tensor parallelism."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.ranks import RankPool
from vmoba_flex import BlockPartition, Threshold, vmoba_attention

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.usefixtures("one_thread")]

PARTITION = BlockPartition((3, 4, 6), (3, 2, 3))
RULE = Threshold(0.3, max_density=0.5)
HEADS, WIDTH = 4, 32


class Layer(nn.Module):
    """Attention between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, group: Any = None) -> Tensor:
        """``(B, tokens of this rank, WIDTH)``, with as many heads as the projections give here."""
        query, key, value = (
            project(x).unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        output = vmoba_attention(query, key, value, PARTITION, RULE, group=group)
        return x + self.out(output.transpose(1, 2).flatten(2))


def model_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    return model, torch.randn(2, PARTITION.num_tokens, WIDTH)


def forward(model: nn.Sequential, x: Tensor, group: Any = None) -> Tensor:
    for layer in model:
        x = layer(x, group)
    return x


def trained() -> tuple[list[Tensor], list[Tensor]]:
    """Gradients and weights of a step on one process."""
    model, x = model_and_batch()
    return step(model, lambda: forward(model, x).square().sum())


def step(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss().backward()
    grads = [whole(x.grad) for x in model.parameters()]
    optimizer.step()
    return grads, [whole(x) for x in model.parameters()]


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


@functools.cache
def pairs() -> DeviceMesh:
    """Two ranks in each row."""
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("copies", "ranks"))["ranks"]


def sharded(checkpoint: bool) -> tuple[list[Tensor], list[Tensor]]:
    """A step with FSDP2 over the ranks that share the tokens."""
    mesh = pairs()
    model, x = model_and_batch()
    for layer in [*model, model]:
        fully_shard(layer, mesh=mesh)
    x = x.tensor_split(2, 1)[mesh.get_local_rank()]

    def loss() -> Tensor:
        y = x
        for layer in model:
            y = torch.utils.checkpoint.checkpoint(layer, y, mesh, use_reentrant=False) if checkpoint else layer(y, mesh)
        # FSDP takes the mean of gradients over ranks, of which each has its tokens' share.
        return mesh.size() * y.square().sum()

    return step(model, loss)


def assert_trains_like_one_process(rank_pool: RankPool, function: Any, option: bool) -> None:
    expected = trained()
    for found in rank_pool.run(function, option):
        for some, others in zip(found, expected, strict=True):
            torch.testing.assert_close(some, others, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_fsdp2(rank_pool: RankPool, checkpoint: bool):
    assert_trains_like_one_process(rank_pool, sharded, checkpoint)


def by_heads(dtensors: bool) -> tuple[list[Tensor], list[Tensor]]:
    """A step with tensor parallelism: each rank projects and attends its heads of all tokens."""
    mesh = pairs()
    model, x = model_and_batch()
    column = ColwiseParallel(use_local_output=not dtensors)
    plan = {"to_q": column, "to_k": column, "to_v": column, "out": RowwiseParallel()}
    for layer in model:
        if dtensors:
            layer.forward = functools.partial(_local, layer)
        parallelize_module(layer, mesh, plan)
    return step(model, lambda: forward(model, x).square().sum())


def _local(layer: Any, x: Tensor, group: Any = None) -> Tensor:
    """``Layer.forward`` where projections give DTensors: attention takes their local tensors."""
    query, key, value = (
        project(x).to_local().unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2)
        for project in (layer.to_q, layer.to_k, layer.to_v)
    )
    output = vmoba_attention(query, key, value, PARTITION, RULE, group=group)
    return x + layer.out(output.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtensors", [False, True])
def test_tensor_parallelism(rank_pool: RankPool, dtensors: bool):
    assert_trains_like_one_process(rank_pool, by_heads, dtensors)


def refused() -> str:
    mesh = pairs()
    query = DTensor.from_local(torch.randn(1, 2, PARTITION.num_tokens, 8), mesh)
    with pytest.raises(TypeError, match=r".") as error:
        vmoba_attention(query, query, query, PARTITION, RULE)
    return str(error.value)


def test_dtensors_are_refused(rank_pool: RankPool):
    message = "query must be a plain tensor, got a DTensor: pass its to_local()"
    assert rank_pool.run(refused) == [message] * 4
