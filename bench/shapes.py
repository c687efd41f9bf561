"""What the table holds: which attention runs on which tokens, blocks and rule, and which rows matter most."""

import dataclasses
import math
from collections.abc import Iterator

import torch

from vmoba_flex import BlockPartition, Threshold, TopK
from vmoba_flex.rules import Rule

DENSITIES = (0.2, 0.1, 0.3, 0.05, 0.5)
PAPER_RULE = Threshold(0.25, max_density=0.25)
FIXED_DENSITY = TopK(density=0.1875)  # 9 of 48 blocks

Sizes3 = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: a shape, and for sparse attention its blocks and rule.

    Attributes:
        grid: latent video size ``(frames, height, width)``.
        heads: of query, key and value.
        block: block shape; None for dense attention.
        rule: None for dense attention.
        inputs: ``"random"``: neighbouring queries choose independently; ``"smooth"``: they mostly agree.
    """

    grid: Sizes3
    heads: int
    block: Sizes3 | None = None
    rule: Rule | None = None
    inputs: str = "random"

    @property
    def tokens(self) -> int:
        """S."""
        return math.prod(self.grid)

    @property
    def partition(self) -> BlockPartition | None:
        """The blocks."""
        return BlockPartition(self.grid, self.block) if self.block else None

    @property
    def kind(self) -> str:
        """The paper's name for the block shape; empty for dense attention."""
        if self.block is None:
            return ""
        if self.block[1:] == self.grid[1:]:
            return "1D"
        return "2D" if self.block[0] == self.grid[0] else "3D"


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row to measure.

    Attributes:
        section: the part of the table that wants it.
        urgency: rows with less are measured first.
        case: the problem.
        attention: a peer's name, or a dispatch of ours.
        backend: of a dispatch of ours; ``"best"`` is its fastest one on the windows of the main section so far.
        compiled: whether the call stands inside ``torch.compile(fullgraph=True)``.
        stages: measure the stages instead of the call.
    """

    section: str
    urgency: int
    case: Case
    attention: str
    backend: str = ""
    compiled: bool = False
    stages: bool = False

    @property
    def id(self) -> str:
        """The same for the same measurement, whatever section wants it."""
        case = self.case
        what = "stages of " * self.stages + self.attention + f"/{self.backend}" * bool(self.backend)
        parts = [what + ", compiled" * self.compiled, f"{_by(case.grid)} tokens x {case.heads} heads"]
        if case.block:
            parts += [f"blocks {_by(case.block)}", repr(case.rule)]
        return " | ".join(parts + [f"{case.inputs} inputs"] * (case.inputs != "random"))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one run of the script.

    Attributes:
        dtype: of query, key and value.
        head_dim: D.
        heads: fewer and more.
        grid: of the main section.
        blocks: its 1D, 2D and 3D block shapes.
        cells: windows along height and width where the section asks for windows: 48 in all.
        token_grids: of the tokens section, the most telling ones first.
        auto_grids: of the section on ``dispatch="auto"``.
        paper: grids with their three block shapes, and k for each where the paper gives one.
    """

    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int]
    grid: Sizes3
    blocks: tuple[Sizes3, Sizes3, Sizes3]
    cells: tuple[int, int]
    token_grids: tuple[Sizes3, ...]
    auto_grids: tuple[Sizes3, ...]
    paper: tuple[tuple[Sizes3, tuple[Sizes3, Sizes3, Sizes3], tuple[int, int, int] | None], ...]

    def windows(self, grid: Sizes3) -> Sizes3:
        """The block shape of windows through all frames."""
        return grid[0], grid[1] // self.cells[0], grid[2] // self.cells[1]


FULL = Sizes(
    dtype=torch.bfloat16,
    head_dim=128,
    heads=(12, 40),
    grid=(24, 36, 64),
    blocks=((3, 36, 64), (24, 6, 8), (8, 12, 8)),
    cells=(6, 8),
    token_grids=((14, 24, 40), (20, 30, 56), (32, 48, 72), (24, 36, 64), (14, 18, 32), (10, 18, 24), (8, 12, 24)),
    auto_grids=((24, 36, 64), (14, 24, 40), (17, 24, 40), (21, 24, 40)),
    paper=(
        ((21, 30, 52), ((3, 30, 52), (21, 5, 13), (7, 5, 13)), (2, 6, 18)),
        ((21, 45, 80), ((3, 45, 80), (21, 9, 10), (7, 15, 20)), (2, 10, 9)),
        ((24, 36, 64), ((3, 36, 64), (24, 6, 8), (8, 12, 8)), None),
        ((36, 30, 52), ((3, 30, 52), (36, 5, 13), (12, 10, 13)), None),
    ),
)
SMALL = Sizes(
    dtype=torch.float32,
    head_dim=16,
    heads=(1, 2),
    grid=(5, 12, 16),
    blocks=((2, 12, 16), (5, 6, 4), (3, 6, 8)),
    cells=(2, 4),
    token_grids=((2, 6, 16), (5, 12, 16)),
    auto_grids=((2, 6, 16),),
    paper=(((3, 10, 13), ((1, 10, 13), (3, 5, 5), (2, 5, 7)), (2, 2, 3)),),
)


