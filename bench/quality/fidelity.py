"""How close whole denoises with another attention are to full attention's own, with the same weights and noise.

A denoise takes ``STEPS`` Euler steps from noise level ``LEVEL`` to 0. Its first steps use full attention, the same for
all: they are taken once, and each attention goes on from where its own first step begins.

B: held-out windows times noise seeds.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from bench.attention.checks import chosen_blocks
from bench.common.sizes import Sizes3
from bench.quality.probe import PROBED_LEVELS, window_inputs
from bench.quality.stepped import Stepped
from bench.quality.train import LEAST_LEVEL
from bench.quality.windows import LEVELS, Sample, Windows
from vmoba_flex import VMoBAConfig, block_masses
from vmoba_flex.demo.denoise import frames_of, psnr
from vmoba_flex.demo.model import VideoTransformer

LEVEL, STEPS = 0.9, 20
NOISE_SEEDS = (0, 1)

# No other noise of this study has such seeds.
_FIRST_SEED = 1_000_000
_PATH = [LEVEL * (1 - step / STEPS) for step in range(STEPS + 1)]


class Reference:
    """Full attention's videos, losses and masses: what other attentions of the same weights are compared with.

    Attributes:
        samples: the clip, number of the held-out window, and noise seed of each denoise.
        videos: full attention's own, float32 ``(B, 3, frames, height, width)``.
        losses: full attention's held-out loss of each window, the mean over noise levels.
    """

    def __init__(self, model: VideoTransformer, attention: VMoBAConfig, windows: Windows, grid: Sizes3) -> None:
        self.model, self.windows, self.grid = model, windows, grid
        held_out = list(enumerate(windows.held_out()))
        self.samples = [(clip, number, seed) for (number, (clip, _)), seed in product(held_out, NOISE_SEEDS)]
        videos = torch.cat([video for _, (_, video) in held_out]).repeat_interleave(len(NOISE_SEEDS), 0)
        pairs = zip(self.samples, videos, strict=True)
        noise = torch.cat([_noise(video, _FIRST_SEED + 100 * number + seed) for (_, number, seed), video in pairs])
        model.set_attention(attention)
        self._latents = [videos + LEVEL * (noise - videos)]  # before each step
        for step in range(STEPS):
            self._latents.append(follow(model, self._latents[-1], _PATH[step : step + 2]))
        self.videos = self._latents[-1]
        self.losses = held_out_losses(model, windows)
        self._inputs = [window_inputs(model, windows, level) for level in PROBED_LEVELS]
        self._masses: dict[Any, Tensor] = {}

    def fidelities(self, stepped: Stepped) -> list[float]:
        """PSNR in dB of each denoise under another attention to full attention's video; the model keeps it."""
        stepped.attach(self.model)
        variant = stepped.variant
        first = variant.dense - variant.remembers  # the last dense step once more: it records
        noisy = self._latents[first]
        for stepped.step in range(first, STEPS):
            noisy = follow(self.model, noisy, _PATH[stepped.step : stepped.step + 2])
        return [psnr(frames_of(x[None]), frames_of(y[None])) for x, y in zip(noisy, self.videos, strict=True)]

    def recall(self, attention: VMoBAConfig) -> float:
        """The share of full attention's mass on chosen blocks, the mean over layers and levels."""
        recalls = []
        for level, layers in enumerate(self._inputs):
            for index, (query, key, _) in enumerate(layers):
                plan = attention.layer(index, len(layers))
                partition = attention.partition(plan.kind, self.grid)
                chosen = chosen_blocks(query, key, partition, plan.rule, attention.dispatch)
                where = level, index, partition
                if where not in self._masses:
                    self._masses[where] = block_masses(query, key, partition)
                recalls.append((self._masses[where] * chosen).sum(-1).mean(dtype=torch.float32))
        return torch.stack(recalls).mean().item()


@torch.no_grad()
def follow(model: VideoTransformer, noisy: Tensor, levels: Sequence[float]) -> Tensor:
    """Follows the flow by Euler's method.

    Args:
        model: predicts the video in a noisy one.
        noisy: ``(B, 3, frames, height, width)``, of the first level.
        levels: noise levels, falling, at most 1.

    Returns:
        Like ``noisy``, of the last level.
    """
    for level, after in pairwise(levels):
        velocity = (noisy - predict(model, noisy, noisy.new_full((len(noisy),), level))) / level
        noisy = noisy + (after - level) * velocity
    return noisy


@torch.no_grad()
def held_out_losses(model: VideoTransformer, windows: Windows) -> list[float]:
    """The training loss of each held-out window with its fixed noise: the mean over noise levels."""
    samples = [sample for _, _, sample in windows.held_out_samples()]
    losses = []
    for start in range(0, len(samples), LEVELS):
        noisy, level, video = map(torch.cat, zip(*samples[start : start + LEVELS], strict=True))
        losses.append(losses_of(predict(model, noisy, level), Sample(noisy, level, video)).mean().item())
    return losses


def losses_of(video: Tensor, sample: Sample) -> Tensor:
    """The training loss of each predicted video ``(B, 3, frames, height, width)`` by itself: ``(B,)``."""
    return (video - sample.video).square().mean((1, 2, 3, 4)) / sample.level.clamp_min(LEAST_LEVEL).square()


def predict(model: VideoTransformer, noisy: Tensor, level: Tensor) -> Tensor:
    """The video in noisy videos, in bfloat16 on a GPU, as in training."""
    with torch.autocast(noisy.device.type, torch.bfloat16, noisy.is_cuda):
        return model(noisy, level)


def _noise(video: Tensor, seed: int) -> Tensor:
    """Noise for a video ``(3, frames, height, width)``, as a batch of one."""
    generator = torch.Generator(video.device).manual_seed(seed)
    return torch.randn(video.shape, generator=generator, device=video.device)[None]
