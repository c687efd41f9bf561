"""One run's training: steps, held-out loss, checkpoint."""

import copy
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bench.quality.runs import Run, Size
from bench.quality.windows import LEVELS, Sample, Windows
from vmoba_flex import VMoBAConfig
from vmoba_flex.demo.model import VideoTransformer

WARMUP = 50
"""Steps over which the learning rate rises; until then the number of all steps need not be known."""

LEAST_LEVEL = 0.2
"""The loss is the velocity's squared error, weighted less below this noise level, where it measures rounding.

Velocity is (noisy - video) / level, so that its error is the video's, over the level.
"""

# Steps between two synchronisations with the device, and so between two points of the curve.
STRIDE = 10
_EMA_DECAY = 0.995
_CLIP = 1.0


class Trainer:
    """A model, its optimizer, and the progress of its training.

    Attributes:
        model: what is trained.
        average: the exponential moving average of its weights; the held-out loss is the average's.
        step: steps taken.
        seconds: spent on these steps, without compiling, held-out losses and checkpoints.
        curve: ``[step, seconds, mean training loss since the point before]`` of each point.
        held_out: ``{"step", "seconds", "loss": {clip: [loss of each level]}}`` of each measurement.
    """

    def __init__(self, run: Run, size: Size, attention: VMoBAConfig, clips: dict[str, Tensor]) -> None:
        self.run = run
        frames, height, width = size.pixels
        self.windows = Windows(clips, frames, height, width)
        device = self.windows.device
        torch.manual_seed(run.seed)
        self.model = VideoTransformer(size.shape, attention).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.learning_rate = 1e-3 * (256 / size.shape.dim) ** 0.5
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda"
        )
        self.step, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []
        self.held_out: list[dict[str, Any]] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def compile(self) -> None:
        """Compiles everything around attention, and captures forward and backward in one CUDA graph.

        Attention is not compiled: its kernels are, two graphs then serve all layers and variants, and the CUDA graph
        saves its launches, which at 14K tokens take longer than its work.
        """
        # On a GPU this pass leaves slices of a modulation's gradient unwritten (torch 2.10 on, pytorch#193061).
        inductor_config.triton.mix_order_reduction = False
        blocks: Any = self.model.blocks
        for block in blocks:
            block.project = torch.compile(block.project, dynamic=False)
            block.finish = torch.compile(block.finish, dynamic=False)
        self._static = self.windows.training(self.run.seed, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.optimizer.zero_grad()
                self._backward(self._static)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._backward(self._static)
        self._graph = graph

    def advance(self, steps: int, total: int) -> None:
        """Takes ``steps`` steps of ``total``, and adds a point to the curve."""
        start = self._now()
        losses = [self._take_step(total) for _ in range(steps)]
        loss = torch.stack(losses).mean().item()
        self.seconds += self._now() - start
        self.curve.append([self.step, self.seconds, loss])

    def measure(self) -> None:
        """Records the average's held-out loss."""
        self.held_out.append({"step": self.step, "seconds": self.seconds, "loss": self.held_out_loss()})

    @torch.no_grad()
    def held_out_loss(self) -> dict[str, list[float]]:
        """The average's held-out loss: clip -> loss of each level, mean over the clip's windows."""
        losses: dict[str, list[list[Tensor]]] = {}
        for clip, level, sample in self.windows.held_out_samples():
            losses.setdefault(clip, [[] for _ in range(LEVELS)])[level].append(self._loss_of(self.average, sample))
        return {clip: [torch.stack(each).mean().item() for each in levels] for clip, levels in losses.items()}

    def gradient_error(self) -> dict[str, Any]:
        """How far gradients are from those without compilation and graph, relative: of all, and of the worst tensor.

        The training is over after this.
        """
        sample = self.windows.training(self.run.seed, self.step)
        self._gradients(sample)
        ours = {name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.grad is not None}
        self._graph = None
        for block in self.model.blocks:
            for compiled in {"project", "finish"} & vars(block).keys():
                delattr(block, compiled)  # the method again
        self._gradients(sample)
        truth = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        off = {name: (ours[name] - gradient).norm().item() for name, gradient in truth.items()}
        size = {name: gradient.norm().item() for name, gradient in truth.items()}
        worst = max(truth, key=lambda name: off[name] / max(size[name], 1e-12))
        everything = math.hypot(*off.values()) / math.hypot(*size.values())
        return {"all": everything, "worst": off[worst] / max(size[worst], 1e-12), "where": worst}

    def save(self, path: Path) -> None:
        """Writes all that a run needs to go on; an interrupted write leaves the old file."""
        draft = path.with_name(path.name + ".part")
        torch.save(self._state(), draft)
        os.replace(draft, path)

    def load(self, path: Path) -> None:
        """Goes on where ``save`` left off. Call it before ``compile``: the graph would hold the old tensors."""
        state = torch.load(path, map_location=self.windows.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "seconds", "curve", "held_out"):
            setattr(self, name, state[name])

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "held_out": self.held_out,
        }

    def _take_step(self, total: int) -> Tensor:
        sample = self.windows.training(self.run.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule(self.step, total)
        loss = self._gradients(sample)
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.step += 1
        # At first the average forgets the initial weights faster.
        average = get_ema_multi_avg_fn(min(_EMA_DECAY, self.step / (self.step + 10)))
        average(list(self.average.parameters()), list(self.model.parameters()), 0)
        return loss

    def _gradients(self, sample: Sample) -> Tensor:
        """The loss, and its gradients with the weights."""
        if self._graph is None:
            self.optimizer.zero_grad()
            return self._backward(sample)
        for ours, given in zip(self._static, sample, strict=True):
            ours.copy_(given)
        self._graph.replay()
        return self._loss.clone()

    def _backward(self, sample: Sample) -> Tensor:
        loss = self._loss_of(self.model, sample)
        loss.backward()
        return loss.detach()

    def _loss_of(self, model: nn.Module, sample: Sample) -> Tensor:
        # A cache of casts would outlive the captured graph.
        with torch.autocast(self.windows.device.type, torch.bfloat16, self._on_gpu(), cache_enabled=False):
            video = model(sample.noisy, sample.level)
        return loss_of(video, sample)

    def _on_gpu(self) -> bool:
        return self.windows.device.type == "cuda"

    def _now(self) -> float:
        if self._on_gpu():
            torch.cuda.synchronize()
        return time.perf_counter()


def loss_of(video: Tensor, sample: Sample) -> Tensor:
    """The loss of a predicted video."""
    return F.mse_loss(video, sample.video) / sample.level.clamp_min(LEAST_LEVEL).square().squeeze()


def schedule(step: int, total: int) -> float:
    """The learning rate / its peak: a linear rise over ``WARMUP`` steps, then a cosine down to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(total - WARMUP, 1)
    return 0.5 * (1 + math.cos(math.pi * done))
