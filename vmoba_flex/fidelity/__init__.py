"""How near videos under VMoBA are to full attention's: the same prompts and noise, denoised under both, and measured.

    frames.py       what a pipeline returns -> uint8 frames
    layers.py       what each layer attends at each step of a denoise
    denoise.py      one denoise under full attention or a config: frames, times, memory, layers
    identity.py     a pipeline, a call, a config, a prompt and a seed -> the key of their denoise
    store.py        finished denoises on disk, by key
    nearness.py     two videos -> PSNR and SSIM of each frame

It needs the extra `compare` (av, matplotlib, numpy, safetensors, torchmetrics, tqdm), imported where it is used.
"""

from vmoba_flex.fidelity.denoise import Denoise, Prompt, run_denoise
from vmoba_flex.fidelity.nearness import Nearness, nearness
from vmoba_flex.fidelity.store import Store

__all__ = ["Denoise", "Nearness", "Prompt", "Store", "nearness", "run_denoise"]
