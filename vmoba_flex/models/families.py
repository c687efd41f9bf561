"""How a layer of each model family of diffusers makes query, key and value, and where its grid comes from.

B batch, H heads, S tokens, D head dim.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vmoba_flex.models.processor import VMoBAProcessor

Grid = tuple[int, int, int]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of channels: rotary position embedding (arXiv 2104.09864), in float32.

    Args:
        x: ``(..., channels)``.
        cos: broadcast against x, equal on both channels of a pair.
        sin: broadcast against x, equal on both channels of a pair.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _split_heads(attn: Any, x: Tensor) -> Tensor:
    """``(B, tokens, H * D)`` -> ``(B, H, tokens, D)``."""
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _project(attn: Any, x: Tensor, fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``(B, tokens, H * D)``."""
    return attn.to_qkv(x).chunk(3, dim=-1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))


def _normalized_heads(
    attn: Any, projected: Iterable[Tensor], norm_q: nn.Module | None, norm_k: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, H, tokens, D)`` of what was projected, query and key normalised within a head."""
    query, key, value = (_split_heads(attn, x) for x in projected)
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _project_out(attn: Any, x: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x))


class WanProcessor(VMoBAProcessor):
    """Wan 2.1 and 2.2, SkyReels-V2: normalised over all heads, then rotated; text in a layer of its own."""

    def sparse(self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> Tensor:
        """See ``VMoBAProcessor.sparse``."""
        if mask is not None:
            raise ValueError("attention_mask must be None with VMoBA applied (no block-causal mode), got a mask")
        query, key, value = _project(attn, video, attn.fused_projections)
        query, key, value = (_split_heads(attn, x) for x in (attn.norm_q(query), attn.norm_k(key), value))
        # Cosines stand at even, sines at odd channels of (1, tokens, 1, D).
        cos, sin = (x.transpose(1, 2)[..., i::2].repeat_interleave(2, -1) for i, x in enumerate(rotary))
        return _project_out(attn, self.attend(rotate(query, cos, sin), rotate(key, cos, sin), value))


class LTXProcessor(VMoBAProcessor):
    """LTX: rotated before the heads are split; text in a layer of its own."""

    def sparse(self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> Tensor:
        """See ``VMoBAProcessor.sparse``."""
        if mask is not None:
            raise ValueError("attention_mask must be None in self-attention with VMoBA applied, got a mask")
        query, key, value = _project(attn, video)
        query, key = rotate(attn.norm_q(query), *rotary), rotate(attn.norm_k(key), *rotary)
        query, key, value = (_split_heads(attn, x) for x in (query, key, value))
        return _project_out(attn, self.attend(query, key, value))


class CogVideoXProcessor(VMoBAProcessor):
    """CogVideoX: text before the video, through the same projections."""

    joint: ClassVar[bool] = True

    def sparse(
        self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``VMoBAProcessor.sparse``."""
        if text is None or mask is not None:
            raise ValueError("attention_mask must be None, and text given, with VMoBA applied to CogVideoX")
        length = text.shape[1]
        fused = type(self.stock).__name__.startswith("Fused")  # as diffusers itself tells them apart
        projected = _project(attn, torch.cat([text, video], 1), fused)
        query, key, value = _normalized_heads(attn, projected, attn.norm_q, attn.norm_k)
        if rotary is not None:
            query, key = (torch.cat([x[:, :, :length], rotate(x[:, :, length:], *rotary)], 2) for x in (query, key))
        output = _project_out(attn, self.attend(query, key, value, prefix=length))
        return output[:, length:], output[:, :length]


