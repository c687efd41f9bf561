"""The rules in float64, pool by pool, by their definitions: what chooses in ``reference``.

B batch, H heads, N blocks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.reference_gates import chunks_of, ids_of, ranked


def select(scores: Tensor, ids: Tensor, rule: Any) -> Tensor:
    """The selection that ``rule`` makes from ``scores``, bool like ``scores``.

    Args:
        scores: ``(B, H, video tokens, N)``; masses where ``rule.normalize`` is ``"softmax"``.
        ids: block of each token.
        rule: has ``pool`` and ``always``, and ``tau``, ``max_density`` and ``normalize``, or ``k`` and ``density``.
    """
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    kept = torch.isin(blocks, torch.tensor(rule.always, dtype=torch.int64, device=scores.device))
    own = ((ids[:, None].to(scores.device) == blocks) | kept).expand_as(scores)
    selected = own.clone()
    # Each pool as a view whose dims stand in the order that breaks ties: block, query, head.
    views = {
        "query": lambda x: x.flatten(0, 2),
        "block": lambda x: x.permute(0, 3, 2, 1).flatten(0, 1),
        "head": lambda x: x.permute(0, 1, 3, 2).flatten(0, 1),
        "global": lambda x: x.permute(0, 3, 2, 1),
    }
    view = views[rule.pool]
    rows_per_pool = {"query": 1, "block": None, "head": scores.shape[2], "global": scores.shape[1] * scores.shape[2]}
    result = view(selected).clone()
    for pool in range(result.shape[0]):
        flat_scores, flat_own = view(scores)[pool].reshape(-1).double(), view(own)[pool].reshape(-1)
        chosen = _select_pool(flat_scores, flat_own, rule, rows_per_pool[rule.pool], scores.shape[-1])
        result[pool] = chosen.view(result[pool].shape)
    batch, heads, tokens, blocks = scores.shape
    if rule.pool == "query":
        return result.view(batch, heads, tokens, blocks)
    if rule.pool == "head":
        return result.view(batch, heads, blocks, tokens).transpose(2, 3)
    return result.reshape(batch, blocks, tokens, heads).permute(0, 3, 2, 1)


def select_in_chunks(scores: Tensor, blocks: Tensor, partition: Any, rule: Any, head_dim: int) -> Tensor:
    """The selection of queries that choose among the blocks of their chunk and before, and compete within their chunk.

    Args:
        scores: the gate's ``(B, H, queries, N)``.
        blocks: own block of each query.
        partition: the blocks; one chunk if it is not causal.
        rule: as in ``select``; what it ranks is made from the scores of these blocks.
        head_dim: of query and key.
    """
    ids, (of_tokens, of_blocks) = ids_of(partition), chunks_of(partition)
    selection = torch.zeros_like(scores, dtype=torch.bool)
    for chunk in of_blocks[blocks.cpu()].unique().tolist():
        rows, past = of_blocks[blocks.cpu()] == chunk, int((of_blocks <= chunk).sum())
        weights = ranked(scores[:, :, rows, :past], ids[of_tokens <= chunk].to(scores.device), rule, head_dim)
        selection[:, :, rows, :past] = select(weights, blocks[rows], rule)
    return selection


def _select_pool(scores: Tensor, own: Tensor, rule: Any, rows: int | None, num_blocks: int) -> Tensor:
    """One pool, entries in the order that breaks ties."""
    ranked = sorted(enumerate(scores.tolist()), key=lambda pair: (0, 0.0) if math.isnan(pair[1]) else (1, -pair[1]))
    is_own = own.tolist()
    others = [i for i, _ in ranked if not is_own[i]]
    if hasattr(rule, "tau"):
        others = others[: _threshold_length(scores, own, others, rule)]
        if rule.max_density is not None:
            cap = math.floor(rule.max_density * len(scores) + 0.5)
            others = others[: max(0, cap - int(own.sum()))]
    else:
        assert rows is not None
        k = min(rule.k, num_blocks) if rule.k is not None else max(1, math.floor(rule.density * num_blocks + 0.5))
        others = others[: max(0, k * rows - int(own.sum()))]
    selected = own.clone()
    selected[others] = True
    return selected


def _threshold_length(scores: Tensor, own: Tensor, others: list[int], rule: Any) -> int:
    if not scores.isfinite().all():
        return len(others)
    shares = scores
    if rule.normalize == "minmax":
        spread = scores.max() - scores.min()
        shares = (scores - scores.min()) / (spread if spread > 1e-6 else 1.0)
    total = shares.sum() + 1e-6
    rest = max(0.0, float(rule.tau - shares[own].sum() / total))
    if rest == 0:
        return 0
    reached = shares[others].cumsum(0) / total >= rest
    return int(reached.int().argmax()) + 1 if reached.any() else len(others)
