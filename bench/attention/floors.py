"""The least bytes and operations of each stage of a call, and the time that a GPU's ceilings allow for them.

Each stage reads its inputs once and writes its outputs once, in the form that it has them today: packed rows are
written and read again. Padding of tiles does not count.

H heads, S tokens, N blocks, C cells, D head dim, R rows: pairs of a query and a block that it chose.
"""

import dataclasses

BYTES_PER_S = 4.3e12
"""Of a copy on one H200, bytes read and bytes written."""
FLOP_PER_S = 790e12
"""Of a product of two bfloat16 matrices of 8192 x 8192 on one H200."""


@dataclasses.dataclass(frozen=True)
class Floor:
    """What a stage must do at least.

    Attributes:
        bytes: read and written.
        flop: of products of matrices.
    """

    bytes: float
    flop: float = 0

    @property
    def ms(self) -> float:
        """Milliseconds on a GPU with these ceilings."""
        return 1e3 * max(self.bytes / BYTES_PER_S, self.flop / FLOP_PER_S)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call.

    Attributes:
        heads: H.
        tokens: S, in whole tiles of each block.
        blocks: N.
        cells: C; 0 without a tail.
        dim: D, of keys and of values.
        element: bytes of an element.
        density: share of the pairs of tokens that are attended.
        tile: queries that share a choice; 1 for ``packed``.
    """

    heads: int
    tokens: int
    blocks: int
    cells: int
    dim: int
    element: int
    density: float
    tile: int

    @property
    def tensor(self) -> int:
        """Bytes of one tensor like query."""
        return self.heads * self.tokens * self.dim * self.element

    @property
    def rows(self) -> float:
        """R, of all heads."""
        return self.heads * self.tokens * self.density * self.blocks

    @property
    def pair_flop(self) -> float:
        """Operations of one product over all attended pairs of tokens."""
        return 2 * self.heads * self.tokens**2 * self.density * self.dim

    @property
    def cell_flop(self) -> float:
        """Operations of one product over all pairs of a query and a cell."""
        return 2 * self.heads * self.tokens * self.cells * self.dim


def floors(sizes: Sizes, backward: bool) -> dict[str, Floor]:
    """The floor of each stage of forward, or of backward, named as in ``profiles.CALL_STAGES``."""
    return (_backward if backward else _forward)(sizes)


def _forward(sizes: Sizes) -> dict[str, Floor]:
    tensor, packed = sizes.tensor, sizes.tile == 1
    choosers = sizes.heads * sizes.tokens // sizes.tile
    scores, choices, numbers = 4 * choosers * sizes.blocks, choosers * sizes.blocks, 4 * sizes.heads * sizes.tokens
    moved = sizes.rows * sizes.dim * sizes.element
    found = {
        "gate": Floor(2 * tensor + scores, 2 * choosers * sizes.blocks * sizes.dim),
        "select": Floor(scores + choices),
        "attention": Floor(2 * moved + 2 * tensor if packed else 4 * tensor, 2 * sizes.pair_flop),
    }
    if packed:
        # Which query each row holds, and which rows each query has, int32.
        found["plan"] = Floor(choices + 8 * sizes.rows + numbers)
        found["gather"] = Floor(tensor + moved)
        found["merge"] = Floor(moved + tensor + 4 * sizes.rows + numbers)
    else:
        found["slots"] = Floor(4 * tensor + (0 if sizes.cells else 4 * tensor))
    if sizes.cells:
        found["slots, cells"] = Floor(4 * tensor)
        found["tail: words"] = Floor(choices + choosers * sizes.cells / 8)
        found["tail: merge"] = Floor(3 * tensor + choosers * sizes.cells / 8 + 2 * numbers, 2 * sizes.cell_flop)
    elif packed:
        found["gather"] = Floor(tensor + moved + 4 * tensor)
    return found


def _backward(sizes: Sizes) -> dict[str, Floor]:
    tensor, packed = sizes.tensor, sizes.tile == 1
    choices, numbers = sizes.heads * sizes.tokens // sizes.tile * sizes.blocks, 4 * sizes.heads * sizes.tokens
    moved = sizes.rows * sizes.dim * sizes.element
    found: dict[str, Floor] = {}
    if packed or sizes.cells:  # else FlashAttention-4 does it itself
        found["delta"] = Floor(2 * tensor + numbers)
    if packed:
        found["plan"] = Floor(choices + 8 * sizes.rows + numbers)
        # Queries and gradients to rows; without a tail, keys and values to slots again, and their gradients back.
        found["gather"] = Floor(2 * (tensor + moved) + 8 * sizes.rows + (0 if sizes.cells else 8 * tensor))
        found["attention backward"] = Floor(3 * moved + 4 * tensor, 5 * sizes.pair_flop)
        found["sum rows"] = Floor(moved + tensor)
    else:
        found["attention backward"] = Floor(8 * tensor, 5 * sizes.pair_flop)
        # Gradients of the output to slots, of query, and without a tail of key and value, to tokens.
        found["slots"] = Floor(4 * tensor + (0 if sizes.cells else 4 * tensor))
    if sizes.cells:
        found["slots, cells, gradients"] = Floor(4 * tensor)
        found["tail: words"] = Floor(choices + sizes.heads * sizes.tokens // sizes.tile * sizes.cells / 8)
        found["tail: gradients"] = Floor(6 * tensor + 2 * choices, 7 * sizes.cell_flop)
    return found
