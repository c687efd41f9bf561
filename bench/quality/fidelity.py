"""How close whole denoises with another attention are to full attention's own, with the same weights and noise.

A denoise takes ``STEPS`` Euler steps from noise level ``LEVEL`` to 0. Its first ``DENSE_STEPS`` use full attention, so
they are taken once, and all attentions go on from there.

Shapes: B held-out windows times noise seeds, S tokens, N blocks, H heads, D head dim.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention.checks import chosen_blocks
from bench.common.sizes import Sizes3
from bench.quality.probe import PROBED_LEVELS, window_inputs
from bench.quality.train import LEAST_LEVEL
from bench.quality.windows import LEVELS, Sample, Windows
from vmoba_flex import BlockPartition, VMoBAConfig
from vmoba_flex.demo.denoise import frames_of, psnr
from vmoba_flex.demo.model import VideoTransformer

LEVEL, STEPS, DENSE_STEPS = 0.9, 20, 5
NOISE_SEEDS = (0, 1)

# Queries whose scores are in memory at a time.
_ROWS = 2048
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
        self._middle = follow(model, videos + LEVEL * (noise - videos), _PATH[: DENSE_STEPS + 1])
        self.videos = follow(model, self._middle, _PATH[DENSE_STEPS:])
        self.losses = held_out_losses(model, windows)
        self._inputs = [window_inputs(model, windows, level) for level in PROBED_LEVELS]
        self._masses: dict[Any, Tensor] = {}

    def fidelities(self, attention: VMoBAConfig) -> list[float]:
        """PSNR in dB of each denoise under another attention to full attention's video; the model keeps it."""
        self.model.set_attention(attention)
        videos = follow(self.model, self._middle, _PATH[DENSE_STEPS:])
        return [psnr(frames_of(x[None]), frames_of(y[None])) for x, y in zip(videos, self.videos, strict=True)]

    def chosen(self, attention: VMoBAConfig) -> tuple[float, float]:
        """Density, and recall: the share of full attention's mass on chosen blocks; means over layers and levels."""
        densities, recalls = [], []
        for level, layers in enumerate(self._inputs):
            for index, (query, key, _) in enumerate(layers):
                plan = attention.layer(index, len(layers))
                partition = attention.partition(plan.kind, self.grid)
                chosen = chosen_blocks(query, key, partition, plan.rule, attention.dispatch)
                where = level, index, partition
                if where not in self._masses:
                    self._masses[where] = block_masses(query, key, partition)
                densities.append(chosen.float().mean())
                recalls.append((self._masses[where] * chosen).sum(-1).mean())
        return torch.stack(densities).mean().item(), torch.stack(recalls).mean().item()


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


@torch.no_grad()
def block_masses(query: Tensor, key: Tensor, partition: BlockPartition) -> Tensor:
    """The share of each query's full attention on each block.

    Args:
        query: ``(1, H, S, D)``, raster order.
        key: like query.
        partition: of the S tokens.

    Returns:
        float32 ``(1, H, S, N)``.
    """
    member = F.one_hot(partition.block_ids(query.device).long(), partition.num_blocks).float()
    keys = key.float().mT / query.shape[-1] ** 0.5
    # Some queries at a time: all scores of four heads take 3 GB at 13,824 tokens.
    return torch.cat([(rows.float() @ keys).softmax(-1) @ member for rows in query.split(_ROWS, dim=2)], dim=2)


def _noise(video: Tensor, seed: int) -> Tensor:
    """Noise for a video ``(3, frames, height, width)``, as a batch of one."""
    generator = torch.Generator(video.device).manual_seed(seed)
    return torch.randn(video.shape, generator=generator, device=video.device)[None]
