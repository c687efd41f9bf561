"""Query, key, a partition and a rule -> the choice of blocks, as bools or to keep: the public call."""

from typing import Literal, overload

from torch import Tensor

from vmoba_flex.checks import check_bool, check_choice
from vmoba_flex.inputs import check_query_key, check_rule, check_text_lengths, under_autocast
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.bits import CHOICES, Choice, of_tokens
from vmoba_flex.selection.kept import Selection
from vmoba_flex.selection.select import choose_blocks, choose_by_each
from vmoba_flex.selection.tiles import choose_by_tiles, choose_tiles_by_each


@overload
def vmoba_selection(
    query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, *,
    choice: Choice = "token", text_lengths: Tensor | None = None, as_bits: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def vmoba_selection(
    query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, *,
    choice: Choice = "token", text_lengths: Tensor | None = None, as_bits: Literal[True],
) -> Selection: ...  # fmt: skip


def vmoba_selection(
    query: Tensor,
    key: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    choice: Choice = "token",
    text_lengths: Tensor | None = None,
    as_bits: bool = False,
) -> Tensor | Selection:
    """Chooses the blocks that each video query attends (arXiv 2506.23858, Sec. 3).

    Every query's own block is chosen, and those of ``rule.always``. Pools never span samples. Nothing is read back to
    the host, but for one number with ``as_bits`` and a rule that does not bound its pairs.

    Args:
        query: ``(B, H, S, D)`` in raster order, prefix and suffix included; floating point. Under autocast both tensors
            are cast first, as in ``vmoba_attention``.
        key: ``(B, key heads, S, D)``; where it has fewer heads, query head h uses key head ``h // (H // key heads)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``.
        choice: ``"token"``: each query chooses. ``"tile"``: the queries of each query tile choose together, as in
            ``dispatch="shared"``.
        text_lengths: as in ``vmoba_attention``. Text competes for nothing, so that the choice is the same for any.
        as_bits: whether to return a ``Selection``, which later calls take in place of a rule.

    Returns:
        bool ``(B, H, video tokens, N)`` in raster order; block by block in memory, so not contiguous. With ``as_bits``
        a ``Selection``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the selection has 2**31 entries or more.
    """
    check_bool("as_bits", as_bits)
    check_choice("choice", choice, CHOICES)
    check_rule(rule)
    query, key = under_autocast(query, key)
    partition = check_query_key(query, key, partition, rule)
    check_text_lengths(text_lengths, query, partition)
    if as_bits:
        return keep_each(query, key, partition, (rule,), choice)[0]
    if choice == "token":
        return choose_blocks(query, key, partition, rule)
    return of_tokens(choose_by_tiles(query, key, partition, rule), partition)


def keep_each(
    query: Tensor, key: Tensor, partition: BlockPartition, rules: tuple[Rule, ...], choice: Choice
) -> list[Selection]:
    """What each of some rules of one gate chooses, of checked inputs; the gate scores the blocks once."""
    by_each = choose_by_each if choice == "token" else choose_tiles_by_each
    chosen = zip(rules, by_each(query, key, partition, rules), strict=True)
    return [Selection.of(selected, partition, choice, rule=rule) for rule, selected in chosen]
