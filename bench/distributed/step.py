"""A training step of Wan 1.3B's shape over several ranks, by diffusers' context parallelism."""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bench.common.sizes import Sizes3
from bench.models.rows import STOCK
from bench.models.setup import mean_density, relative_error
from bench.models.shapes import FULL, SMALL
from vmoba_flex.models import apply_vmoba


class Step(contextlib.ExitStack):
    """A transformer with one attention; the ranks of a group share its tokens.

    Args:
        attention: ``"dense"``, or a dispatch of ours.
        grid: latent video size after patching.
        mesh: all ranks, as ``("copies", "ring", "ulysses")``; the model's tokens are shared over the last.
        device: ``"cuda"`` or ``"cpu"``.
        small: a tiny model, to try it out.
    """

    def __init__(self, attention: str, grid: Sizes3, mesh: DeviceMesh, device: str, small: bool) -> None:
        super().__init__()
        import diffusers
        from diffusers.models._modeling_parallel import ContextParallelConfig

        diffusers.utils.logging.set_verbosity_error()
        sizes = SMALL if small else FULL
        grid = sizes.grids[0] if small else grid
        spec = sizes.models[0]
        ranks = mesh["ulysses"]
        self.ranks, self.size = ranks.get_group(), ranks.size()
        self.model = spec.build(spec.parts[0], device, sizes.dtype).train()
        self.model.set_attention_backend(STOCK[device][0].backend)
        self.model.enable_gradient_checkpointing()
        self.inputs = spec.inputs(grid, device, sizes.dtype)
        self.handle = None
        if attention != "dense":
            self.handle = apply_vmoba(self.model, sizes.config(grid, True, attention))
            self.callback(self.handle.remove)
        single = self._forward()
        self.difference = 0.0
        if self.size > 1:
            if device == "cpu":  # diffusers takes the rank modulo this
                torch.accelerator.device_count = lambda: 1
            config = ContextParallelConfig(ulysses_degree=self.size, mesh=mesh["ring", "ulysses"])
            self.model.enable_parallelism(config=config)
            self.difference = relative_error(self._forward(), single)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self.model(**self.inputs)[0]

    def step(self) -> None:
        """A training step: each rank computes its tokens' share of the gradients, and the shares are added up."""
        self.model(**self.inputs)[0].float().square().mean().backward()
        if self.size > 1:
            grads = [x.grad for x in self.parameters if x.grad is not None]
            for dtype in dict.fromkeys(grad.dtype for grad in grads):
                alike = [grad for grad in grads if grad.dtype == dtype]
                flat = torch.cat([grad.flatten() for grad in alike])
                dist.all_reduce(flat, group=self.ranks)
                parts = flat.split([grad.numel() for grad in alike])
                for part, grad in zip(parts, alike, strict=True):
                    grad.copy_(part.view_as(grad))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def density(self) -> float:
        """The density of the last step, over the heads of this rank."""
        return 1.0 if self.handle is None else mean_density(self.handle)
