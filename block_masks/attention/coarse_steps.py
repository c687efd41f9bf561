"""Coarse keys: what a query did not choose takes part in its softmax, one key for each part of a group.

A group that a query chose is attended key by key. A group that it did not choose is attended as a few coarse keys, such
as the means of its parts: with logit ``scale * query . key + bias``. ``row_attention.py`` and ``slot_attention.py``
merge them into attention whose log-sum-exp is known, forward and backward; ``coarse_kernels.py`` is the same in Triton.

Shapes: ``H`` heads of all samples, ``S`` queries, ``C`` coarse keys, ``G`` groups, ``D`` head dim.
"""

from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

from block_masks.precision import without_autocast

MAX_KERNEL_DIM = 256  # of the forms in Triton
# Triton forms index the words of a head, one for each row of choices and 64 coarse keys, with int32. Words, and the
# heads of all samples, are programs along dims of a grid that end here.
_WORD_BITS, _MAX_WORDS, _MAX_PROGRAMS = 64, 2**31 - 1, 65_535
# Scores held at a time: 256 MiB in float32.
_CHUNK_SCORES = 2**26


class CoarseKeys(NamedTuple):
    """One key in place of several.

    Attributes:
        key: ``(H, C, D)``; with fewer key heads than query heads, query head h uses key head ``h // (H // key heads)``.
        value: ``(H, C, value dim)``.
        bias: float32 ``(C,)``, added to a coarse key's scaled scores: the log of how many keys it stands for.
        group: int64 ``(C,)``, the group that it is a part of: only queries that did not choose it attend it.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    group: Tensor

    @classmethod
    def given(cls, *tensors: Tensor | None) -> Self | None:
        """As an op was given them, or not."""
        present = [x for x in tensors if x is not None]
        return cls(*present) if present else None


def check_coarse_size(name: str, heads: int, rows: int, cells: int) -> None:
    """Raises ``ValueError`` if the Triton forms cannot index so many coarse keys.

    Args:
        name: the argument to blame.
        heads: of all samples.
        rows: rows of choices, of one head.
        cells: C, coarse keys of one head.
    """
    words = -(-cells // _WORD_BITS)
    if rows * words > _MAX_WORDS:
        raise ValueError(
            f"{name} must keep rows * ceil(coarse keys / {_WORD_BITS}) below 2**31, which kernels index, got "
            f"{rows} * {words}: let each coarse key stand for more keys"
        )
    if words > _MAX_PROGRAMS:
        most = _MAX_PROGRAMS * _WORD_BITS
        raise ValueError(f"{name} must have at most {most} coarse keys, got {cells}: let each stand for more keys")
    if heads > _MAX_PROGRAMS:
        raise ValueError(
            f"{name} must go with batch * heads of at most {_MAX_PROGRAMS} on a GPU, got {heads}: split the batch"
        )


def merge_coarse(
    query: Tensor, coarse: CoarseKeys, selected: Tensor, output: Tensor, lse: Tensor, merged: tuple[Tensor, Tensor],
    scale: float, together: int = 1,
) -> None:  # fmt: skip
    """Merges coarse keys into attention over chosen groups.

    Args:
        query: ``(H, S, D)``.
        coarse: keys of the groups that were not chosen.
        selected: bool ``(H, rows, G)``: which groups each ``together`` queries chose.
        output: ``(H, S, value dim)``, attention over the chosen groups.
        lse: ``(H, S)``, its natural log-sum-exp, float32 at least; -inf where a query chose nothing.
        merged: where the merged output, which may be ``output`` itself, and log-sum-exp are written. A query that chose
            every group keeps its own, bit for bit.
        scale: factor on the scores.
        together: queries to a row of ``selected``.
    """
    for part, scores in _scores(query, coarse, selected, scale, together):
        tail = scores.logsumexp(-1)
        whole = torch.logaddexp(lse[:, part], tail)
        there = tail != -torch.inf
        own = torch.where(lse[:, part] == -torch.inf, 0, (lse[:, part] - whole).exp())
        p = torch.where(scores == -torch.inf, 0, (scores - whole[..., None]).exp())
        with torch.autocast(query.device.type, enabled=False):
            mixed = own[..., None] * output[:, part] + p @ _of_heads(coarse.value, len(query)).to(p.dtype)
            # By the rounding of log-sum-exps, the weights need not sum to 1; see ``row_steps.merge_rows``.
            mixed = mixed / (own + p.sum(-1))[..., None]
        merged[0][:, part] = torch.where(there[..., None], mixed.to(output.dtype), output[:, part])
        merged[1][:, part] = torch.where(there, whole, lse[:, part])


def coarse_backward(
    query: Tensor, coarse: CoarseKeys, selected: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, grad_query: Tensor,
    scale: float, together: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients through coarse keys.

    Args:
        query: as in ``merge_coarse``.
        coarse: as there.
        selected: as there.
        grad: ``(H, S, value dim)``, the merged output's gradient.
        lse: ``(H, S)``, merged.
        delta: ``(H, S)``, the sum over the value dim of ``grad`` times the merged output.
        grad_query: ``(H, S, D)``, to which the gradient of query is added.
        scale: as there.
        together: as there.

    Returns:
        Gradients of the coarse keys and values, like these.
    """
    exact = lse.dtype
    key, value = (_of_heads(x, len(query)).to(exact) for x in (coarse.key, coarse.value))
    sums = [torch.zeros(len(query), *x.shape[1:], dtype=exact, device=x.device) for x in (coarse.key, coarse.value)]
    for part, scores in _scores(query, coarse, selected, scale, together):
        do = grad[:, part].to(exact)
        p = torch.where(scores == -torch.inf, 0, (scores - lse[:, part, None]).exp())
        with torch.autocast(query.device.type, enabled=False):
            ds = p * (do @ value.mT - delta[:, part, None]) * scale
            ds = torch.where(scores == -torch.inf, 0, ds)
            grad_query[:, part] += (ds @ key).to(grad_query.dtype)
            for total, x in zip(sums, (ds.mT @ query[:, part].to(exact), p.mT @ do), strict=True):
                total += x
    grad_key, grad_value = (
        total.unflatten(0, (len(x), -1)).sum(1).to(x.dtype) for total, x in zip(sums, coarse[:2], strict=True)
    )
    return grad_key, grad_value


