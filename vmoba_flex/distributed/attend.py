"""One attention call over several ranks, from inputs that have been checked."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmoba_flex.call import Backend, Call, Dispatch
from vmoba_flex.dispatch.choose import choose
from vmoba_flex.dispatch.one_device import attend_here
from vmoba_flex.distributed.balance import HeadBalance
from vmoba_flex.distributed.exchange import Heads, Layout, to_heads, to_tokens
from vmoba_flex.distributed.shards import queries_of
from vmoba_flex.part import Part, Queries
from vmoba_flex.stats import Attended


def attend_across(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    dispatch: Dispatch,
    backend: Backend,
    layout: Layout,
    balance: HeadBalance | None = None,
) -> Attended:
    """Attention of tokens that ranks share; the result equals one process's.

    With at least one head for each rank, ranks exchange tokens for heads, attend all tokens of their heads, and
    exchange back. With more ranks than heads, queries stay on their rank and every rank gets all keys and values. Pools
    that span ranks are chosen by sums over the ranks.

    Args:
        query: ``(B, H, tokens of this rank, D)``.
        key: ``(B, key heads, tokens of this rank, D)``.
        value: ``(B, key heads, tokens of this rank, value dim)``.
        call: what they attend; its partition is of all tokens.
        dispatch: as in ``vmoba_attention``.
        backend: as in ``vmoba_attention``.
        layout: which tokens each rank holds.
        balance: which heads each rank attends.

    Returns:
        What this rank attended, with the output ``(B, H, tokens of this rank, value dim)`` and, where the call wants
        it, the log-sum-exp ``(B, H, tokens of this rank)``.
    """
    ranks, partition = layout.ranks, call.partition
    # Chosen by the whole call, so that all ranks take the same backend, the one that a single GPU would take.
    chosen = choose(query, key, value, call, dispatch, backend, ranks.size)
    dispatch = chosen.dispatch
    of_keys = None
    if query.shape[1] >= ranks.size:
        repeats = query.shape[1] // key.shape[1]
        if key.shape[1] < ranks.size:  # the queries of a key head go to several ranks
            key, value, repeats = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), 1
        of_keys = Heads.evenly(key.shape[1], ranks.size, None if balance is None else balance.order_of(key.shape[1]))
        heads = of_keys.times(repeats)
        places = heads.of_rank(ranks.rank, query.device)
        part = Part(ranks.group, 1, query.shape[1], places, Queries.of(partition))
        query, key, value = to_heads((query, key, value), layout, (heads, of_keys, of_keys))
    else:
        _check_by_queries(query, dispatch, balance, ranks.size)
        queries = queries_of(layout.here, partition)
        places = torch.arange(queries.first, queries.first + queries.video, device=query.device)
        part = Part(ranks.group, 2, partition.num_video_tokens, places, queries)
        # Every rank gets all heads of keys and values.
        heads = Heads((key.shape[1],) * ranks.size)
        repeated = [x.repeat(1, ranks.size, 1, 1) for x in (key, value)]
        key, value = to_heads(repeated, layout, (heads, heads))
    attended = attend_here(query, key, value, call, dispatch, chosen.backend, part)._replace(chosen=chosen)
    if of_keys is None:
        return attended
    if balance is not None and dispatch != "dense":
        units = of_keys.of_rank(ranks.rank, query.device)
        balance.record(attended.head_density().unflatten(0, (len(units), -1)).mean(1), units)
    lse = attended.lse
    if call.lse and lse is not None:
        lse = to_tokens(lse[..., None], layout, heads)[..., 0]
    return attended._replace(output=to_tokens(attended.output, layout, heads), lse=lse)


def by_heads(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_lengths: Tensor | None,
    layout: Layout,
) -> Tensor:
    """Any attention whose heads are independent, of tokens that ranks share.

    Args:
        attention: of ``(query, key, value, text_lengths)``.
        query: ``(B, H, tokens of this rank, D)``.
        key: of query's shape.
        value: of query's shape.
        text_lengths: as in ``vmoba_attention``.
        layout: which tokens each rank holds.

    Returns:
        ``(B, H, tokens of this rank, D)``.
    """
    heads = Heads.evenly(query.shape[1], layout.ranks.size)
    query, key, value = to_heads((query, key, value), layout, (heads,) * 3)
    return to_tokens(attention(query, key, value, text_lengths), layout, heads)


def _check_by_queries(query: Tensor, dispatch: Dispatch, balance: HeadBalance | None, ranks: int) -> None:
    where = f"with more ranks than heads, got {ranks} ranks and {query.shape[1]} heads"
    if dispatch == "shared":
        raise ValueError(f"dispatch must not be 'shared' {where}; its tiles of queries cannot be split over ranks")
    if balance is not None:
        raise ValueError(f"balance must be None {where}")
