"""What each layer ran, in words: the table of a handle, and one line for the log, which reads no device."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from vmoba_flex.models.adapters import unwrap
from vmoba_flex.models.plan import LayerPlan
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import ModelState
from vmoba_flex.models.traced import noted
from vmoba_flex.partition import BlockPartition
from vmoba_flex.selection.bounds import largest_density


class Ran(NamedTuple):
    """What a layer ran in a forward.

    Attributes:
        attention: ``"dense"``, ``"sparse"`` where the layer's gate chose, ``"remembered"``, or ``"-"`` for none.
        dispatch: that was taken, ``"-"`` for a layer that was to be dense.
        kernels: whose they are: of a backend, of torch or, by name, of diffusers' attention backend.
        why: it is not what the config asks for at its best, if so.
    """

    attention: str
    dispatch: str = "-"
    kernels: str = "-"
    why: str = ""


def ran_of(plan: LayerPlan, processor: VMoBAProcessor) -> Ran:
    """What a layer ran by its plan."""
    if plan.skips_scores:
        return Ran("-", why="the model skips its attention")
    if plan.dense:
        backend = getattr(processor.stock, "_attention_backend", None)
        return Ran("dense", "-", "torch" if backend is None else backend.value, plan.why)
    chosen = noted(plan.grid, plan.block) if plan.chosen is None else [plan.chosen]
    if not chosen:
        return Ran("-", why="did not run")
    reasons = [one.why for one in chosen if one.why]
    if plan.recalls and not plan.recalled:
        reasons.append("remember has no effect here" if plan.memory is None else plan.memory.why)
    choice = "remembered" if plan.recalled else "sparse"
    return Ran(
        " or ".join(dict.fromkeys("dense" if one.dispatch == "dense" else choice for one in chosen)),
        " or ".join(dict.fromkeys(one.dispatch for one in chosen)),
        " or ".join(dict.fromkeys("torch" if one.dispatch == "dense" else one.backend for one in chosen)),
        "; ".join(dict.fromkeys(reasons)),
    )


def table_of(name: str, model: nn.Module, names: list[str], state: ModelState) -> list[str]:
    """The lines of a table with a row for each layer."""
    head = ("layer", "kind", "blocks", "rule", "tail", "attention", "dispatch", "kernels", "last density", "why")
    rows: list[tuple[str, ...]] = [head]
    plan = None
    for layer, processor in zip(names, state.processors, strict=True):
        plan, blocks, ran = processor.last, "not known yet", Ran("-")
        if plan is not None:
            blocks, ran = (
                f"{BlockPartition(plan.grid, plan.block).num_blocks} of {_by(plan.block)}",
                ran_of(plan, processor),
            )
        density = processor.density.item()
        rule, tail = (processor.rule, state.config.tail) if plan is None else (plan.rule, plan.tail)
        shown = (*ran[:3], f"{density:.3f}" if density else "-", ran.why)
        rows.append((layer, processor.kind, blocks, repr(rule), "-" if tail is None else repr(tail), *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = f"{name}: no forward yet" if plan is None else f"{name}: grid {_by(plan.grid)}"
    memory, remember = state.now.memory, state.config.remember
    if memory is not None and remember is not None:
        title += f"; remembered: {memory.nbytes():,} bytes on the {remember.on}, at most {memory.peak:,} in this run"
    source = state.source
    now: Any = None if source is None else getattr(source.pipe, name, None)
    if now is not None and unwrap(now) is not model:
        title += "; the pipeline has another model now, without this: call apply_vmoba again"
    return [title, *lines]


def line_of(name: str, processors: Sequence[VMoBAProcessor], plans: Sequence[LayerPlan]) -> str:
    """What the layers of a forward ran, those that ran the same together."""
    counts = Counter(_words(plan, processor) for plan, processor in zip(plans, processors, strict=True))
    layers = "; ".join(f"{count} x {words}" for words, count in counts.items())
    return f"{name}, grid {_by(plans[0].grid)}: {layers}"


def _words(plan: LayerPlan, processor: VMoBAProcessor) -> str:
    ran = ran_of(plan, processor)
    words = f"{processor.kind} {ran.attention}"
    if ran.dispatch != "-":
        words += f" by {ran.dispatch} on {ran.kernels}"
    if ran.attention not in ("dense", "-"):
        blocks = BlockPartition(plan.grid, plan.block).num_blocks
        words += f", density at most {largest_density(plan.rule, blocks):.3f} of {blocks} blocks"
        words += f", {'no tail' if plan.tail is None else plan.tail}"
    return f"{words} ({ran.why})" if ran.why else words


def _by(sizes: tuple[int, int, int]) -> str:
    return "x".join(map(str, sizes))
