"""How near videos under VMoBA are to full attention's: the same prompts and noise, denoised under both, and measured.

    frames.py       what a pipeline returns -> uint8 frames
    layers.py       what each layer attends at each step of a denoise
    recall.py       what share of full attention's mass each layer attends at one of them
    denoise.py      one denoise under full attention or a config: frames, times, memory, layers
    identity.py     a pipeline, a call, a config, a prompt and a seed -> the key of their denoise
    store.py        finished denoises on disk, by key
    nearness.py     two videos -> PSNR and SSIM of each frame, and LPIPS where it is installed
    comparison.py   all runs -> a summary of each config, text, JSON
    progress.py     a progress bar over denoises
    movie.py        paired runs -> an MP4: videos side by side, and their differences
    picture.py      paired runs -> a PNG
    page.py         a comparison and its MP4 -> a page of HTML, from page.html
    report.py       writes the files
    compare.py      compare: prompts, seeds and configs -> all of it

It needs the extra `compare` (av, matplotlib, numpy, safetensors, torchmetrics, tqdm), imported where it is used.
"""

from vmoba_flex.fidelity.compare import compare
from vmoba_flex.fidelity.comparison import Comparison, Run, Summary
from vmoba_flex.fidelity.denoise import Denoise, Prompt, run_denoise
from vmoba_flex.fidelity.layers import LayerSteps
from vmoba_flex.fidelity.nearness import Nearness, nearness
from vmoba_flex.fidelity.store import Store, Stored

__all__ = [
    "Comparison",
    "Denoise",
    "LayerSteps",
    "Nearness",
    "Prompt",
    "Run",
    "Store",
    "Stored",
    "Summary",
    "compare",
    "nearness",
    "run_denoise",
]
