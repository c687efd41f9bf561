"""The public attention call: checks, chooses blocks, dispatches."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from vmoba_flex.call import BACKENDS, DISPATCHES, MAX_ROW_BYTES, Backend, Call, Dispatch
from vmoba_flex.checks import check_choice, check_positive
from vmoba_flex.dispatch.choose import choose_backend, choose_dispatch
from vmoba_flex.dispatch.one_device import attend_here
from vmoba_flex.inputs import (
    check_query_key,
    check_scale,
    check_tail,
    check_text_lengths,
    check_value,
    under_autocast,
)
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.stats import Attended, AttentionStats
from vmoba_flex.tail import Tail

if TYPE_CHECKING:  # loaded where a call is shared out
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from vmoba_flex.distributed import HeadBalance, TokenShards
    from vmoba_flex.distributed.exchange import Layout


@overload
def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: Dispatch = "auto",
    backend: Backend = "auto",
    return_stats: Literal[False] = False,
    max_row_bytes: int = MAX_ROW_BYTES,
    text_lengths: Tensor | None = None,
    tail: Tail | None = None,
    group: "ProcessGroup | DeviceMesh | None" = None,
    shards: "TokenShards | None" = None,
    balance: "HeadBalance | None" = None,
    check_ranks: bool = False,
) -> Tensor: ...


@overload
def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: Dispatch = "auto",
    backend: Backend = "auto",
    return_stats: Literal[True],
    max_row_bytes: int = MAX_ROW_BYTES,
    text_lengths: Tensor | None = None,
    tail: Tail | None = None,
    group: "ProcessGroup | DeviceMesh | None" = None,
    shards: "TokenShards | None" = None,
    balance: "HeadBalance | None" = None,
    check_ranks: bool = False,
) -> tuple[Tensor, AttentionStats]: ...


def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: Dispatch = "auto",
    backend: Backend = "auto",
    return_stats: bool = False,
    max_row_bytes: int = MAX_ROW_BYTES,
    text_lengths: Tensor | None = None,
    tail: Tail | None = None,
    group: "ProcessGroup | DeviceMesh | None" = None,
    shards: "TokenShards | None" = None,
    balance: "HeadBalance | None" = None,
    check_ranks: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """VMoBA attention (arXiv 2506.23858), raster order in and out, differentiable in query, key and value.

    Softmax attention of each video query over exactly the keys of the blocks that ``rule`` chose for it, and over
    prefix and suffix; prefix and suffix queries attend everything. Nothing is read back to the host, but for one number
    by ``"packed"`` where the rule does not bound its pairs.

    On a GPU, ``"tiles"`` and ``"shared"`` are compiled FlexAttention, and ``"packed"`` runs on kernels of its own;
    the latter two also on FlashAttention-4. On a CPU the first two are FlexAttention inside ``torch.compile``
    without gradients, and otherwise a slower exact path that costs as much as full attention.

    Args:
        query: ``(B, H, S, D)``, floating point, on CPU or CUDA. Under autocast all three are cast first.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``.
        scale: factor on the scores before the softmax; ``1 / sqrt(D)`` by default. The choice of blocks ignores it.
        enable_gqa: allow fewer key heads than query heads; query head h uses key head ``h // (H // key heads)``.
        dispatch: ``"tiles"`` skips the tiles that no query of theirs wants. ``"packed"`` gathers the queries of each
            block, so that its cost is the density whatever neighbouring queries choose; see ``packed``. ``"shared"``
            is an approximation, and not what ``vmoba_selection`` chooses: up to 128 neighbouring queries of a block
            share one choice, made from their mean query, so that each tile that runs was chosen; see ``shared``.
            ``"dense"`` is ``scaled_dot_product_attention`` over everything, by cuDNN where it can and the call is large
            enough to ask for it; it ignores ``rule``. ``"auto"`` takes
            ``"packed"`` on a GPU where measured times say that it beats the fastest dense kernels, and ``"dense"``
            elsewhere: with ``Threshold(0.25, max_density=0.25)``, head dim 128 and 12 heads, below about 19,300 tokens,
            or 15,600 with gradients. It takes ``"tiles"`` instead of ``"packed"`` inside ``torch.compile`` for a
            ``Threshold`` without ``max_density``, and for float64 and head dims above 256; on a CPU always; and
            ``"shared"`` never. The stats tell full attention by its density of 1.
        backend: kernels on a GPU, but for ``"dense"``, which takes what torch takes. ``"triton"``: the same inputs give
            the same bits. ``"flash"``: FlashAttention-4, for ``"packed"``, and for ``"shared"`` with as many key heads
            as query heads, and for float16 whole 128 tokens in each block, and in prefix and suffix together; its
            gradient of query may differ in the last bits from run to run. It must be installed in the version that this
            package was tried with, and come out right on small problems, which the first call for each dispatch, dtype
            and head dim, with gradients or without, runs and reads back: call once before capturing a graph. ``"auto"``
            is ``"flash"`` where that can run and the call is large enough for its gain to outweigh its launches, which
            take the host up to twice as long: from about 32,500 tokens on with head dim 128 and 12 heads, or 23,000
            with gradients. Else it is ``"triton"``.
        return_stats: also return ``AttentionStats``; with a group, not inside ``torch.compile``.
        max_row_bytes: for ``"packed"``, what the rows of the heads worked on together may take; at least one head is,
            and all are for pools that span heads.
        text_lengths: int64 ``(B,)``: of each sample's prefix and suffix tokens, prefix first, the first so many exist,
            and the others are padding that nobody attends; all exist if None. The values are not checked: they must lie
            between 0 and prefix + suffix. Padding has outputs of its own, which mean nothing. Not for
            ``"shared"`` on ``"flash"`` in float16.
        tail: how the blocks that a query did not choose take part in its softmax, by means of their cells; by default
            they do not. Full attention, which ``"auto"`` may take, needs none.
        group: the process group, or device mesh with one dim, whose ranks share the call: each passes its tokens of
            query, key and value, and gets its tokens of the output. Everything else is the same on all ranks, and
            ``partition`` is that of all tokens. Gradients on a rank are those of the sum of what all ranks make of
            their outputs.
        shards: which tokens each rank holds; by default consecutive ones, as ``torch.tensor_split`` shares them out.
        balance: the heads that each rank attends, by their density.
        check_ranks: first find out, by a collective of 2 KiB a rank, whether all ranks mean the same call, and raise
            on all of them if not. Not inside ``torch.compile``.

    Returns:
        The output ``(B, H, S, value dim)``, or the output and ``AttentionStats``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the selection has 2**31 entries or more.

    Example:
        >>> import torch
        >>> from vmoba_flex import BlockPartition, Threshold, vmoba_attention
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> partition = BlockPartition.spatiotemporal((4, 8, 8), (2, 4, 4))
        >>> out, stats = vmoba_attention(q, k, v, partition, Threshold(0.25), return_stats=True)
        >>> out.shape, stats.density.shape
        (torch.Size([1, 2, 256, 16]), torch.Size([1, 2]))
    """
    layout = None
    if group is not None:
        from vmoba_flex.distributed.agreement import agreed_layout

        settings = {"rule": rule, "scale": scale, "dispatch": dispatch, "backend": backend, "tail": tail}
        layout = agreed_layout(query, key, value, partition, settings, group, shards, check_ranks)
    elif shards is not None or balance is not None or check_ranks:
        given = "shards" if shards is not None else "balance" if balance is not None else "check_ranks"
        raise ValueError(f"group must be given with {given}, got None")
    if layout is not None and return_stats and torch.compiler.is_compiling():
        raise ValueError(
            "return_stats must be False inside torch.compile with a group, whose ranks may be compiled to put their "
            "stats together in different orders, got True"
        )
    call = Call(partition, rule, scale, enable_gqa, text_lengths, max_row_bytes, tail)
    attended = attend(query, key, value, call, dispatch, backend, layout, balance)
    return (attended.output, attended.stats()) if return_stats else attended.output


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    dispatch: Dispatch,
    backend: Backend,
    layout: "Layout | None" = None,
    balance: "HeadBalance | None" = None,
) -> Attended:
    """``vmoba_attention``, with what there is to be said about the call; ``layout``: what each rank holds of it."""
    check_choice("dispatch", dispatch, DISPATCHES)
    check_choice("backend", backend, BACKENDS)
    query, key, value = under_autocast(query, key, value)
    if layout is None:
        check_query_key(query, key, call.partition, call.rule)
    else:
        check_query_key(query, key, call.partition, call.rule, layout.tokens, layout.ranks.size)
    check_value(value, query, key)
    call = call._replace(scale=check_scale(call.scale))
    check_positive("max_row_bytes", call.max_row_bytes)
    check_text_lengths(call.text_lengths, query, call.partition)
    if call.tail is not None:
        check_tail(call.tail, call.partition)
        if dispatch == "dense":
            raise ValueError(f"tail must be None for dispatch='dense', which skips no block, got {call.tail}")
    if key.shape[1] != query.shape[1] and not call.enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads unless enable_gqa=True, got {key.shape[1]} heads"
        )
    if layout is not None and layout.ranks.size > 1:
        from vmoba_flex.distributed.attend import attend_across

        return attend_across(query, key, value, call, dispatch, backend, layout, balance)
    if dispatch == "auto":
        dispatch = choose_dispatch(query, key, value, call.partition, call.rule)
    chosen = choose_backend(backend, dispatch, query, key, value, call.partition, call.text_lengths is not None)
    return attend_here(query, key, value, call, dispatch, chosen)
