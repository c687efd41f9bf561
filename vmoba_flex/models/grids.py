"""A forward's arguments -> the grid of its video, for each way that models take one."""

from typing import Any

from vmoba_flex.models.state import Grid


def patched_grid(model: Any, arguments: dict[str, Any]) -> Grid:
    """The grid of latents ``(B, C, frames, height, width)``."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", 1), patch, patch)
    return frames // patch[0], height // patch[1], width // patch[2]


def cogvideox_grid(model: Any, arguments: dict[str, Any]) -> Grid:
    """The grid of latents ``(B, frames, C, height, width)``."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return -(-frames // patch_t), height // patch, width // patch


def given_grid(model: Any, arguments: dict[str, Any]) -> Grid:
    """The grid as the caller gives it, since latents come as tokens."""
    sizes: list[Any] = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(
            f"num_frames, height and width must be given with VMoBA applied to LTX, got {sizes}: LTXPipeline and "
            "LTXImageToVideoPipeline give them"
        )
    return int(sizes[0]), int(sizes[1]), int(sizes[2])
