"""A choice of blocks that is kept, as bits: made once, used by later calls in place of a rule.

B batch, H heads, S video tokens, N blocks, R what chooses: the S tokens, or the query tiles of ``dispatch="shared"``.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks import RowBound
from block_masks.plans.rows import TILE
from vmoba_flex.inputs import check_rule
from vmoba_flex.part import Part
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.bits import Choice, check_bits, of_tokens, pack_bits, read_bounds, unpack_bits
from vmoba_flex.selection.bounds import largest_density, row_bound
from vmoba_flex.user_error import UserError, new_file, one_line

_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Which blocks each query attends, one bit a block: what ``vmoba_attention(..., selection=)`` takes.

    ``vmoba_selection(..., as_bits=True)`` makes one by a rule, and ``Selection.of`` makes one of a bool tensor. A call
    with it attends what the call that would have chosen it attends, to the bit, and chooses nothing. 55,296 tokens, 12
    heads and 72 blocks take 6 MB.

    Attributes:
        bits: uint8 ``(B, H, ceil(N / 8), R)``: bit ``n % 8`` of byte ``n // 8`` says whether block n is attended.
        partition: the blocks.
        choice: what chose: ``"token"``, each of the R = S video tokens, in raster order; or ``"tile"``, each query tile
            of ``dispatch="shared"``, in block order.
        max_density: a bound on the density.
        bound: of the rows that ``dispatch="packed"`` needs; None if it is not known, and is then read from the device
            in each call.
        recall: ``(B, H)``, the share of the attention mass that is attended, if known.

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
    max_density: float = 1.0
    bound: RowBound | None = None
    recall: Tensor | None = None

    def __post_init__(self) -> None:
        check_bits("bits", self.bits, torch.uint8, self.partition, self.choice)

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
            partition: the blocks.
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
        partition = partition.constant()
        heads = selected.shape[1]
        bound = None if rule is None or choice == "tile" else row_bound(partition, rule, heads, heads)
        density = 1.0 if rule is None else largest_density(rule, partition.num_blocks)
        if bound is None and (choice == "token" or rule is None) and _can_read(selected):
            bound, found = read_bounds(selected, partition, choice)
            density = found if rule is None else density
        with _kept_mode():
            return cls(pack_bits(selected), partition, choice, density, bound, recall)

    def selected(self, part: Part | None = None) -> Tensor:
        """What each video token attends.

        Args:
            part: the heads or queries of a rank; None for all.

        Returns:
            bool ``(B, H, S, N)`` in raster order; block by block in memory.
        """
        rows = self._rows(part)
        return rows if self.choice == "token" else of_tokens(rows, self.partition)

    def tiles(self, part: Part | None = None) -> Tensor:
        """What each query tile of ``"shared"`` attends: bool ``(B, H, tiles, G)``, prefix and suffix included."""
        text = self.partition.prefix + self.partition.suffix
        return F.pad(self._rows(part), (0, int(text > 0), 0, -(-text // TILE)), value=True)

    def row_bound(self, heads: int) -> RowBound | None:
        """``bound``, of some of its heads."""
        bound = self.bound
        return bound if bound is None or bound.heads == 1 else RowBound(bound.row_tiles, heads)

    def density(self) -> Tensor:
        """The share of the (query, block) pairs of each sample and head that are attended, float32 ``(B, H)``."""
        return self.selected().double().mean((2, 3)).float()

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
        """Bytes of its tensors."""
        return self.bits.nbytes + (0 if self.recall is None else self.recall.nbytes)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        with _kept_mode():
            recall = None if self.recall is None else self.recall.to(device)
            return dataclasses.replace(self, bits=self.bits.to(device), recall=recall)

    def save(self, path: Path | str) -> None:
        """Writes it to a ``.pt`` file, which appears whole or not at all.

        Raises:
            UserError: a ``ValueError``, if the name has another suffix or the file cannot be written.
        """
        saved = {
            "version": _VERSION,
            "bits": self.bits.cpu(),
            "partition": self.partition.flat,
            "choice": self.choice,
            "max_density": self.max_density,
            "bound": None if self.bound is None else [*self.bound],
            "recall": None if self.recall is None else self.recall.cpu(),
        }
        with new_file(Path(path), ".pt", "a selection is a file of torch.save") as draft:
            torch.save(saved, draft)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The selection of a file that ``save`` wrote, on the CPU.

        Raises:
            UserError: a ``ValueError``, if the file cannot be read or holds no selection.
        """
        try:
            with _kept_mode():
                saved = torch.load(path, weights_only=True)
            if saved.pop("version") != _VERSION:
                raise ValueError(f"version must be {_VERSION}")
            bound = saved["bound"] and RowBound(*saved["bound"])
            return cls(**saved | {"partition": BlockPartition.of_flat(saved["partition"]), "bound": bound})
        except Exception as error:  # torch.load raises any of many for what is no file of its own
            raise UserError(f"{path} holds no Selection ({one_line(error)[:200]}): name a file of save") from error

    def __repr__(self) -> str:
        batch, heads, _, rows = self.bits.shape
        return (
            f"Selection({batch} x {heads} heads, {rows} {self.choice}s choose of {self.partition.num_blocks} blocks, "
            f"density at most {self.max_density:.3g}, {self.bits.device}, {self.nbytes / 1e6:.1f} MB)"
        )

    def _rows(self, part: Part | None) -> Tensor:
        """What chose, of all or of a part: bool ``(B, H, R, N)``, block by block in memory."""
        bits = self.bits
        if part is not None:
            bits = bits.index_select(1 if part.dim == 1 else 3, part.places)
        return unpack_bits(bits, self.partition.num_blocks)


def one_of(rule: Any, selection: Any) -> Rule | Selection:
    """What a call was given of the two.

    Raises:
        TypeError: if ``selection`` is neither a ``Selection`` nor None.
        ValueError: unless exactly one is given.
    """
    if selection is not None and not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection or None, got {_what(selection)}: Selection.of makes one")
    if (rule is None) == (selection is None):
        raise ValueError(f"exactly one of rule and selection must be given, got {rule!r} and {selection!r}")
    return rule if selection is None else selection


def _can_read(selected: Tensor) -> bool:
    return not selected.is_meta and not torch.compiler.is_compiling()


def _kept_mode() -> contextlib.AbstractContextManager[Any]:
    """Outside of inference mode, whose tensors no later call could keep for backward."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _what(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
