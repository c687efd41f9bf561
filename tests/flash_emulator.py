"""FlashAttention-4's private entry points in plain PyTorch, for what ``flash_kernels.py`` asks of them.

Like the kernels they read tiles past the end of a sequence, write nothing where they need not, and ask for dtypes,
shapes and layouts. What they leave unwritten is NaN. They compute in float32.
"""

import sys
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

_ROWS, _KEYS = 80, 128  # of a tile in backward


class BlockSparseTensorsTorch(NamedTuple):
    """Counts and lists of cut tiles and of whole ones."""

    cut: Tensor
    cut_list: Tensor
    whole: Tensor
    whole_list: Tensor
    block_size: tuple[int, int]


def installed() -> Any:
    """A context in which flash_attn is this."""
    here = sys.modules[__name__]
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn.cute.block_sparsity")
    return mock.patch.dict(sys.modules, dict.fromkeys(names, here))


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_lse: bool,
    block_sparse_tensors: BlockSparseTensorsTorch, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(B, S, H, D)`` over listed tiles of keys."""
    batch, rows, heads, _ = q.shape
    tile_q, tile_k = block_sparse_tensors.block_size
    counts, lists = _lists(block_sparse_tensors, (batch, heads, rows // tile_q), k.shape[1] // tile_k)
    out = q.new_empty(batch, rows, heads, v.shape[-1]) if out is None else out
    lse = q.new_full((batch, heads, rows), torch.nan, dtype=torch.float32)
    q, k, v = q.float(), k.float(), v.float()
    for b, h, i in _places(counts):
        at = slice(i * tile_q, (i + 1) * tile_q)
        keys = _tokens(lists[b, h, i, : counts[b, h, i]], tile_k)
        scores = q[b, at, h] @ k[b, keys, h].mT * softmax_scale
        # Softmax over no keys is empty, and its product zero.
        out[b, at, h] = (scores.softmax(-1) @ v[b, keys, h]).to(out.dtype)
        lse[b, h, at] = scores.logsumexp(-1)
    return out, lse


def _flash_attn_bwd(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **options: Any) -> Any:
    """Gradients, either of sequences packed one after another or over listed tiles of queries."""
    backward = _of_sequences if "cu_seqlens_q" in options else _of_tiles
    gradients = backward(*(x.float() for x in (q, k, v, out, dout)), lse, **options)
    return tuple(x.to(q.dtype) for x in gradients)


def _of_sequences(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, dlse: Tensor, softmax_scale: float,
    dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    for x in (cu_seqlens_q, cu_seqlens_k, seqused_k):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    rows, slots, used = cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), seqused_k.tolist()
    assert len(rows) == len(slots) == len(used) + 1
    assert rows == sorted(rows)
    assert slots == sorted(slots)
    assert slots[-1] == len(k)
    delta = (out * dout).sum(-1)[:, 0] - dlse[0]
    dq = torch.full_like(q, torch.nan)
    dk[:], dv[:] = torch.nan, torch.nan
    for i, (start, first, keys) in enumerate(zip(rows, slots, used, strict=False)):
        count = rows[i + 1] - start
        assert count <= max_seqlen_q
        assert keys <= min(max_seqlen_k, slots[i + 1] - first)
        q_part, do_part = (_reach(x[:, 0], start, count, _ROWS) for x in (q, dout))
        k_part, v_part = (_reach(x[:, 0], first, keys, _KEYS) for x in (k, v))
        lse_part, delta_part = (_reach(x, start, count, _ROWS) for x in (lse[0], delta))
        # Keys past the end are masked, and so are rows.
        scores = (q_part @ k_part.mT * softmax_scale)[:, :keys]
        p = torch.nn.functional.pad((scores - lse_part[:, None]).exp(), (0, len(k_part) - keys))
        p[count:] = 0
        ds = p * (do_part @ v_part.mT - delta_part[:, None]) * softmax_scale
        dq[start : start + count, 0] = (ds @ k_part)[:count]
        dk[first : first + keys, 0] = (ds.mT @ q_part)[:keys]
        dv[first : first + keys, 0] = (p.mT @ do_part)[:keys]
    return dq, dk, dv


def _of_tiles(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, softmax_scale: float,
    block_sparse_tensors: BlockSparseTensorsTorch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, slots, heads, _ = k.shape
    tile_q, tile_k = block_sparse_tensors.block_size
    counts, lists = _lists(block_sparse_tensors, (batch, heads, slots // tile_k), q.shape[1] // tile_q)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for b, h, j in _places(counts):
        keys = slice(j * tile_k, (j + 1) * tile_k)
        rows = _tokens(lists[b, h, j, : counts[b, h, j]], tile_q)
        q_part, do_part, k_part, v_part = q[b, rows, h], dout[b, rows, h], k[b, keys, h], v[b, keys, h]
        p = (q_part @ k_part.mT * softmax_scale - lse[b, h, rows, None]).exp()
        delta = (out[b, rows, h] * do_part).sum(-1, keepdim=True)
        ds = p * (do_part @ v_part.mT - delta) * softmax_scale
        dq[b, rows, h] += ds @ k_part
        dk[b, keys, h], dv[b, keys, h] = ds.mT @ q_part, p.mT @ do_part
    return dq, dk, dv


def _lists(tiles: BlockSparseTensorsTorch, shape: tuple[int, ...], columns: int) -> tuple[Tensor, Tensor]:
    for x in tiles[:4]:
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert not tiles.cut.any()
    assert tiles.whole.shape == shape
    assert (tiles.whole_list >= 0).all()
    assert (tiles.whole_list < columns).all()
    return tiles.whole, tiles.whole_list.long()


def _places(counts: Tensor) -> list[list[int]]:
    return torch.ones_like(counts).nonzero().tolist()


def _tokens(tiles: Tensor, size: int) -> Tensor:
    """The tokens of some tiles, each of which is there once."""
    assert len(tiles.unique()) == len(tiles)
    return (tiles[:, None] * size + torch.arange(size, device=tiles.device)).flatten()


def _reach(x: Tensor, start: int, count: int, tile: int) -> Tensor:
    """What whole tiles from ``start`` read: what follows a sequence, too, and zeros after everything."""
    padded = torch.cat([x, x.new_zeros(tile, *x.shape[1:])])
    return padded[start : start + -(-count // tile) * tile]
