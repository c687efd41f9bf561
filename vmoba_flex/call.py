"""The arguments of a call other than query, key and value, and the names of its choices."""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from block_masks.attention.grouped import MAX_ROW_BYTES
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.kept import Selection
from vmoba_flex.tail import Tail

Dispatch = Literal["auto", "tiles", "packed", "shared", "dense"]
Backend = Literal["auto", "triton", "flash"]
# A backend once it has been chosen; "eager" is plain PyTorch.
ChosenBackend = Literal["eager", "triton", "flash"]
DISPATCHES: tuple[Dispatch, ...] = get_args(Dispatch)
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class Chosen(NamedTuple):
    """What a call runs.

    Attributes:
        dispatch: any but ``"auto"``.
        backend: of its kernels; ``"dense"`` takes torch's own.
        why: the reason, where ``"auto"`` did not take what saves time at larger sizes or on other machines; else empty.
            Inside a graph it has no numbers, because sizes may be symbolic.
    """

    dispatch: Dispatch
    backend: ChosenBackend
    why: str = ""


class Call(NamedTuple):
    """The arguments that are the same for every dispatch and backend; see ``vmoba_attention``.

    Attributes:
        partition: the blocks.
        rule: chooses the blocks of each query; or what was chosen before.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        enable_gqa: whether key may have fewer heads.
        text_lengths: int64 ``(B,)``, the number of valid prefix and suffix tokens of each sample; all if None.
        max_row_bytes: memory for the rows of the heads that ``"packed"`` works on together.
        tail: how the blocks that a query did not choose take part; None if they do not.
        lse: whether the log-sum-exp is wanted, too.
        queries: which video queries query holds, in whole frames and without text; None for all and text.
    """

    partition: BlockPartition
    rule: Rule | Selection
    scale: float | None = None
    enable_gqa: bool = False
    text_lengths: Tensor | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    tail: Tail | None = None
    lse: bool = False
    queries: Queries | None = None
