"""Query, key, value, a partition and a rule -> attention: the public call, which checks, chooses and dispatches."""

from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from vmoba_flex.call import BACKENDS, DISPATCHES, MAX_ROW_BYTES, Backend, Call, Dispatch
from vmoba_flex.checks import check_bool, check_choice, check_positive
from vmoba_flex.dispatch.choose import choose
from vmoba_flex.dispatch.one_device import attend_here, check_pieces, check_whole
from vmoba_flex.inputs import (
    check_query_key,
    check_scale,
    check_tail,
    check_tail_size,
    check_text_lengths,
    check_value,
    under_autocast,
)
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import queries_of_frames
from vmoba_flex.rules import Rule, among
from vmoba_flex.selection.kept import Selection, one_of
from vmoba_flex.stats import Attended, AttentionStats
from vmoba_flex.tail import Tail

if TYPE_CHECKING:  # loaded only where ranks share a call
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from vmoba_flex.distributed import HeadBalance, RankGroup, TokenShards
    from vmoba_flex.distributed.exchange import Layout


class CallOptions(TypedDict, total=False):
    """The keywords of ``vmoba_attention``."""

    scale: float | None
    enable_gqa: bool
    dispatch: Dispatch
    backend: Backend
    max_row_bytes: int
    text_lengths: Tensor | None
    tail: Tail | None
    selection: Selection | None
    query_frames: tuple[int, int] | None
    group: "RankGroup | ProcessGroup | DeviceMesh | None"
    # Deprecated, part of RankGroup:
    shards: "TokenShards | None"
    balance: "HeadBalance | None"
    check_ranks: bool


@overload
def vmoba_attention(
    query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, rule: Rule | None, *,
    return_stats: Literal[False] = False, return_lse: Literal[False] = False, **options: Unpack[CallOptions],
) -> Tensor: ...  # fmt: skip


@overload
def vmoba_attention(
    query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, rule: Rule | None, *,
    return_stats: Literal[True], return_lse: Literal[False] = False, **options: Unpack[CallOptions],
) -> tuple[Tensor, AttentionStats]: ...  # fmt: skip


