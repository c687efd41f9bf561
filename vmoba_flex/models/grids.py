"""A forward's arguments -> the grid of its video, for each way that models take one, and the tokens before it."""

import math
from typing import Any

from torch import Tensor

from vmoba_flex.models.state import Grid

Arguments = dict[str, Any]


def patched_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of latents ``(B, C, frames, height, width)``."""
    return _patched(model, arguments["hidden_states"].shape[2:])


def frames_first_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of latents ``(B, frames, C, height, width)``."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    return _patched(model, (frames, height, width))


def channels_last_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of latents ``(B, frames, height, width, C)``."""
    return _patched(model, arguments["hidden_states"].shape[1:4])


def _patched(model: Any, sizes: Any) -> Grid:
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    frames, height, width = (size // of_patch for size, of_patch in zip(sizes, patch, strict=True))
    return frames, height, width


def given_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid as the caller gives it, since latents come as tokens."""
    sizes: list[Any] = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(
            f"num_frames, height and width must be given with VMoBA applied to {type(model).__name__}, got {sizes}: "
            "pipelines of text and of image to video give them"
        )
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def animated_grid(model: Any, arguments: Arguments) -> Grid:
    """Wan-Animate's grid without its first frame, which is the reference."""
    frames, height, width = patched_grid(model, arguments)
    return frames - 1, height, width


def kandinsky5_grid(model: Any, arguments: Arguments) -> Grid:
    """Kandinsky 5's grid, unless its own sparse attention has another order of tokens."""
    if arguments.get("sparse_params") is not None:
        raise ValueError(
            "sparse_params must be None with VMoBA applied, got the model's own sparse attention (NABLA): load it with "
            'attention_type="regular"'
        )
    return channels_last_grid(model, arguments)


def kandinsky6_grid(model: Any, arguments: Arguments) -> Grid:
    """Kandinsky 6's grid without reference frames, which come last and have the time of another frame."""
    frames, height, width = channels_last_grid(model, arguments)
    positions = arguments.get("visual_rope_pos")
    frames = frames if positions is None else len(set(positions[0].tolist()))
    return frames, height, width


def framepack_history(model: Any, arguments: Arguments) -> int:
    """The tokens of Framepack's history: frames as they are, and frames in patches 2 and 4 times as large."""
    total = 0
    for name, times in (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4)):
        if arguments.get(name) is not None and arguments.get(f"indices_{name}") is not None:
            patch = times, 2 * times, 2 * times
            total += math.prod(-(-size // of) for size, of in zip(arguments[name].shape[2:], patch, strict=True))
    return total


def minimax_h3_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of MiniMax-H3's target video: the rows of its packed sequence after all audio."""
    return _grid_of_positions(arguments["position_ids"][int(arguments["audio_indices"].max()) + 1 :])


def cosmos3_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of Cosmos 3's video, which must be one, right after the text."""
    shapes, rows = arguments["vision_token_shapes"], arguments["vision_sequence_indexes"]
    if len(shapes) != 1 or int(rows[0]) != arguments["und_len"] or int(rows[-1]) - int(rows[0]) + 1 != len(rows):
        raise ValueError(f"vision tokens must be those of one video, after the text, with VMoBA applied, got {shapes}")
    frames, height, width = shapes[0]
    return frames, height, width


def cosmos3_text(model: Any, arguments: Arguments) -> int:
    """The text tokens of Cosmos 3, whose queries have a call of their own."""
    return arguments["und_len"]


def text_tokens(model: Any, arguments: Arguments) -> int:
    """Text tokens that are as many as arrive."""
    return arguments["encoder_hidden_states"].shape[1]


def flux2_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of Flux 2's image, before reference images, which have other times."""
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError(f"kv_cache_mode must be None with VMoBA applied, got {arguments['kv_cache_mode']!r}")
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    return _grid_of_positions(ids[ids[:, 0] == ids[0, 0], :3])


def qwen_image_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of Qwen-Image's image, before those that it edits."""
    first = arguments["img_shapes"][0]
    frames, height, width = first[0] if isinstance(first, list) else first
    return frames, height, width


def z_image_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of Z-Image's images, which must be of one size."""
    images: list[Any] = arguments["x"]
    sizes = [tuple(image.shape) if isinstance(image, Tensor) else "a list" for image in images]
    if "a list" in sizes or len(set(sizes)) > 1:
        raise ValueError(f"x must be a list of images of one size with VMoBA applied, got {sizes}")
    _, frames, height, width = images[0].shape
    patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return frames // patch_t, height // patch, width // patch


def krea2_grid(model: Any, arguments: Arguments) -> Grid:
    """The grid of Krea 2's image, after the text."""
    return _grid_of_positions(arguments["position_ids"][text_tokens(model, arguments) :])


def _grid_of_positions(positions: Tensor) -> Grid:
    """The grid of rotary positions ``(tokens, 3)``: of frames, rows and columns."""
    frames, height, width = (len(axis.unique()) for axis in positions.unbind(1))
    if frames * height * width != len(positions):
        raise ValueError(
            f"position ids must be those of a grid with VMoBA applied, got {len(positions)} for {frames} frames, "
            f"{height} rows and {width} columns"
        )
    return frames, height, width
