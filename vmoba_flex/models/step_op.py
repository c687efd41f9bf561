"""Attention as one op that reads when it runs what the step asks of a layer, so that one graph serves all steps."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vmoba_flex.attention import attend
from vmoba_flex.call import Backend, Call, Dispatch
from vmoba_flex.dispatch.dense import dense_attention
from vmoba_flex.groups import valid_keys
from vmoba_flex.models.memory import LayerMemory
from vmoba_flex.models.plan import LayerPlan
from vmoba_flex.models.traced import note
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.kept import Selection

if TYPE_CHECKING:  # loaded where a model is context-parallel
    from vmoba_flex.collectives import Ranks
    from vmoba_flex.distributed.exchange import Layout


def attend_at_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_lengths: Tensor | None,
    handle: Tensor,
    density: Tensor,
    partition: BlockPartition,
    dispatch: Dispatch,
    backend: Backend,
    dense_backend: str,
    ranks: "Ranks | None" = None,
) -> Tensor:
    """``vmoba_attention``, or full attention where the plan says so. Without gradients.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, D)``.
        text_lengths: as in ``vmoba_attention``.
        handle: of the layer's plan: the rule, the tail and whether to attend everything.
        density: float32 scalar; what the call attended is written to it.
        partition: the blocks.
        dispatch: as in ``vmoba_attention``, for a step that is not dense.
        backend: as in ``vmoba_attention``, for the same.
        dense_backend: diffusers' name of the backend of a dense step; empty for the fastest of torch's.
        ranks: that share the tokens; None for one.
    """
    return _attend_at_step(
        query, key, value, text_lengths, handle, density, partition.flat, dispatch, backend, dense_backend,
        "" if ranks is None else ranks.group, 0 if ranks is None else ranks.rank, 1 if ranks is None else ranks.size,
    )  # fmt: skip


# A CUDA graph would keep the step that it was captured in.
@torch.library.custom_op("vmoba_flex::attend_at_step", mutates_args=("density",), tags=(torch.Tag.cudagraph_unsafe,))
def _attend_at_step(
    query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None, handle: Tensor, density: Tensor,
    sizes: list[int], dispatch: str, backend: str, dense_backend: str, group: str, rank: int, size: int,
) -> Tensor:  # fmt: skip
    plan, partition = LayerPlan.of_handle(handle), BlockPartition.of_flat(sizes)
    layout = None
    if size > 1:
        from vmoba_flex.collectives import Ranks

        layout = layout_of(Ranks(group, rank, size), partition)
    output, attended = attend_planned(
        query, key, value, text_lengths, plan, plan.memory, partition, cast(Dispatch, dispatch), cast(Backend, backend),
        dense_backend, layout,
    )  # fmt: skip
    if attended is None:
        density.fill_(1)
    else:
        density.copy_(attended)
    return output.contiguous()


@_attend_at_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def attend_planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_lengths: Tensor | None,
    plan: LayerPlan,
    memory: LayerMemory | None,
    partition: BlockPartition,
    dispatch: Dispatch,
    backend: Backend,
    dense_backend: str,
    layout: "Layout | None",
) -> tuple[Tensor, Tensor | None]:
    """What a plan asks of a layer, which keeps choices in ``memory``; see ``attend_at_step``.

    Returns:
        The output, and the density of what it attended, a float32 scalar; None for everything.
    """
    if layout is not None and memory is not None and not _heads_choose_alone(plan, memory, query, key, layout):
        memory = None
    if layout is not None and (plan.dense or memory is not None):
        from vmoba_flex.distributed.attend import by_heads

        densities: list[Tensor | None] = []

        def here(query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None) -> Tensor:
            options = (text_lengths, plan, memory, partition, dispatch, backend, dense_backend, None)
            output, density = attend_planned(query, key, value, *options)
            densities.append(density)
            return output

        return by_heads(here, query, key, value, text_lengths, layout), densities[0]
    chosen = {}
    if memory is not None and plan.records:
        chosen = memory.record(plan.records, query, key, partition, dispatch)
    if plan.dense:
        return attend_everything(query, key, value, text_lengths, partition, dense_backend), None
    rule: Rule | Selection = plan.rule
    if memory is not None:
        rule = chosen.get(plan.rule) or memory.recall(plan.rule, query, partition) or plan.rule
        plan.recalled = rule is not plan.rule
    gqa = key.shape[1] != query.shape[1]
    call = Call(partition, rule, enable_gqa=gqa, text_lengths=text_lengths, tail=plan.tail)
    attended = attend(query, key, value, call, dispatch, backend, layout)
    if attended.chosen is not None:
        if torch.compiler.is_compiling():  # an attribute that is set in a graph could not be checkpointed
            note(partition, attended.chosen)
        else:
            plan.chosen = attended.chosen
    return attended.output, attended.density()


def _heads_choose_alone(plan: LayerPlan, memory: LayerMemory, query: Tensor, key: Tensor, layout: "Layout") -> bool:
    """Whether each rank can choose for its own heads, and keep the choice."""
    rules = (plan.rule, *plan.records)
    alone = all(rule.pool in ("query", "head") for rule in rules)
    if alone and key.shape[1] == query.shape[1] >= layout.ranks.size:
        return True
    memory.why = "remember has no effect over ranks where heads compete"
    memory.run.told.tell(
        "remember has no effect over ranks where heads compete (pool 'block' or 'global'), share keys or are too few: "
        "layers choose by their rule's own gate"
    )
    return False


@torch.library.custom_op("vmoba_flex::record_density", mutates_args=("density",))
def _record_density(density: Tensor, value: Tensor) -> None:
    density.copy_(value)


@_record_density.register_fake
def _(density: Tensor, value: Tensor) -> None:
    return None


def record_density(density: Tensor, value: Tensor) -> None:
    """Writes what a call attended to ``density``; opaque, so that no graph keeps it for backward."""
    with torch.no_grad():
        _record_density(density, value)


def layout_of(ranks: "Ranks | None", partition: BlockPartition) -> "Layout | None":
    """Which tokens each rank holds, as diffusers shares them out; None for one rank."""
    if ranks is None:
        return None
    from vmoba_flex.distributed.exchange import Layout

    return Layout.of(ranks, None, partition)


def attend_everything(
    query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None, partition: BlockPartition, backend: str
) -> Tensor:
    """Full attention by a backend of diffusers, by name, or by the fastest of torch's if the name is empty."""
    valid, gqa = valid_keys(partition, text_lengths), key.shape[1] != query.shape[1]
    if not backend:
        return dense_attention(query, key, value, None, gqa, valid)
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    mask = None if valid is None else valid[:, None, None]
    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"backend": AttentionBackendName(backend), "enable_gqa": gqa}
    return dispatch_attention_fn(*tokens_first, attn_mask=mask, **options).transpose(1, 2)