@dataclasses.dataclass(frozen=True)
class Contenders:
    """What is there to measure.

    Attributes:
        asked: names of the peers to show, installed or not.
        fast: the installed peers that the fastest dense attention is among.
        other: the other installed peers.
        dispatches: ours, but for ``"dense"``.
        backends: of ours, but for ``"auto"``.
        compile: whether to measure ``torch.compile`` too.
    """

    asked: tuple[str, ...]
    fast: tuple[str, ...]
    other: tuple[str, ...]
    dispatches: tuple[str, ...]
    backends: tuple[str, ...]
    compile: bool

    def backends_of(self, dispatch: str) -> tuple[str, ...]:
        """What a dispatch is measured with."""
        return ("auto",) if dispatch == "auto" else self.backends


def specs(sizes: Sizes, sections: list[str], contenders: Contenders) -> list[Spec]:
    """All rows of these sections, the most urgent first."""
    makers = {
        "main": _main,
        "density": _density,
        "tokens": _tokens,
        "paper": _paper,
        "stages": _stages,
        "auto": _auto,
    }
    rows = [spec for section in sections for spec in makers[section](sizes, contenders)]
    # Among the equally urgent, those on the main shape first: a change of shape makes new inputs and new kernels.
    return sorted(rows, key=lambda s: (s.urgency, (s.case.grid, s.case.heads) != (sizes.grid, sizes.heads[0])))


def _dense(section: str, urgency: int, case: Case, peers: tuple[str, ...]) -> Iterator[Spec]:
    yield from (Spec(section, urgency, Case(case.grid, case.heads), peer) for peer in peers)


def _main(sizes: Sizes, contenders: Contenders) -> Iterator[Spec]:
    few = sizes.heads[0]
    slabs, windowed, cubes = (Case(sizes.grid, few, block, PAPER_RULE) for block in sizes.blocks)
    topk = dataclasses.replace(windowed, rule=FIXED_DENSITY)
    asked = contenders.asked
    yield from _dense("main", 0, windowed, tuple(peer for peer in asked if peer in contenders.fast))
    yield from _dense("main", 2, windowed, tuple(peer for peer in asked if peer not in contenders.fast))
    for case in (windowed, slabs, cubes, topk):
        yield Spec("main", 2, case, "packed", "best")
    # The first number is for the windows.
    urgencies = {"packed": (1, 2), "shared": (3, 4), "auto": (3, 4), "tiles": (6, 8)}
    for dispatch in contenders.dispatches:
        first, others = urgencies.get(dispatch, (4, 5))
        for case in (windowed, slabs, cubes, topk):
            for backend in contenders.backends_of(dispatch):
                yield Spec("main", first if case is windowed else others, case, dispatch, backend)
    if contenders.compile:
        yield Spec("main", 4, windowed, "packed", "best", compiled=True)


def _density(sizes: Sizes, contenders: Contenders) -> Iterator[Spec]:
    case = Case(sizes.grid, sizes.heads[0], sizes.windows(sizes.grid))
    yield from _dense("density", 0, case, contenders.fast)
    for density in DENSITIES:
        yield Spec("density", 3, dataclasses.replace(case, rule=TopK(density=density)), "packed", "best")


def _tokens(sizes: Sizes, contenders: Contenders) -> Iterator[Spec]:
    for index, grid in enumerate(sizes.token_grids):
        case = Case(grid, sizes.heads[0], sizes.windows(grid), FIXED_DENSITY)
        urgency = 3 if index < 4 else 4
        yield from _dense("tokens", urgency, case, contenders.fast)
        yield Spec("tokens", urgency, case, "packed", "best")
        # What "auto" falls back to at few tokens.
        yield from _dense("tokens", 4, case, tuple(peer for peer in contenders.other if peer == "FlashAttention-2"))
        yield Spec("tokens", 4, case, "auto", "auto")
        yield from _dense("tokens", 7, case, contenders.other)
        if "tiles" in contenders.dispatches:
            yield Spec("tokens", 8, case, "tiles", "best")


def _paper(sizes: Sizes, contenders: Contenders) -> Iterator[Spec]:
    largest = max((grid for grid, *_ in sizes.paper), key=math.prod)
    for heads, usual in zip(sizes.heads, (6, 7), strict=True):
        for grid, blocks, ks in sizes.paper:
            urgency = 5 if grid == largest else usual
            yield from _dense("paper", urgency, Case(grid, heads), contenders.fast)
            for block, k in zip(blocks, ks or (None,) * 3, strict=True):
                yield Spec("paper", urgency, Case(grid, heads, block, TopK(k) if k else PAPER_RULE), "packed", "best")


def _stages(sizes: Sizes, contenders: Contenders) -> Iterator[Spec]:
    slabs, windowed, cubes = (Case(sizes.grid, sizes.heads[0], block, PAPER_RULE) for block in sizes.blocks)
    for case in (windowed, slabs, cubes):
        yield Spec("stages", 3, case, "packed", "best", stages=True)


def _auto(sizes: Sizes, contenders: Contenders) -> Iterator[Spec]:
    urgency = 7
    for inputs in ("random", "smooth"):
        for grid in sizes.auto_grids:
            slab = max(1, grid[0] // 8)
            blocks = sizes.blocks if grid == sizes.grid else ((slab, *grid[1:]), sizes.windows(grid))
            for block in blocks:
                case = Case(grid, sizes.heads[0], block, PAPER_RULE, inputs)
                yield from _dense("auto", urgency, case, contenders.fast)
                yield Spec("auto", urgency, case, "auto", "auto")
                for dispatch in ("packed", "tiles"):
                    if dispatch in contenders.dispatches:
                        yield Spec("auto", urgency, case, dispatch, "best")


def _by(sizes: Sizes3) -> str:
    return "x".join(map(str, sizes))
