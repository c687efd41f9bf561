"""Videos under full attention and configs, from the same prompts and noise: how near, how fast, how dense."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmoba_flex.checks import check_count, check_positive
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.comparison import Comparison, Run
from vmoba_flex.fidelity.denoise import Prompt, arguments_of, check_not_applied, run_denoise
from vmoba_flex.fidelity.identity import identity_of, key_of
from vmoba_flex.fidelity.nearness import nearness
from vmoba_flex.fidelity.progress import Progress
from vmoba_flex.fidelity.store import Store
from vmoba_flex.user_error import check_extra

FULL = "full attention"
"""The name of what configs are compared with."""


def compare(
    pipe: Any,
    configs: VMoBAConfig | Mapping[str, VMoBAConfig],
    *,
    prompts: Prompt | Sequence[Prompt],
    seeds: Sequence[int] = (0,),
    call: Mapping[str, Any] | None = None,
    output: Path | str = "vmoba_compare",
    fps: int = 16,
    progress: bool = True,
) -> Comparison:
    """How near a pipeline's videos under VMoBA are to its videos under full attention.

    Each prompt and seed is denoised under full attention and under each config, from the same noise. ``output`` gets
    ``index.html``, a page that plays the videos side by side and works without a network, ``videos.mp4``,
    ``frames.png`` and ``results.json``. Finished denoises stay in ``output/denoises``: a call that was stopped goes on
    where it was, and one with more configs, prompts or seeds runs only what is new. One video is in memory at a time.

    Args:
        pipe: a pipeline that ``apply_vmoba`` takes, without VMoBA applied; also with LoRA, offload or quantized
            weights. It is left as it was.
        configs: a config, or several by name.
        prompts: texts; or mappings of arguments of the pipeline's call, such as
            ``{"prompt": "a cat", "image": image}``.
        seeds: of the noise, drawn on the CPU, from 0.
        call: further arguments of each call, such as ``{"num_frames": 81, "num_inference_steps": 50}``.
        output: a folder, which is made if it does not exist.
        fps: of the videos that are written.
        progress: whether to show a progress bar.

    Returns:
        All runs, and a summary of each config: ``print(comparison.table())``.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a value is out of range, VMoBA is applied already, or a config does not fit the pipeline.

    Example:
        >>> configs = {"paper": VMoBAConfig.paper("inference"), "fast": VMoBAConfig.fast()}
        >>> found = compare(pipe, configs, prompts=["a cat that plays the piano"])  # doctest: +SKIP
        >>> print(found.table())  # doctest: +SKIP
    """
    check_installed()
    from vmoba_flex.fidelity.report import write_report

    named = _named(configs)
    call = {} if call is None else call
    wanted = _pairs(pipe, prompts, seeds, call)
    check_positive("fps", fps)
    check_not_applied(pipe)
    store = Store(Path(output) / "denoises")
    identity = identity_of(pipe)
    runs: list[Run] = []
    with Progress(len(wanted) * (1 + len(named)), progress, pipe) as bar:
        for prompt, seed in wanted:
            reference = None
            for name, config in {FULL: None, **named}.items():
                bar.begin(f"{name}, {words_of(prompt):.24}, seed {seed}")
                key = key_of(identity, pipe, config, prompt, seed, call)
                run = functools.partial(run_denoise, pipe, config, prompt, seed, call, progress=bar.step)
                with _kept(store):
                    stored = store.get_or_run(key, run)
                reference = reference or stored
                near = None if config is None else nearness(reference.runs(), stored.runs())
                runs.append(Run(name, words_of(prompt), seed, stored, near))
                bar.end()
        found = Comparison(
            type(pipe).__name__, {name: f"{one!r:.200}" for name, one in call.items()}, named, tuple(runs)
        )
        write_report(found, Path(output), fps, bar)
    return found


def check_installed() -> None:
    """Raises ``UserError`` unless all packages of the extra ``compare`` are there."""
    check_extra("compare", "av", "matplotlib", "numpy", "safetensors", "torchmetrics", "tqdm")


def words_of(prompt: Prompt) -> str:
    """A prompt's text, or what stands for it."""
    if isinstance(prompt, str):
        return prompt
    text = prompt.get("prompt")
    return text if isinstance(text, str) else ", ".join(sorted(prompt))


def _named(configs: Any) -> dict[str, VMoBAConfig]:
    named = {"VMoBA": configs} if isinstance(configs, VMoBAConfig) else configs
    if not isinstance(named, Mapping) or not all(
        isinstance(name, str) and isinstance(config, VMoBAConfig) for name, config in named.items()
    ):
        raise TypeError(f"configs must be a VMoBAConfig or a mapping from names to these, got {configs!r:.80}")
    if not named or FULL in named:
        raise ValueError(f"configs must have one or more names other than {FULL!r}, got {sorted(named)}")
    return dict(named)


def _pairs(pipe: Any, prompts: Any, seeds: Any, call: Mapping[str, Any]) -> list[tuple[Prompt, int]]:
    """Each prompt with each seed, checked."""
    prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    seeds = list(seeds)
    for name, values in (("prompts", prompts), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name} must be one or more, got none")
    for seed in seeds:
        check_count("seeds", seed)
    for prompt in prompts:
        arguments_of(pipe, prompt, call)
    return [(prompt, seed) for prompt in prompts for seed in dict.fromkeys(seeds)]


@contextlib.contextmanager
def _kept(store: Store) -> Any:
    """Says in an error of the pipeline that what is finished stays."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Finished denoises stay in {store.folder}: the same call goes on from there.")
        raise
