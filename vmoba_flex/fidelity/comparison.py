"""What a comparison found: each run, a summary of each config, and both as text and JSON."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from statistics import mean, median
from typing import Any

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.nearness import Nearness
from vmoba_flex.fidelity.store import Stored

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """One denoise.

    Attributes:
        name: of its config, or ``"full attention"``.
        prompt: in words.
        seed: of the noise.
        denoise: frames, times, memory and layers.
        near: to full attention's video; None for that itself.
    """

    name: str
    prompt: str
    seed: int
    denoise: Stored
    near: Nearness | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """One config over all prompts and seeds; the first summary is of full attention.

    Attributes:
        name: of the config.
        psnr: in dB to full attention's video, mean over prompts and seeds; None for full attention, as all figures of
            nearness.
        worst_psnr: the least over prompts and seeds.
        worst_frame_psnr: of the worst frame of all.
        ssim: mean; None below 11 pixels a side.
        worst_ssim: the least over prompts and seeds.
        lpips: mean (lower is nearer); None where ``lpips`` is not installed.
        worst_lpips: the largest over prompts and seeds.
        step_seconds: of a step, median over steps and runs; None where the pipeline tells no steps.
        seconds: of all steps of a run: each step's least over the runs, so that what was compiled in one run falls out
            where there are two or more; of the whole call where the pipeline tells no steps.
        speed_up: full attention's ``seconds`` over these.
        peak_bytes: the most memory of a run; None without an accelerator.
        density: attended pairs over all pairs, mean over layers, steps and runs.
    """

    name: str
    psnr: float | None
    worst_psnr: float | None
    worst_frame_psnr: float | None
    ssim: float | None
    worst_ssim: float | None
    lpips: float | None
    worst_lpips: float | None
    step_seconds: float | None
    seconds: float
    speed_up: float
    peak_bytes: int | None
    density: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        pipeline: its class.
        call: further arguments of each call, as text.
        configs: by name.
        runs: by prompt, seed and config, full attention first.
    """

    pipeline: str
    call: Mapping[str, str]
    configs: Mapping[str, VMoBAConfig]
    runs: tuple[Run, ...]

    def pairs(self) -> list[list[Run]]:
        """The runs of each prompt and seed, full attention first."""
        count = 1 + len(self.configs)
        return [list(self.runs[first : first + count]) for first in range(0, len(self.runs), count)]

    def summary(self) -> list[Summary]:
        """Full attention and each config over all prompts and seeds."""
        by_name: dict[str, list[Run]] = {}
        for run in self.runs:
            by_name.setdefault(run.name, []).append(run)
        full = next(iter(by_name.values()))
        return [_summary(name, runs, _seconds(full)) for name, runs in by_name.items()]

    def table(self) -> str:
        """The summary as text."""
        rows = self.summary()
        wide = 2 + max(len(one.name) for one in rows)
        lines = [
            f"{'':<{wide}}{'PSNR dB':>16}{'SSIM':>16}{'s/step':>9}{'s':>9}{'speed-up':>10}{'density':>9}",
            f"{'':<{wide}}{'mean    worst':>16}{'mean   worst':>16}",
        ]
        for one in rows:
            near = _two(one.psnr, one.worst_psnr, ".2f", 8) + _two(one.ssim, one.worst_ssim, ".4f", 8)
            step = "-" if one.step_seconds is None else f"{one.step_seconds:.3f}"
            cost = f"{step:>9}{one.seconds:>9.2f}{one.speed_up:>9.2f}x{one.density:>9.3f}"
            lines.append(f"{one.name:<{wide}}{near}{cost}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it but the frames."""
        facts = {
            "version": VERSION,
            "pipeline": self.pipeline,
            "call": dict(self.call),
            "configs": {name: json.loads(config.to_json()) for name, config in self.configs.items()},
            "summary": [dataclasses.asdict(one) for one in self.summary()],
            "runs": [_plain(run) for run in self.runs],
        }
        return json.dumps(facts, indent=1)


def _summary(name: str, runs: list[Run], full_seconds: float) -> Summary:
    near = [run.near for run in runs if run.near is not None]
    steps = [one for run in runs for one in run.denoise.step_seconds]
    peaks = [run.denoise.peak_bytes for run in runs if run.denoise.peak_bytes is not None]
    seconds = _seconds(runs)
    return Summary(
        name=name,
        psnr=_of(mean, (one.psnr for one in near)),
        worst_psnr=_of(min, (one.psnr for one in near)),
        worst_frame_psnr=_of(min, (frame for one in near for frame in one.frame_psnr)),
        ssim=_of(mean, (one.ssim for one in near)),
        worst_ssim=_of(min, (one.ssim for one in near)),
        lpips=_of(mean, (one.lpips for one in near)),
        worst_lpips=_of(max, (one.lpips for one in near)),
        step_seconds=median(steps) if steps else None,
        seconds=seconds,
        speed_up=full_seconds / seconds,
        peak_bytes=max(peaks, default=None),
        density=mean(density_of(run) for run in runs),
    )


def density_of(run: Run) -> float:
    """Attended pairs over all pairs, mean over layers and steps; 1 for full attention."""
    found = [one for layer in run.denoise.layers for one in layer.density if one is not None]
    return mean(found) if found else 1.0


def _seconds(runs: list[Run]) -> float:
    steps = [run.denoise.step_seconds for run in runs]
    if all(steps) and len({len(one) for one in steps}) == 1:
        return sum(map(min, zip(*steps, strict=True)))
    return min(run.denoise.seconds for run in runs)


def _of(how: Any, values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return how(given) if given else None


def _two(first: float | None, second: float | None, form: str, width: int) -> str:
    return "".join(f"{'-' if value is None else format(value, form):>{width}}" for value in (first, second))


def _plain(run: Run) -> dict[str, Any]:
    denoise = {name: value for name, value in dataclasses.asdict(run.denoise).items() if name not in ("path", "shape")}
    frames, height, width, _ = run.denoise.shape
    facts = {"name": run.name, "prompt": run.prompt, "seed": run.seed, "file": run.denoise.path.name}
    facts |= {"frames": frames, "height": height, "width": width}
    return facts | denoise | {"near": None if run.near is None else dataclasses.asdict(run.near)}
