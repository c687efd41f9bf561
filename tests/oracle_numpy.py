"""The whole of VMoBA in plain NumPy and float64, written to be read rather than run fast.

An independent oracle: it imports only NumPy and shares no code with the library that it checks. It reads in the order
in which the data flows: grid -> block ids -> gate -> selection -> mask -> attention. Source: arXiv 2506.23858; the
exact rules, where the paper leaves room, are those that ``vmoba_flex.rules`` states.

Symbols: B samples, H query heads, Hkv key heads, S video tokens in raster order, N blocks, D head dim, P and Q prefix
and suffix tokens, L = P + S + Q. A "row" is one (head, query), a "pair" one (head, query, block).
"""

import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPS = 1e-6  # of the published threshold rule: the least span it divides by, and the guard added to the total


def block_ids(grid: tuple[int, int, int], block: tuple[int, int, int], chunk: int | None = None) -> NDArray[np.int64]:
    """Block id of every token, (T*H*W,), for a grid (T, H, W) cut into cells of at most ``block`` tokens.

    With ``chunk``, so many frames are cut as a grid of their own, and the next ones after them.
    """
    chunk = chunk or grid[0]
    tokens = np.indices(grid).reshape(3, -1).T
    places = [(t // chunk, t % chunk // block[0], y // block[1], x // block[2]) for t, y, x in tokens]
    rank = {place: n for n, place in enumerate(sorted(set(places)))}
    return np.array([rank[place] for place in places])


def visible(grid: tuple[int, int, int], block: tuple[int, int, int], chunk: int) -> NDArray[np.bool_]:
    """Which blocks the query at each token may see, (S, N): those of which no token is in a later chunk."""
    ids, of_token = block_ids(grid, block, chunk), np.indices(grid)[0].ravel() // chunk
    last = np.array([of_token[ids == n].max() for n in range(ids.max() + 1)])
    return last <= of_token[:, None]


def gate(query: ArrayLike, key: ArrayLike, ids: ArrayLike, num_blocks: int) -> NDArray[np.float64]:
    """Score of every block for every query: the dot product with the block's mean key, without 1/sqrt(D).

    Args:
        query: (B, H, S, D), video tokens only.
        key: (B, Hkv, S, D), video tokens only; query head h reads key head h // (H // Hkv).
        ids: (S,) block id of each token.
        num_blocks: N, the last size of the (B, H, S, N) result.
    """
    query, key, ids = np.asarray(query, np.float64), np.asarray(key, np.float64), np.asarray(ids)
    samples, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    result = np.empty((samples, heads, tokens, num_blocks))
    with np.errstate(invalid="ignore", over="ignore"):  # non-finite keys are a case that tests mean to reach
        for b, h, n in np.ndindex(samples, heads, num_blocks):
            result[b, h, :, n] = query[b, h] @ key[b, h // group, ids == n].mean(axis=0)
    return result


def cell_gate(
    query: ArrayLike, key: ArrayLike, grid: tuple[int, int, int], block: tuple[int, int, int],
    cell: tuple[int, int, int], spread: bool,
) -> NDArray[np.float64]:  # fmt: skip
    """Score of every block by its cells, (B, H, S, N): the gates "cells" and, with ``spread``, "spread".

    Args:
        query: (B, H, S, D), video tokens only.
        key: (B, Hkv, S, D), video tokens only.
        grid: frames, height, width.
        block: tokens of a block along these.
        cell: tokens of a cell along these, counted from the corner of the block.
        spread: whether a cell's mass is weighted by the standard deviation of its scores.
    """
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    counts = [-(-size // side) for size, side in zip(grid, block, strict=True)]
    places = np.indices(grid).reshape(3, -1).T
    mass = np.zeros((*query.shape[:3], np.prod(counts)))
    for corner in {(*p // block, *p % block // cell) for p in places}:
        inside = [i for i, p in enumerate(places) if (*p // block, *p % block // cell) == corner]
        n = np.ravel_multi_index(corner[:3], counts)
        for b, h, s in np.ndindex(query.shape[:3]):
            x, keys = query[b, h, s] / np.sqrt(query.shape[-1]), key[b, h // (query.shape[1] // key.shape[1]), inside]
            v = x**2 @ keys.var(axis=0)
            mass[b, h, s, n] += len(inside) * np.exp(x @ keys.mean(axis=0) + v / 2) * (max(v, 1e-12) ** 0.5) ** spread
    return np.log(mass)


def exact_gate(query: ArrayLike, key: ArrayLike, ids: ArrayLike, num_blocks: int) -> NDArray[np.float64]:
    """Log of every block's summed exponential scores, (B, H, S, N), scaled by 1/sqrt(D); arguments as of ``gate``."""
    query, key, ids = np.asarray(query, np.float64), np.asarray(key, np.float64), np.asarray(ids)
    result, group = np.empty((*query.shape[:3], num_blocks)), query.shape[1] // key.shape[1]
    for b, h, n in np.ndindex(*query.shape[:2], num_blocks):
        score = query[b, h] @ key[b, h // group, ids == n].T / np.sqrt(query.shape[-1])
        result[b, h, :, n] = score.max(axis=1) + np.log(np.exp(score - score.max(axis=1)[:, None]).sum(axis=1))
    return result


def mass(gate: ArrayLike, ids: ArrayLike, head_dim: int, seen: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Estimated attention mass of every block, (B, H, S, N): that of its tokens, had they all its mean key.

    Args:
        gate: (B, H, S, N) scores.
        ids: block id of each token that is a key.
        head_dim: D.
        seen: (S, N), where each query sees some blocks only; the mass of the others is not looked at.
    """
    gate = np.asarray(gate, np.float64)
    result = np.full(gate.shape, np.nan)  # all of a query's, where one score is not finite
    _, sizes = np.unique(np.asarray(ids), return_counts=True)
    for b, h, s in np.ndindex(gate.shape[:3]):
        of = slice(None) if seen is None else seen[s]
        score = gate[b, h, s, of]
        if np.isfinite(score).all():
            term = sizes[of] * np.exp((score - score.max()) / np.sqrt(head_dim))
            result[b, h, s, of] = term / term.sum()
    return result


def select(
    gate: ArrayLike,
    ids: ArrayLike,
    *,
    pool: str,
    k: int | None = None,
    tau: float | None = None,
    max_density: float | None = None,
    normalize: str = "minmax",
    always: ArrayLike = (),
    density: float | None = None,
    seen: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Selected pairs, (B, H, S, N): in each pool the own ones, then the best of the others as far as the rule goes.

    Best means: higher score (NaN above all numbers), then lower block id, then lower query index, then lower head.

    Args:
        gate: (B, H, S, N) scores, or masses where normalize is "softmax".
        ids: (S,) block id of each token.
        pool: what competes: "query", "block", "head" or "global"; never across samples.
        k: blocks per row, own included, summed over the rows of the pool; not with pool "block".
        tau: share of the pool's normalised score to reach. A pool with a non-finite score takes everything.
        max_density: with tau, the largest share of the pool's pairs to select; own ones are in even beyond it.
        normalize: "minmax" scales a pool's scores to [0, 1] before they are added up; "softmax" adds them as they are.
        always: blocks that are every query's own, too.
        density: instead of k, the share of the blocks that a row can have, rounded, at least one.
        seen: (S, N), the blocks that each query may choose. Queries that may choose the same blocks compete with each
            other only, for these; they are all of a row if there are fewer than k.

    Raises:
        ValueError: the pool is unknown, or the rule is not one of those above.
    """
    if density is None and (k is None) == (tau is None):
        raise ValueError(f"exactly one of k and tau must be given, got k={k}, tau={tau}")
    if k is not None and pool == "block":
        raise ValueError(f"k has no meaning with pool 'block', got k={k}")
    if k is not None and max_density is not None:
        raise ValueError(f"max_density goes with tau only, got max_density={max_density} with k={k}")
    gate, ids = np.asarray(gate, np.float64), np.asarray(ids)
    head, query, block = np.meshgrid(*map(np.arange, gate.shape[1:]), indexing="ij")
    own = (ids[query] == block) | np.isin(block, always)
    result = np.zeros(gate.shape, bool)
    seen = np.ones(gate.shape[2:], bool) if seen is None else seen
    for b in range(gate.shape[0]):
        for pool_slices, blocks in itertools.product(_pools(pool, *gate.shape[1:]), sorted(set(seen.sum(1)))):
            # The entries of the pool whose query may choose so many blocks, and this one.
            inside = np.zeros(gate.shape[1:], bool)
            inside[pool_slices] = True
            where = inside & ((seen.sum(1)[:, None] == blocks) & seen)
            if not where.any():
                continue
            score, mine = gate[b][where], own[where]
            ties = (head[where], query[where], block[where])
            nan = np.isnan(score)
            order = np.lexsort((*ties, -np.where(nan, 0, score), ~nan))  # the last key is the first to decide
            others = order[~mine[order]]
            if k is not None or density is not None:
                each = min(k, blocks) if k is not None else max(1, int(np.floor(density * blocks + 0.5)))
                count = each * (score.size // blocks) - mine.sum()  # such a pool holds whole rows
            else:
                count = _threshold_count(score, mine, others, tau, normalize)
            if max_density is not None:
                count = min(count, int(np.floor(max_density * score.size + 0.5)) - mine.sum())
            chosen = mine.copy()
            chosen[others[: max(0, count)]] = True
            result[b][where] = chosen
    return result


def _pools(pool: str, heads: int, tokens: int, blocks: int) -> list[tuple[slice, slice, slice]]:
    """The pools of one sample, each as the slices of heads, queries and blocks that compete."""
    every = slice(None)
    if pool == "query":
        return [(slice(h, h + 1), slice(s, s + 1), every) for h in range(heads) for s in range(tokens)]
    if pool == "block":
        return [(every, every, slice(n, n + 1)) for n in range(blocks)]
    if pool == "head":
        return [(slice(h, h + 1), every, every) for h in range(heads)]
    if pool == "global":
        return [(every, every, every)]
    raise ValueError(f"pool must be 'query', 'block', 'head' or 'global', got {pool!r}")


def _threshold_count(score: NDArray, own: NDArray, others: NDArray, tau: float, normalize: str) -> int:
    """How many of ``others`` (indices into ``score``, best first) it takes, next to the own pairs, to reach tau."""
    if not np.isfinite(score).all():
        return others.size
    share = score
    if normalize == "minmax":
        span = score.max() - score.min()
        share = (score - score.min()) / (span if span > EPS else 1.0)
    total = share.sum()
    rest = max(0.0, tau - share[own].sum() / (total + EPS))
    if rest == 0:
        return 0
    reached = np.cumsum(share[others]) / (total + EPS) >= rest
    return int(reached.argmax()) + 1 if reached.any() else others.size


def attention_mask(
    selection: NDArray[np.bool_], ids: ArrayLike, prefix: int, suffix: int, causal: bool = False
) -> NDArray[np.bool_]:
    """Which query may see which key, (B, H, L, L), for a selection (B, H, S, N); prefix and suffix see and are seen.

    If ``causal``, prefix and suffix see only themselves.
    """
    samples, heads, tokens, _ = selection.shape
    length = prefix + tokens + suffix
    mask = np.ones((samples, heads, length, length), bool)
    video = slice(prefix, prefix + tokens)
    mask[:, :, :, video] = not causal
    mask[:, :, video, video] = selection[..., np.asarray(ids)]
    return mask


def attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, mask: NDArray[np.bool_], scale: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Softmax attention over only the allowed keys: what is masked out has no influence, not even as NaN.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D); query head h reads key and value head h // (H // Hkv).
        value: (B, Hkv, L, Dv).
        mask: (B, H, L, L) bool, true where the query may see the key.
        scale: factor on the scores; 1/sqrt(D) by default.

    Returns:
        Output (B, H, L, Dv) and natural log-sum-exp of the scaled scores (B, H, L), both float64. A query that may
        see nothing gets 0 and -inf.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    factor = float(1 / np.sqrt(query.shape[-1])) if scale is None else scale
    output = np.zeros((*query.shape[:3], value.shape[-1]))
    lse = np.full(query.shape[:3], -np.inf)
    for b, h, s in np.ndindex(*query.shape[:3]):
        allowed = mask[b, h, s]
        if allowed.any():
            score = factor * (key[b, h // group, allowed] @ query[b, h, s])
            lse[b, h, s] = score.max() + np.log(np.exp(score - score.max()).sum())
            output[b, h, s] = np.exp(score - lse[b, h, s]) @ value[b, h // group, allowed]
    return output, lse


def tail_attention(
    query: NDArray, key: NDArray, value: NDArray, selection: NDArray[np.bool_], grid: tuple[int, int, int],
    block: tuple[int, int, int], cell: tuple[int, int, int], scale: float, chunk: int | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Attention of video tokens with a tail, query by query, as defined: no prefix or suffix, as many key heads.

    Args:
        query: (B, H, L, D).
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        selection: (B, H, L, N) bool.
        grid: frames, height, width.
        block: tokens of a block along these.
        cell: tokens of a cell along these.
        scale: factor on the scores.
        chunk: frames that blocks and cells do not cross; nothing of a later chunk is seen.

    Returns:
        (B, H, L, Dv).
    """
    ids, places, chunk = block_ids(grid, block, chunk), list(np.ndindex(*grid)), chunk or grid[0]
    seen = visible(grid, block, chunk)
    output = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, h, s in np.ndindex(*query.shape[:3]):
        logits, values = [], []
        for n in np.flatnonzero(seen[s]):
            inside = np.flatnonzero(ids == n)
            if selection[b, h, s, n]:
                logits += [scale * query[b, h, s] @ key[b, h, i] for i in inside]
                values += [value[b, h, i] for i in inside]
                continue
            cells: dict[tuple[int, ...], list[int]] = {}
            for i in inside:
                t, y, x = places[i]
                at = tuple(np.array([t % chunk, y, x]) % block // cell)
                cells.setdefault(at, []).append(i)
            for members in cells.values():
                logits.append(scale * query[b, h, s] @ key[b, h, members].mean(0) + np.log(len(members)))
                values.append(value[b, h, members].mean(0))
        weights = np.exp(np.array(logits) - max(logits))
        output[b, h, s] = weights @ np.array(values) / weights.sum()
    return output
