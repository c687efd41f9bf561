"""What one layer of a model does at one step."""

import dataclasses

from vmoba_flex.rules import Rule
from vmoba_flex.tail import Tail


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer does at one step.

    Attributes:
        kind: ``"temporal"``, ``"spatial"`` or ``"spatiotemporal"``.
        rule: the layer's rule at the step.
        dense: whether the layer attends everything instead.
        tail: how skipped blocks take part at the step, if it is not dense; None if they do not.
        records: rules by which the step chooses from its exact masses, to keep the choice; see ``Remember``.
        recalls: whether the step attends what is kept.
    """

    kind: str
    rule: Rule
    dense: bool
    tail: Tail | None = None
    records: tuple[Rule, ...] = ()
    recalls: bool = False
