"""A choice of blocks that is kept, as bits: made once, used by later calls in place of a rule.

B batch, H heads, S video tokens, N blocks, R what chooses: the S tokens, or the query tiles of ``dispatch="shared"``.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks.attention.grouped import MAX_ROW_BYTES
from block_masks.checks import check_is, check_tensor
from block_masks.plans.rows import TILE
from vmoba_flex.checks import check_choice, check_positive
from vmoba_flex.inputs import check_is_device, check_rule
from vmoba_flex.part import Part
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, check_rule_fits
from vmoba_flex.selection.bits import Choice, attended, check_bits, check_recall, pack_bits, share, unpack_bits
from vmoba_flex.selection.bounds import UNBOUNDED, Bounds, bounds_of
from vmoba_flex.selection.files import read, write
from vmoba_flex.selection.plan import Plan, plan_packed, plan_shared
from vmoba_flex.user_error import UserError, one_line


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Which blocks each query attends, one bit a block: what ``vmoba_attention(..., selection=)`` takes.

    ``vmoba_selection(..., as_bits=True)`` makes one by a rule, and ``Selection.of`` makes one of a bool
    tensor. A call with it gives the same bits as a call with the rule that made it, and chooses nothing. 55,296 tokens,
    12 heads and 72 blocks take 6 MB.

    Attributes:
        bits: uint8 ``(B, H, ceil(N / 8), R)``: bit ``n % 8`` of byte ``n // 8`` says whether block n is attended.
        partition: the blocks.
        choice: what chose: ``"token"``, each of the R = S video tokens, in raster order; or ``"tile"``, each query tile
            of ``dispatch="shared"``, in block order.
        bounds: of density and rows, known on the host. Without one of the rows, ``dispatch="packed"`` reads it from the
            device in each call.
        recall: ``(B, H)``, the share of the attention mass that is attended, if known.
        plan: what ``planned`` adds. Copies, files and other devices get none.

    Raises:
        TypeError: if an attribute has a wrong type or dtype.
        ValueError: if ``choice`` is unknown, or the bits are not those of the partition.

    Example:
        >>> from vmoba_flex import BlockPartition, TopK, vmoba_attention, vmoba_selection
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> partition = BlockPartition.spatial((4, 8, 8), (4, 4))
        >>> kept = vmoba_selection(q, k, partition, TopK(2), as_bits=True)
        >>> vmoba_attention(q, k, v, partition, None, selection=kept).shape
        torch.Size([1, 2, 256, 16])
    """

    bits: Tensor
    partition: BlockPartition
    choice: Choice = "token"
    bounds: Bounds = UNBOUNDED
    recall: Tensor | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        check_bits("bits", self.bits, torch.uint8, self.partition, self.choice)
        check_is("bounds", self.bounds, Bounds)
        check_recall(self.recall, self.bits)
        if self.plan is not None:
            check_is("plan", self.plan, Plan, "planned, or None")

    @classmethod
    def of(
        cls,
        selected: Tensor,
        partition: BlockPartition,
        choice: Choice = "token",
        *,
        rule: Rule | None = None,
        recall: Tensor | None = None,
    ) -> Self:
        """A selection of one's own.

        Args:
            selected: bool ``(B, H, R, N)``: for ``"token"`` R video tokens in raster order; for ``"tile"`` the query
                tiles of the first block, of the second and so on: ``ceil(tokens of the block / 128)`` each.
            partition: the blocks; if it is causal, later chunks are not attended, whatever is chosen.
            choice: what chose.
            rule: what it was chosen by, if by a rule: it bounds density and rows. Otherwise, or if the rule bounds no
                rows, numbers are read from the device, once.
            recall: as in ``Selection``.

        Raises:
            TypeError: if an argument has a wrong type or dtype.
            ValueError: if shapes do not fit, or, without a rule, a query attends no block.
        """
        check_bits("selected", selected, torch.bool, partition, choice)
        if rule is not None:
            check_rule(rule)
            check_rule_fits(rule, partition)
        partition = partition.constant()
        with _kept_mode():
            bounds = bounds_of(selected, partition, choice, rule)
            return cls(pack_bits(selected), partition, choice, bounds, recall)

    def selected(self, part: Part | None = None) -> Tensor:
        """What each video token attends.

        Args:
            part: the heads or queries of a rank; None for all.

        Returns:
            bool ``(B, H, S, N)`` in raster order; block by block in memory.
        """
        return attended(self._rows(part), self.partition, self.choice)

    def tiles(self, part: Part | None = None) -> Tensor:
        """What each query tile of ``"shared"`` attends: bool ``(B, H, tiles, G)``, prefix and suffix included."""
        text = self.partition.prefix + self.partition.suffix
        return F.pad(self._rows(part), (0, int(text > 0), 0, -(-text // TILE)), value=True)

    def density(self) -> Tensor:
        """The share of the (query, block) pairs of each sample and head that are attended, float32 ``(B, H)``."""
        return share(self.selected(), self.partition)

    def planned(
        self, query: Tensor, backend: Literal["triton", "flash"] = "triton", *, max_row_bytes: int = MAX_ROW_BYTES
    ) -> Self:
        """The same with a plan: later calls attend and merge, and nothing else. It takes a few times the bits.

        A call whose backend, ``max_row_bytes``, text lengths or ranks ask for another plan makes it again, and says so
        once in the log. Backward needs about three times forward's bytes, and plans again where they do not fit.

        Args:
            query: of the calls to come: only its dtype and head dim matter.
            backend: of the calls to come; any on a CPU.
            max_row_bytes: as in ``vmoba_attention``.

        Raises:
            TypeError: if an argument has a wrong type or dtype.
            ValueError: if ``query`` has another number of dims, ``backend`` is neither, the rows have no bound, or the
                partition is causal.
        """
        check_tensor("query", query, "float", ("B", "H", "S", "D"))
        check_positive("query's head dim", query.shape[-1])
        check_choice("backend", backend, ("triton", "flash"))
        check_positive("max_row_bytes", max_row_bytes)
        with _kept_mode():
            if self.choice == "tile":
                return dataclasses.replace(self, plan=plan_shared(self.tiles(), self.partition, backend))
            if self.bounds.rows is None:
                raise ValueError("bounds must have rows for a plan, got None: make the selection outside of a graph")
            max_rows = max_row_bytes // (query.shape[-1] * query.element_size())
            plan = plan_packed(self.selected(), self.partition, self.bounds, max_rows, backend)
            return dataclasses.replace(self, plan=plan)

    def check(self, query: Tensor, partition: BlockPartition, choice: Choice, call: str) -> None:
        """Raises ``ValueError`` unless it is of a call with such a query, partition and choice; ``call``: its name."""
        if self.choice != choice:
            raise ValueError(f"selection must have choice={choice!r} for {call}, got {self.choice!r}")
        if self.partition.constant() != partition:
            raise ValueError(f"selection must be of the call's partition {partition}, got {self.partition}")
        for what, size, own in zip(("batch", "heads"), query.shape, self.bits.shape, strict=False):
            if size != own:
                raise ValueError(f"selection must have query's {what} {size}, got {own}")
        if self.bits.device != query.device:
            raise ValueError(
                f"selection must be on query's device {query.device}, got {self.bits.device}: pass selection.to(device)"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, the plan's too."""
        recall, plan = self.recall, self.plan
        return self.bits.nbytes + (0 if recall is None else recall.nbytes) + (0 if plan is None else plan.nbytes)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device, without a plan; raises ``TypeError`` unless ``device`` is one."""
        check_is_device("device", device)
        with _kept_mode():
            recall = None if self.recall is None else self.recall.to(device)
            return dataclasses.replace(self, bits=self.bits.to(device), recall=recall, plan=None)

    def save(self, path: Path | str) -> None:
        """Writes it to a ``.pt`` file, which appears whole or not at all.

        Raises:
            UserError: a ``ValueError``, if the name has another suffix or the file cannot be written.
        """
        recall = {} if self.recall is None else {"recall": self.recall}
        settings = {"partition": self.partition.flat, "choice": self.choice, "bounds": self.bounds.flat}
        write({"bits": self.bits} | recall, settings, path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The selection of a file that ``save`` wrote, on the CPU.

        Raises:
            UserError: a ``ValueError``, if the file cannot be read or holds no selection.
        """
        with _kept_mode():
            tensors, settings = read(path)
        try:
            partition, bounds = BlockPartition.of_flat(settings["partition"]), Bounds.of_flat(settings["bounds"])
            return cls(tensors["bits"], partition, settings["choice"], bounds, tensors.get("recall"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} holds no Selection ({one_line(error)})") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": None}

    def __repr__(self) -> str:
        batch, heads, _, rows = self.bits.shape
        return (
            f"Selection({batch} x {heads} heads, {rows} {self.choice}s choose of {self.partition.num_blocks} blocks, "
            f"at most {self.bounds.density:.3g} of all pairs, {self.bits.device}, {self.nbytes / 1e6:.1f} MB)"
        )

    def _rows(self, part: Part | None) -> Tensor:
        """What chose, of all or of a part: bool ``(B, H, R, N)``, block by block in memory."""
        bits = self.bits
        if part is not None:
            check_is("part", part, Part)
            bits = bits.index_select(1 if part.dim == 1 else 3, part.places)
        return unpack_bits(bits, self.partition.num_blocks)


def one_of(rule: Any, selection: Any) -> Rule | Selection:
    """What a call was given of the two.

    Raises:
        TypeError: if ``selection`` is neither a ``Selection`` nor None.
        ValueError: unless exactly one is given.
    """
    if selection is not None and not isinstance(selection, Selection):
        raise TypeError(
            f"selection must be a Selection or None, got {type(selection).__name__}: Selection.of makes one"
        )
    if (rule is None) == (selection is None):
        raise ValueError(f"exactly one of rule and selection must be given, got {rule!r} and {selection!r}")
    return rule if selection is None else selection


def _kept_mode() -> contextlib.AbstractContextManager[Any]:
    """Outside of inference mode, whose tensors no later call could keep for backward."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
