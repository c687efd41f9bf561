"""Attention as one op that reads when it runs what the step asks of a layer, so that one graph serves all steps."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vmoba_flex.attention import attend
from vmoba_flex.call import Call
from vmoba_flex.dispatch.dense import dense_attention
from vmoba_flex.groups import valid_keys
from vmoba_flex.models.memory import LayerMemory
from vmoba_flex.models.plan import LayerPlan
from vmoba_flex.models.traced import note
from vmoba_flex.partition import BlockPartition

if TYPE_CHECKING:  # loaded where a model is context-parallel
    from vmoba_flex.distributed.exchange import Layout


# A CUDA graph would keep the step that it was captured in.
@torch.library.custom_op("vmoba_flex::attend_at_step", mutates_args=("density",), tags=(torch.Tag.cudagraph_unsafe,))
def attend_at_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_lengths: Tensor | None,
    handle: Tensor,
    density: Tensor,
    partition: list[int],
) -> Tensor:
    """``attend_planned`` by the plan that the op finds when it runs. Without gradients.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, D)``.
        text_lengths: as in ``vmoba_attention``.
        handle: of the plan.
        density: float32 scalar; what the call attended is written to it.
        partition: the blocks, as ``BlockPartition.flat``.

    Returns:
        ``(B, H, S, D)``.
    """
    plan, blocks = LayerPlan.of_handle(handle), BlockPartition.of_flat(partition)
    output, attended = attend_planned(query, key, value, text_lengths, plan, blocks)
    if attended is None:
        density.fill_(1)
    else:
        density.copy_(attended)
    return output.contiguous()


@attend_at_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def attend_planned(
    query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None, plan: LayerPlan, partition: BlockPartition
) -> tuple[Tensor, Tensor | None]:
    """What a plan asks of a layer; see ``attend_at_step``.

    Returns:
        The output, and the density of what it attended, a float32 scalar; None for everything.
    """
    memory, layout = plan.memory, None
    if plan.ranks is not None:
        from vmoba_flex.distributed.exchange import Layout

        layout = Layout.of(plan.ranks, None, partition)  # tokens as diffusers shares them out
        if memory is not None and not _heads_choose_alone(plan, memory, query, key, plan.ranks.size):
            memory = None
    if layout is None or not (plan.dense or memory is not None):
        return _attend(query, key, value, text_lengths, plan, memory, partition, layout)
    from vmoba_flex.distributed.attend import by_heads

    densities: list[Tensor | None] = []

    def here(query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None) -> Tensor:
        output, density = _attend(query, key, value, text_lengths, plan, memory, partition, None)
        densities.append(density)
        return output

    return by_heads(here, query, key, value, text_lengths, layout), densities[0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None, plan: LayerPlan,
    memory: LayerMemory | None, partition: BlockPartition, layout: "Layout | None",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    kept = None
    if memory is not None:
        kept = memory.choice(plan.rule, plan.records, plan.dense, query, key, partition, plan.dispatch)
        plan.recalled = kept is not None
    if plan.dense:
        return attend_everything(query, key, value, text_lengths, partition, plan.dense_backend), None
    rule = plan.rule if kept is None else kept
    gqa = key.shape[1] != query.shape[1]
    call = Call(partition, rule, enable_gqa=gqa, text_lengths=text_lengths, tail=plan.tail)
    attended = attend(query, key, value, call, plan.dispatch, plan.backend, layout)
    if attended.chosen is not None:
        if torch.compiler.is_compiling():  # an attribute that is set in a graph could not be checkpointed
            note(partition, attended.chosen)
        else:
            plan.chosen = attended.chosen
    return attended.output, attended.density()


def _heads_choose_alone(plan: LayerPlan, memory: LayerMemory, query: Tensor, key: Tensor, ranks: int) -> bool:
    """Whether each rank can choose for its own heads, and keep the choice."""
    rules = (plan.rule, *plan.records)
    alone = all(rule.pool in ("query", "head") for rule in rules)
    if alone and key.shape[1] == query.shape[1] >= ranks:
        return True
    memory.why = "remember has no effect over ranks where heads compete"
    memory.run.told.tell(
        "remember has no effect over ranks where heads compete (pool 'block' or 'global'), share keys or are too few: "
        "layers choose by their rule's own gate"
    )
    return False


@torch.library.custom_op("vmoba_flex::record_density", mutates_args=("density",))
def record_density(density: Tensor, value: Tensor) -> None:
    """Writes what a call attended to ``density``; opaque, so that no graph keeps it for backward."""
    density.copy_(value)


@record_density.register_fake
def _(density: Tensor, value: Tensor) -> None:
    return None


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