class _SuffixProcessor(VMoBAProcessor):
    """Text after the video, some of it padding, which is never attended."""

    joint: ClassVar[bool] = True

    def sparse(
        self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``VMoBAProcessor.sparse``."""
        if text is None or mask is None:
            raise ValueError("encoder_hidden_states and attention_mask must be given with VMoBA applied, got None")
        length = text.shape[1]
        valid = self.text_mask(mask, length)
        # Text has no positions here, so valid tokens can go first.
        order = valid.sort(stable=True, dim=1, descending=True).indices
        query, key, value = self.project(attn, video, _reorder(text, order), rotary)
        output = self.attend(query, key, value, suffix=length, text_lengths=valid.sum(1))
        video, text = output.split([output.shape[1] - length, length], 1)
        return self.finish(attn, video, _reorder(text, order.argsort(1)), valid)

    def project(self, attn: Any, video: Tensor, text: Tensor, rotary: Any) -> list[Tensor]:
        """Query, key and value ``(B, H, S, D)``, text by projections of its own."""
        query, key, value = _normalized_heads(attn, _project(attn, video), attn.norm_q, attn.norm_k)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        added = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        added = _normalized_heads(attn, added, attn.norm_added_q, attn.norm_added_k)
        return [torch.cat(pair, 2) for pair in zip((query, key, value), added, strict=True)]

    def text_mask(self, mask: Tensor, length: int) -> Tensor:
        """Which text tokens are valid, bool ``(B, text tokens)``."""
        return mask.bool()

    def finish(self, attn: Any, video: Tensor, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Projects both streams out."""
        return _project_out(attn, video), attn.to_add_out(text)


def _reorder(text: Tensor, order: Tensor) -> Tensor:
    """Reorders tokens ``(B, tokens, channels)`` by ``order`` ``(B, tokens)``."""
    return text.gather(1, order[..., None].expand_as(text))


class HunyuanVideoProcessor(_SuffixProcessor):
    """HunyuanVideo: two streams in dual layers, one in single layers; the mask is over video and text."""

    def project(self, attn: Any, video: Tensor, text: Tensor, rotary: Any) -> list[Tensor]:
        """See ``_SuffixProcessor``; single layers project both streams as one, and rotate the video's tokens."""
        if attn.add_q_proj is not None:
            return super().project(attn, video, text, rotary)
        tokens, length = torch.cat([video, text], 1), video.shape[1]
        query, key, value = _normalized_heads(attn, _project(attn, tokens), attn.norm_q, attn.norm_k)
        query, key = (torch.cat([rotate(x[:, :, :length], *rotary), x[:, :, length:]], 2) for x in (query, key))
        return [query, key, value]

    def text_mask(self, mask: Tensor, length: int) -> Tensor:
        """The end of the model's mask ``(B, 1, 1, S)``."""
        return mask[:, 0, 0, -length:].bool()

    def finish(self, attn: Any, video: Tensor, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Single layers have no projections here."""
        out, add_out = getattr(attn, "to_out", None), getattr(attn, "to_add_out", None)
        return video if out is None else _project_out(attn, video), text if add_out is None else add_out(text)


class HunyuanVideo15Processor(_SuffixProcessor):
    """HunyuanVideo-1.5: two streams; the mask is over the text. The stock processor makes an S x S mask of it."""

    has_dense: ClassVar[bool] = True


class MochiProcessor(_SuffixProcessor):
    """Mochi: two streams; cosines and sines for each head and pair; padding comes out as zero."""

    def project(self, attn: Any, video: Tensor, text: Tensor, rotary: Any) -> list[Tensor]:
        """See ``_SuffixProcessor``; ``rotary``: cosines and sines ``(video tokens, H, D / 2)``."""
        return super().project(attn, video, text, [x.transpose(0, 1).repeat_interleave(2, -1) for x in rotary])

    def finish(self, attn: Any, video: Tensor, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer projects no text."""
        text = text * valid[..., None]
        return _project_out(attn, video), attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


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


def ltx_grid(model: Any, arguments: dict[str, Any]) -> Grid:
    """The grid as the caller gives it, since latents come as tokens."""
    sizes: list[Any] = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(
            f"num_frames, height and width must be given with VMoBA applied to LTX, got {sizes}: LTXPipeline and "
            "LTXImageToVideoPipeline give them"
        )
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def refuse_block_causal(model: Any) -> str | None:
    """Why a block-causal model cannot take VMoBA; None for any other."""
    count = model.config.num_frame_per_block
    return f"num_frame_per_block must be 1 (no block-causal mode), got {count}" if count > 1 else None
