"""The rows of the table: which attention runs on which case, and which rows matter most."""

import dataclasses
import math
from collections.abc import Iterator

from bench.attention.shapes import Case, Sizes
from bench.common.report import Row
from bench.common.sizes import Sizes3
from vmoba_flex import Tail, Threshold, TopK

DENSITIES = (0.2, 0.1, 0.3, 0.05, 0.5)
LOW_DENSITIES = (0.125, 0.0625, 0.25)
PAPER_RULE = Threshold(0.25, max_density=0.25)
FIXED_DENSITY = TopK(density=0.1875)  # 9 of 48 blocks


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row to measure.

    Attributes:
        section: the part of the table that wants it.
        urgency: rows with less are measured first.
        case: the problem.
        attention: a peer's name, or a dispatch of ours.
        backend: of a dispatch of ours; ``"best"`` is its fastest one on the windows of the main section so far.
        compiled: whether the call runs inside ``torch.compile(fullgraph=True)``.
        stages: measure the call's stages instead of the call.
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
            parts += [f"blocks {_by(case.block)}", repr(case.rule), *[repr(case.tail)] * (case.tail is not None)]
        return " | ".join(parts + [f"{case.inputs} inputs"] * (case.inputs != "random"))


@dataclasses.dataclass(frozen=True)
class Contenders:
    """What can be measured here.

    Attributes:
        asked: names of the peers to show, installed or not.
        fast: the installed peers that may be the fastest dense attention.
        other: the other installed peers.
        tiles: the tile of each peer that attends tiles, installed or not.
        dispatches: ours, but for ``"dense"``.
        backends: of ours, but for ``"auto"``.
        compile: whether to measure ``torch.compile`` too.
    """

    asked: tuple[str, ...]
    fast: tuple[str, ...]
    other: tuple[str, ...]
    tiles: dict[str, int]
    dispatches: tuple[str, ...]
    backends: tuple[str, ...]
    compile: bool

    def backends_of(self, dispatch: str) -> tuple[str, ...]:
        """The backends that a dispatch is measured with."""
        return ("auto",) if dispatch == "auto" else self.backends


def specs(sizes: Sizes, sections: list[str], contenders: Contenders) -> list[Spec]:
    """All rows of these sections, the most urgent first."""
    makers = {
        "main": _main,
        "density": _density,
        "low": _low,
        "tokens": _tokens,
        "paper": _paper,
        "stages": _stages,
        "auto": _auto,
    }
    rows = [spec for section in sections for spec in makers[section](sizes, contenders)]
    # Of equally urgent rows those on the main shape first: each change of shape costs new inputs and new kernels.
    return sorted(rows, key=lambda s: (s.urgency, (s.case.grid, s.case.heads) != (sizes.grid, sizes.heads[0])))


def described(spec: Spec, sizes: Sizes, run: int) -> Row:
    """A row before it is measured, in the run with this index."""
    case = spec.case
    return {
        "id": spec.id,
        "sections": [spec.section],
        "status": "running",
        "attention": spec.attention,
        "backend": spec.backend,
        "compiled": spec.compiled,
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": sizes.head_dim,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "grid": case.grid,
        "kind": case.kind,
        "block": case.block,
        "blocks": case.partition.num_blocks if case.partition else 0,
        "rule": repr(case.rule) if case.rule else "",
        "tail": repr(case.tail) if case.tail else "",
        "inputs": case.inputs,
        "run": run,
    }


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
    # The first number is the urgency of the windows' rows.
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


def _low(sizes: Sizes, contenders: Contenders) -> Iterator[Spec]:
    """What a tail costs, and tiles by others at the same density."""
    cubes = Case(sizes.grid, sizes.heads[0], sizes.blocks[2])
    yield from _dense("low", 0, cubes, contenders.fast)
    for density in LOW_DENSITIES:
        rule = TopK(density=density)
        for dispatch in ("packed", "shared"):
            for tail in (None, Tail()):
                for backend in contenders.backends:
                    yield Spec("low", 3, dataclasses.replace(cubes, rule=rule, tail=tail), dispatch, backend)
        for peer, tile in contenders.tiles.items():
            yield Spec("low", 3, Case((1, 1, cubes.tokens), cubes.heads, (1, 1, tile), rule), peer)


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