@overload
def vmoba_attention(
    query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, rule: Rule | None, *,
    return_stats: Literal[False] = False, return_lse: Literal[True], **options: Unpack[CallOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def vmoba_attention(
    query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, rule: Rule | None, *,
    return_stats: Literal[True], return_lse: Literal[True], **options: Unpack[CallOptions],
) -> tuple[Tensor, Tensor, AttentionStats]: ...  # fmt: skip


def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule | None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: Dispatch = "auto",
    backend: Backend = "auto",
    return_stats: bool = False,
    return_lse: bool = False,
    max_row_bytes: int = MAX_ROW_BYTES,
    text_lengths: Tensor | None = None,
    tail: Tail | None = None,
    selection: Selection | None = None,
    query_frames: tuple[int, int] | None = None,
    group: "RankGroup | ProcessGroup | DeviceMesh | None" = None,
    **deprecated: Any,
) -> Tensor | tuple[Tensor, AttentionStats] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, AttentionStats]:
    """VMoBA attention (arXiv 2506.23858), raster order in and out, differentiable in query, key and value.

    Video queries attend the blocks that ``rule`` chose for them, and prefix and suffix, which attend everything. With a
    ``tail`` they attend the other blocks by the means of their cells.

    Args:
        query: ``(B, H, S, D)``, floating point, on CPU or CUDA. Under autocast all three tensors are cast first.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``; or None, with a ``selection``.
        scale: factor on the scores before the softmax; ``1 / sqrt(D)`` by default. The choice of blocks ignores it.
        enable_gqa: allow fewer key heads than query heads; query head h uses key head ``h // (H // key heads)``.
        dispatch: The cost of ``"packed"`` follows the density; it reads one number from the device if the rule does not
            bound its pairs. ``"tiles"`` runs each tile that one of its queries wants. ``"shared"`` is an approximation:
            up to 128 neighbouring queries share one choice. ``"dense"`` is full attention, and ignores ``rule``. In a
            causal partition each of them is one call for each chunk, with the keys up to its end.
            ``"auto"`` is the fastest exact one by measured times: on a GPU full attention for short sequences, as stats
            tell; on a CPU ``"packed"``, or ``"tiles"`` in compiled calls without gradients.
        backend: kernels of ``"packed"`` and ``"shared"`` on a GPU. ``"triton"`` gives the same bits for the same
            inputs. ``"flash"``, FlashAttention-4, is checked on small problems at its first call. ``"auto"`` is the
            faster one that can run.
        return_stats: also return ``AttentionStats``; with a group, not inside ``torch.compile``.
        return_lse: also return the natural log-sum-exp of each query's scores, without a gradient; with a group, not
            inside ``torch.compile``.
        max_row_bytes: memory for the rows of ``"packed"``, which works on at least one head at a time.
        text_lengths: int64 ``(B,)``, in 0..prefix + suffix (checked on a CPU only): how many of a sample's prefix and
            suffix tokens, prefix first, are valid. Nobody attends the others, which are padding with meaningless
            outputs.
        tail: how skipped blocks take part; by default they do not. Not for ``"dense"``, which skips none.
        selection: what was chosen before, instead of a rule: by tokens for ``"packed"`` and ``"tiles"``, by tiles for
            ``"shared"``, which ``"auto"`` then takes.
        query_frames: ``(first, end)``, where query holds the video tokens of frames ``first..end - 1`` only, without
            prefix and suffix; key and value hold all tokens of the partition, up to the last frame there is so far.
            Pools hold these queries only, so that pools of one query choose as they do in a call with all.
        group: the ranks that share the call: a process group, a device mesh with one dim, or a ``RankGroup``. Each
            passes and gets its own tokens; the other arguments are the same on all, a selection that of all heads.
            Gradients are of the sum over them.
        **deprecated: ``shards``, ``balance`` and ``check_ranks``, which are part of ``RankGroup``.

    Returns:
        The output ``(B, H, S, value dim)``; then, where asked for, the log-sum-exp ``(B, H, S)``, float32, or float64
        for float64 inputs; then ``AttentionStats``. With ``query_frames``, S are query's tokens.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, the selection has 2**31 entries or more, or a tail has more
            cells than kernels index.

    Example:
        >>> from vmoba_flex import BlockPartition, Threshold
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> vmoba_attention(q, k, v, BlockPartition.spatiotemporal((4, 8, 8), (2, 4, 4)), Threshold(0.25)).shape
        torch.Size([1, 2, 256, 16])
    """
    if deprecated:
        from vmoba_flex.distributed.group import with_old_keywords

        group = with_old_keywords(group, deprecated)
    layout = balance = None
    if group is not None:
        from vmoba_flex.distributed.agreement import agreed_layout
        from vmoba_flex.distributed.group import RankGroup

        check_whole(partition, query_frames)
        group = group if isinstance(group, RankGroup) else RankGroup(group)
        settings = {"rule": rule, "scale": scale, "dispatch": dispatch, "backend": backend, "tail": tail}
        settings["return_lse"] = return_lse  # one more exchange
        settings["choice of selection"] = getattr(selection, "choice", None)
        layout, balance = agreed_layout(query, key, value, partition, settings, group), group.balance
        for name, flag in (("return_stats", return_stats), ("return_lse", return_lse)):
            if flag and torch.compiler.is_compiling():
                raise ValueError(
                    f"{name} must be False inside torch.compile with a group: ranks may be compiled to exchange it and "
                    "the output in different orders, got True"
                )
    for name, flag in (("return_stats", return_stats), ("return_lse", return_lse), ("enable_gqa", enable_gqa)):
        check_bool(name, flag)
    call = Call(partition, one_of(rule, selection), scale, enable_gqa, text_lengths, max_row_bytes, tail, return_lse)
    if query_frames is not None:
        call = call._replace(queries=queries_of_frames(query_frames, partition))
    attended = attend(query, key, value, call, dispatch, backend, layout, balance)
    if return_lse:
        assert attended.lse is not None
        return (attended.output, attended.lse, attended.stats()) if return_stats else (attended.output, attended.lse)
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
    """``vmoba_attention``, with all that its stats are made from.

    Args:
        query: as in ``vmoba_attention``.
        key: as in ``vmoba_attention``.
        value: as in ``vmoba_attention``.
        call: what they attend.
        dispatch: as in ``vmoba_attention``.
        backend: as in ``vmoba_attention``.
        layout: which tokens each rank holds; None for one rank.
        balance: which heads each rank attends.
    """
    check_choice("dispatch", dispatch, DISPATCHES)
    check_choice("backend", backend, BACKENDS)
    query, key, value = under_autocast(query, key, value)
    shared_out = () if layout is None else (layout.tokens, layout.ranks.size)
    rule, kept = (None, call.rule) if isinstance(call.rule, Selection) else (call.rule, None)
    partition = check_query_key(query, key, call.partition, rule, *shared_out, queries=call.queries)
    check_pieces(call._replace(partition=partition), dispatch, query.is_cuda)
    if kept is not None:
        if dispatch == "dense":
            raise ValueError(f"selection must be None for dispatch='dense', which attends everything, got {kept}")
        choice = kept.choice if dispatch == "auto" else "tile" if dispatch == "shared" else "token"
        kept.check(query, partition, choice, f"dispatch={dispatch!r}")
    check_value(value, query, key)
    given = call.rule if isinstance(call.rule, Selection) else among(call.rule, partition.num_blocks)
    call = call._replace(partition=partition, rule=given, scale=check_scale(call.scale))
    check_positive("max_row_bytes", call.max_row_bytes)
    check_text_lengths(call.text_lengths, query, call.partition)
    if call.tail is not None:
        check_tail(call.tail, call.partition)
        check_tail_size(call.tail, call.partition, query)
        if dispatch == "dense":
            raise ValueError(f"tail must be None for dispatch='dense', which skips no block, got {call.tail}")
    if key.shape[1] != query.shape[1] and not call.enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads unless enable_gqa=True, got {key.shape[1]} heads"
        )
    if layout is not None and layout.ranks.size > 1:
        from vmoba_flex.distributed.attend import attend_across

        return attend_across(query, key, value, call, dispatch, backend, layout, balance)
    chosen = choose(query, key, value, call, dispatch, backend)
    attended = attend_here(query, key, value, call, chosen.dispatch, chosen.backend)
    return attended._replace(chosen=chosen)