def split_grad(grad: Tensor, output: Tensor, lse: Tensor, merged_lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """What of a merged output's gradient goes to the attention that was merged into it.

    Args:
        grad: ``(..., value dim)``, the merged output's gradient.
        output: like ``grad``, before the merge.
        lse: ``(...)``, before the merge.
        merged_lse: ``(...)``.
        delta: ``(...)``, the sum over the value dim of ``grad`` times the merged output.

    Returns:
        Gradients of ``output`` and ``lse``.
    """
    weight = torch.where(lse == -torch.inf, 0, (lse - merged_lse).exp())
    of_output = (grad * weight[..., None]).to(grad.dtype)
    return of_output, weight * ((grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1) - delta)


def _scores(
    query: Tensor, coarse: CoarseKeys, selected: Tensor, scale: float, together: int
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of a chunk of queries ``(H, queries, C)``, -inf where a query chose the group; the last dim as is."""
    heads, queries, _ = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    key, bias = _of_heads(coarse.key, heads).to(exact), coarse.bias.to(exact)
    step = max(1, _CHUNK_SCORES // (heads * max(1, len(coarse.bias))) // together) * together
    for start in range(0, queries, step):
        part = slice(start, min(start + step, queries))
        rows = slice(start // together, -(-part.stop // together))
        chosen = selected[:, rows].index_select(-1, coarse.group)
        chosen = chosen.repeat_interleave(together, 1)[:, : part.stop - start]
        with without_autocast(query):
            scores = query[:, part].to(exact) @ key.mT * scale + bias
        yield part, scores.masked_fill(chosen, -torch.inf)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values of each query head."""
    return x.repeat_interleave(heads // len(x), 0)
