"""What each query attends, as bits and back.

B batch, H heads, N blocks, R what chooses: video tokens, or the query tiles of ``dispatch="shared"``.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks.checks import check_device, check_shape, check_tensor
from block_masks.plans.rows import TILE
from vmoba_flex.checks import check_choice
from vmoba_flex.groups import block_slots, group_sizes
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import pieces_of, reach

Choice = Literal["token", "tile"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


def pack_bits(selected: Tensor) -> Tensor:
    """Bools ``(B, H, R, N)`` as uint8 ``(B, H, ceil(N / 8), R)``: bit ``n % 8`` of byte ``n // 8``; the rest is 0."""
    octets = F.pad(selected.mT, (0, 0, 0, -selected.shape[-1] % 8)).unflatten(2, (-1, 8))
    place = torch.arange(8, dtype=torch.uint8, device=selected.device)[:, None]
    return (octets.byte() << place).sum(3, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_blocks: int) -> Tensor:
    """The inverse: bool ``(B, H, R, N)``, block by block in memory."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    octets = (bits[:, :, :, None] >> place).bitwise_and_(1)  # in place: a call with a plan waits for its launches
    # Inductor of torch 2.11 cannot view bytes as bools, and fuses the conversion.
    bools = octets.bool() if torch.compiler.is_compiling() else octets.view(torch.bool)
    return bools.flatten(2, 3)[:, :, :num_blocks].mT


def of_tokens(of_tiles: Tensor, partition: BlockPartition) -> Tensor:
    """What each video token attends, bool ``(B, H, video tokens, N)`` in raster order, of what its query tile does."""
    slots = block_slots(partition, of_tiles.device)
    video = slots.key_slot[partition.prefix : partition.prefix + partition.num_video_tokens]
    return of_tiles.index_select(2, video // TILE)


def allowed(selected: Tensor, partition: BlockPartition) -> Tensor:
    """What of ``(B, H, video tokens, N)`` is attended: in a causal partition, no block of a later chunk."""
    return selected if partition.causal_frames is None else selected & reach(partition, selected.device)


def attended(rows: Tensor, partition: BlockPartition, choice: Choice) -> Tensor:
    """What each video token attends, bool ``(B, H, video tokens, N)``, of what tokens or tiles chose."""
    return allowed(rows if choice == "token" else of_tokens(rows, partition), partition)


def share(selected: Tensor, partition: BlockPartition) -> Tensor:
    """The share of the pairs that may be chosen which ``(B, H, video tokens, N)`` holds, float32 ``(B, H)``."""
    if partition.causal_frames is None:
        return selected.double().mean((2, 3)).float()
    every = sum([past.num_blocks * here.video for past, here in pieces_of(partition, Queries.of(partition))])
    return (selected.sum((2, 3)).double() / every).float()


def check_bits(name: str, x: Any, dtype: torch.dtype, partition: Any, choice: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``x`` holds the choices of a partition, as bools or bits."""
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition must be a BlockPartition, got {type(partition).__name__}")
    check_choice("choice", choice, CHOICES)
    check_tensor(name, x, "bool" if dtype == torch.bool else "uint8")
    rows, blocks = _choosers(partition, choice), partition.num_blocks
    expected = (rows, blocks) if dtype == torch.bool else (-(-blocks // 8), rows)
    if x.dim() != 4 or not x.numel() or tuple(x.shape[2:]) != expected:
        raise ValueError(
            f"{name} must have shape (B, H, {expected[0]}, {expected[1]}) by partition and choice={choice!r}, got "
            f"{tuple(x.shape)}"
        )


def check_recall(recall: Any, bits: Tensor) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``recall`` is None or floating ``(B, H)``, with the bits."""
    if recall is None:
        return
    check_tensor("recall", recall, "float", ("B", "H"))
    check_shape("recall", recall, tuple(bits.shape[:2]), "bits")
    check_device("recall", recall, bits, "the bits'")


def _choosers(partition: BlockPartition, choice: Choice) -> int:
    """R, what chooses of a partition."""
    if choice == "token":
        return partition.num_video_tokens
    return sum([-(-size // TILE) for size in group_sizes(partition)[: partition.num_blocks]])
