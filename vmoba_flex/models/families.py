"""How a layer makes query, key and value, in families whose stock processors the hook does not serve.

Those of CogVideoX, EasyAnimate, Allegro and Mochi call ``scaled_dot_product_attention`` themselves, Cosmos' names no
backend, and HunyuanVideo-1.5's makes an S x S mask first.

B batch, H heads, S tokens, D head dim.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vmoba_flex.models.processor import VMoBAProcessor

Streams = tuple[Tensor, Tensor]  # the video's and the text's


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


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for pairs of a channel in the first half and one in the second."""
    first, second = x.chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1).float() * sin).to(x.dtype)


def _rotate_after(length: int, x: Tensor, rotary: Any) -> Tensor:
    """Rotates all tokens of ``(B, H, S, D)`` but the first ``length``, which are text."""
    return torch.cat([x[:, :, :length], rotate(x[:, :, length:], *rotary)], 2)


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


def _text_heads(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of text that has projections of its own."""
    added = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    return _normalized_heads(attn, added, attn.norm_added_q, attn.norm_added_k)


def _project_out(attn: Any, x: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x))


class CosmosProcessor(VMoBAProcessor):
    """Cosmos: rotated by halves of the channels; text in a layer of its own."""

    def sparse(self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> Tensor:
        """See ``VMoBAProcessor.sparse``."""
        if mask is not None:
            raise ValueError("attention_mask must be None with VMoBA applied to Cosmos, got a mask")
        query, key, value = _normalized_heads(attn, _project(attn, video), attn.norm_q, attn.norm_k)
        return _project_out(attn, self.attend(rotate_halves(query, *rotary), rotate_halves(key, *rotary), value))


class AllegroProcessor(VMoBAProcessor):
    """Allegro: thirds of the channels rotated by halves, for frame, row and column; text in a layer of its own."""

    def sparse(self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> Tensor:
        """See ``VMoBAProcessor.sparse``; ``rotary``: cosines and sines by position, and the positions of each token."""
        if mask is not None:
            raise ValueError("attention_mask must be None with VMoBA applied to Allegro, got a mask")
        waves = [[x[at][:, None] for x in axis] for axis, at in zip(*rotary, strict=True)]
        query, key, value = (_split_heads(attn, x) for x in _project(attn, video))
        query, key = (
            torch.cat([rotate_halves(third, *wave) for third, wave in zip(x.chunk(3, -1), waves, strict=True)], -1)
            for x in (query, key)
        )
        return _project_out(attn, self.attend(query, key, value))


class CogVideoXProcessor(VMoBAProcessor):
    """CogVideoX: text before the video, through the same projections."""

    joint = True

    def sparse(self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> Streams:
        """See ``VMoBAProcessor.sparse``."""
        if text is None or mask is not None:
            raise ValueError("attention_mask must be None, and text given, with VMoBA applied to CogVideoX")
        length = text.shape[1]
        fused = type(self.stock).__name__.startswith("Fused")  # as diffusers itself tells them apart
        projected = _project(attn, torch.cat([text, video], 1), fused)
        query, key, value = _normalized_heads(attn, projected, attn.norm_q, attn.norm_k)
        if rotary is not None:
            query, key = (_rotate_after(length, x, rotary) for x in (query, key))
        output = _project_out(attn, self.attend(query, key, value, prefix=length))
        return output[:, length:], output[:, :length]


class EasyAnimateProcessor(VMoBAProcessor):
    """EasyAnimate: text before the video; only its first layers have projections of text, and project it out."""

    joint = True

    def sparse(self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> Streams:
        """See ``VMoBAProcessor.sparse``."""
        if text is None or mask is not None:
            raise ValueError("attention_mask must be None, and text given, with VMoBA applied to EasyAnimate")
        length, one_stream = text.shape[1], attn.add_q_proj is None
        video = torch.cat([text, video], 1) if one_stream else video
        parts = _normalized_heads(attn, _project(attn, video), attn.norm_q, attn.norm_k)
        if not one_stream:
            parts = tuple(torch.cat(pair, 2) for pair in zip(_text_heads(attn, text), parts, strict=True))
        query, key, value = parts
        query, key = _rotate_after(length, query, rotary), _rotate_after(length, key, rotary)
        output = self.attend(query, key, value, prefix=length)
        text = output[:, :length]
        return _project_out(attn, output[:, length:]), text if one_stream else attn.to_add_out(text)


class _SuffixProcessor(VMoBAProcessor):
    """Text after the video, some of it padding, which is never attended."""

    joint = True

    def sparse(self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> Streams:
        """See ``VMoBAProcessor.sparse``."""
        if text is None or mask is None:
            raise ValueError("encoder_hidden_states and attention_mask must be given with VMoBA applied, got None")
        length, valid = text.shape[1], mask.bool()
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
        return [torch.cat(pair, 2) for pair in zip((query, key, value), _text_heads(attn, text), strict=True)]

    def finish(self, attn: Any, video: Tensor, text: Tensor, valid: Tensor) -> Streams:
        """Projects both streams out."""
        return _project_out(attn, video), attn.to_add_out(text)


def _reorder(text: Tensor, order: Tensor) -> Tensor:
    """Reorders tokens ``(B, tokens, channels)`` by ``order`` ``(B, tokens)``."""
    return text.gather(1, order[..., None].expand_as(text))


class HunyuanVideo15Processor(_SuffixProcessor):
    """HunyuanVideo-1.5: two streams; the mask is over the text. The stock processor makes an S x S mask of it."""

    has_dense: ClassVar[bool] = True


class MochiProcessor(_SuffixProcessor):
    """Mochi: two streams; cosines and sines for each head and pair; padding comes out as zero."""

    def project(self, attn: Any, video: Tensor, text: Tensor, rotary: Any) -> list[Tensor]:
        """See ``_SuffixProcessor``; ``rotary``: cosines and sines ``(video tokens, H, D / 2)``."""
        return super().project(attn, video, text, [x.transpose(0, 1).repeat_interleave(2, -1) for x in rotary])

    def finish(self, attn: Any, video: Tensor, text: Tensor, valid: Tensor) -> Streams:
        """The last layer projects no text."""
        text = text * valid[..., None]
        return _project_out(attn, video), attn.to_add_out(text) if hasattr(attn, "to_add_out") else text
