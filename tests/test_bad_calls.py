"""Bad values for every public function: each names the argument and the value, or its type, that it got."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from block_masks import (
    CoarseKeys,
    RowBound,
    TileMap,
    attend_packed,
    attend_slots,
    block_mask_from_tiles,
    from_slots,
    group_mask,
    group_tiles,
    key_lists,
    merge_coarse_keys,
    pack_bits,
    pair_lookup,
    plan_rows,
    plan_slots,
    realize,
    row_mask,
    slot_lists,
    slot_mask,
    slot_tile_map,
    tile_lists,
    to_slots,
    valid_slots,
)
from vmoba_flex import (
    BlockPartition,
    BySteps,
    Machine,
    Selection,
    Tail,
    Threshold,
    TopK,
    VMoBAConfig,
    Warmup,
    vmoba_attention,
    vmoba_inputs,
    vmoba_mask,
    vmoba_selection,
)
from vmoba_flex.dispatch.machine import HOPPER
from vmoba_flex.insight import Record, calibrate, crossover, inspect
from vmoba_flex.models import Adapter

P = BlockPartition((2, 3, 4), (1, 3, 2), suffix=2)
X = torch.zeros(1, 4, 26, 8)
NUMBERS = {"query": X, "key": X, "value": X}
NO_TENSORS = [None, 3, "x", [1.0], np.zeros((1, 4, 26, 8))]
ODD_TENSORS = [
    X.long(), X.bool(), X.to(torch.complex64), X[0], X[None], X.to_sparse(), X.to_mkldnn(),
    torch.nested.nested_tensor([X[0]], layout=torch.jagged),
]  # fmt: skip
NO_BOOLS = ["no", "yes", 1, 0, None, 1.0, [], np.True_]
NO_INTS = [None, True, 1.5, "2", [2], (2,), np.float32(2)]
NO_NUMBERS = ["1", True, [1.0], 1j, b"1"]
NO_WORDS = ["", "Auto", None, 3, True, np.zeros(2), ["auto"], b"auto"]
NO_SHARES = [0, -0.5, 1.5, "0.5", True, float("nan"), float("inf"), np.zeros(2), 2, 10**400]
Case = tuple[str, Callable[[Any], Any], Any]


def attention(name: str) -> Callable[[Any], Any]:
    return lambda value: vmoba_attention(**({**NUMBERS, "partition": P, "rule": TopK(1)} | {name: value}))


def selection(name: str) -> Callable[[Any], Any]:
    return lambda value: vmoba_selection(**({"query": X, "key": X, "partition": P, "rule": TopK(1)} | {name: value}))


def mask(name: str) -> Callable[[Any], Any]:
    return lambda value: vmoba_mask(**({"query": X, "key": X, "partition": P, "rule": TopK(1)} | {name: value}))


def inputs(name: str) -> Callable[[Any], Any]:
    given = {**NUMBERS, "partition": P, "rule": TopK(1), "tail": Tail(1)}
    return lambda value: vmoba_inputs(**(given | {name: value}))


def packed(name: str) -> Callable[[Any], Any]:
    key_group = torch.arange(26) // 13
    given = {**NUMBERS, "selected": torch.ones(1, 4, 26, 2, dtype=torch.bool), "slots": plan_slots(key_group, [13] * 2)}
    return lambda value: attend_packed(**(given | {name: value}))


def calls() -> Iterator[Case]:
    """Argument, what takes it, value."""
    for make in (attention, selection, mask, inputs):
        for name in ("query", "key") if make in (selection, mask) else ("query", "key", "value"):
            for value in [*NO_TENSORS, *ODD_TENSORS]:
                yield name, make(name), value
        for value in [None, 3, (2, 3, 4), TopK(1), P.grid]:
            yield "partition", make("partition"), value
        for value in [None, 0.25, 2, "head", TopK, Tail(4), P, {"k": 1}]:
            yield "rule", make("rule"), value
    for name in ("enable_gqa", "return_stats", "return_lse"):
        for value in NO_BOOLS:
            yield name, attention(name), value
    for value in [*NO_NUMBERS, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)]:
        yield "scale", attention("scale"), value
    for name in ("dispatch", "backend"):
        for value in NO_WORDS:
            yield name, attention(name), value
    for value in [*NO_INTS, 0, -1]:
        yield "max_row_bytes", attention("max_row_bytes"), value
        yield "tile_size", mask("tile_size"), value
        yield "tile_size", inputs("tile_size"), value
    yield "tile_size", mask("tile_size"), 2**23
    for value in NO_WORDS:
        yield "token_order", mask("token_order"), value
        yield "token_order", inputs("token_order"), value
    for value in [3, "x", [1], torch.zeros(1), torch.zeros(1, dtype=torch.int32)]:
        yield "text_lengths", attention("text_lengths"), value
        yield "text_lengths", mask("text_lengths"), value
    for value in [4, "x", TopK(1), (1, 2, 2)]:
        yield "tail", attention("tail"), value
        yield "tail", inputs("tail"), value


def objects() -> Iterator[Case]:
    for value in [*NO_INTS[1:], 0, -1]:
        yield "k", TopK, value
    for value in NO_SHARES:
        yield "density", lambda value: TopK(density=value), value
        yield "tau", Threshold, value
        yield "max_density", lambda value: Threshold(0.5, max_density=value), value
    for value in [*NO_WORDS, "block"]:
        yield "pool", lambda value: TopK(1, pool=value), value
        yield "normalize", lambda value: Threshold(0.5, normalize=value), value
        yield "gate", lambda value: Threshold(0.5, gate=value), value
        yield "gate", lambda value: TopK(1, gate=value), value
    for value in NO_WORDS:
        yield "pool", lambda value: Threshold(0.5, pool=value), value
    for value in [*NO_INTS, 0, -1]:
        if not isinstance(value, list | tuple):
            yield "cell", Tail, value
        yield "steps", Warmup, value
        yield "frames", lambda value: BlockPartition.temporal((2, 3, 4), value), value
    for value in [None, 3, (2, 3), (2, 3, 4, 5), (2, 3, 0), (2, 3.0, 4), (True, 3, 4), "234"]:
        yield "grid", lambda value: BlockPartition(value, (1, 1, 1)), value
        yield "block", lambda value: BlockPartition((2, 3, 4), value), value
    for value in [None, True, 1.5, "1", -1]:
        yield "prefix", lambda value: BlockPartition((2, 3, 4), (1, 1, 1), prefix=value), value
        yield "suffix", lambda value: BlockPartition((2, 3, 4), (1, 1, 1), suffix=value), value
    for order in (P.to_block_order, P.to_raster_order):
        for value in [None, True, 1.5, "2", 4, -5]:
            yield "dim", lambda value, order=order: order(X, value), value
        for value in [*NO_TENSORS, X.to_sparse()]:
            yield "x", order, value


def of_block_masks() -> Iterator[Case]:
    selected, key_group = torch.ones(1, 1, 8, 2, dtype=torch.bool), torch.arange(8) // 4
    for make in (group_mask, group_tiles):
        for value in [*NO_TENSORS, selected.int(), selected[0]]:
            yield "selected", lambda value, make=make: make(value, key_group), value
        for value in [*NO_TENSORS, key_group.float(), key_group[None]]:
            yield "key_group", lambda value, make=make: make(selected, value), value
        for value in [*NO_INTS, 0, -1, 2**23]:
            yield "tile_size", lambda value, make=make: make(selected, key_group, tile_size=value), value
        for value in [3, "x", torch.ones(1, 8), torch.ones(2, 8, dtype=torch.bool)]:
            yield "key_valid", lambda value, make=make: make(selected, key_group, key_valid=value), value
    for make in (pack_bits, pair_lookup):
        for value in [*NO_TENSORS, selected.int()]:
            yield "selected", make, value
    for value in [*NO_TENSORS, key_group.int()]:
        yield "key_group", lambda value: plan_slots(value, [4, 4]), value
    for value in [None, True, 1.5, "2", 0, -1]:
        yield "tile_size", lambda value: plan_slots(key_group, [4, 4], value), value
        yield "group_sizes", lambda value: plan_slots(key_group, [4, value]), value
    for name in ("query", "key", "value", "selected"):
        for value in [*NO_TENSORS, X.long(), X[0]]:
            yield name, packed(name), value
    for value in NO_NUMBERS:
        yield "scale", packed("scale"), value
    for value in [None, True, 1.5, "2"]:
        yield "max_row_bytes", packed("max_row_bytes"), value
    for value in NO_WORDS:
        yield "backend", packed("backend"), value
    for name, values in {"slots": [None, 3, key_group], "bound": [3, (1, 1)], "coarse": [3, "x", X]}.items():
        for value in values:
            yield name, packed(name), value
    for name in ("group_lengths", "query_group"):
        for value in [3, "x", torch.ones(1, 2)]:
            yield name, packed(name), value


SLOTS = plan_slots(torch.arange(8) // 4, [4, 4], 4)
ROWS = plan_rows(torch.ones(1, 8, 2, dtype=torch.bool), 4, 1, 4)
QUERY = torch.zeros(1, 1, 8, 4)
OF_TILES = torch.ones(1, 1, 2, 2, dtype=torch.bool)
OF_QUERIES = torch.ones(1, 1, 8, 2, dtype=torch.bool)
VALID = torch.ones(1, 8, dtype=torch.bool)
COARSE = CoarseKeys(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(2), torch.arange(2))
KEPT = vmoba_selection(X, X, P, TopK(1), as_bits=True)
RECORDS = [
    Record(X[0], X[0], P, kind=kind, layer=i) for i, kind in enumerate(("temporal", "spatial", "spatiotemporal"))
]
SMALL = VMoBAConfig(1, (3, 2), (1, 3, 2), TopK(1))

# A function, and the arguments of a call of it that works.
WORKING: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (plan_rows, {"selected": ROWS.row_query[None] >= 0, "row_tiles": 8, "heads": 1, "tile_size": 4}),
    (plan_slots, {"key_group": torch.arange(8) // 4, "group_sizes": [4, 4], "tile_size": 4, "sorted_keys": True}),
    (row_mask, {"plan": ROWS, "slots": SLOTS, "section": 0}),
    (key_lists, {"selected": OF_TILES, "slots": SLOTS}),
    (slot_lists, {"selected": OF_TILES, "slots": SLOTS}),
    (slot_mask, {"selected": OF_TILES, "slots": SLOTS, "slot_valid": VALID}),
    (slot_tile_map, {"selected": OF_TILES, "slots": SLOTS, "slot_valid": VALID}),
    (valid_slots, {"slots": SLOTS, "key_valid": VALID}),
    (tile_lists, {"tiles": OF_TILES}),
    (to_slots, {"x": QUERY, "slots": SLOTS}),
    (from_slots, {"x": QUERY, "slots": SLOTS}),
    (realize, {"x": QUERY}),
    (pair_lookup, {"selected": OF_QUERIES}),
    (group_mask, {"selected": OF_QUERIES, "key_group": torch.arange(8) // 4, "tile_size": 4, "key_valid": VALID}),
    (block_mask_from_tiles, {
        "tiles": TileMap(OF_TILES, OF_TILES), "mask_mod": lambda b, h, q, k: q >= k, "lengths": (8, 8),
        "tile_size": (4, 4),
    }),
    (attend_slots, {
        "query": QUERY, "key": QUERY, "value": QUERY, "selected": OF_TILES, "slots": SLOTS, "scale": 1.0,
        "group_lengths": torch.tensor([[4, 4]], dtype=torch.int32), "coarse": COARSE,
    }),
    (merge_coarse_keys, {
        "query": QUERY, "output": QUERY, "lse": QUERY[..., 0], "coarse": COARSE, "selected": OF_QUERIES, "scale": 1.0,
        "together": 1,
    }),
    (attend_packed, {
        "query": QUERY, "key": QUERY, "value": QUERY, "selected": OF_QUERIES, "slots": SLOTS, "scale": 1.0,
        "bound": RowBound(4), "max_row_bytes": 2**20, "coarse": COARSE, "plan": ROWS,
    }),
    (attend_packed, {
        "query": QUERY, "key": QUERY, "value": QUERY, "selected": OF_QUERIES, "slots": SLOTS,
        "group_lengths": torch.tensor([[4, 4]], dtype=torch.int32), "query_group": torch.arange(8) // 4,
    }),
    (Tail(4).cell_of, {"partition": P}),
    (TopK(density=0.5).blocks_per_query, {"num_blocks": 4}),
    (TopK(density=0.5).max_pairs, {"pool_pairs": 16, "num_blocks": 4}),
    (Threshold(0.5, max_density=0.5).max_pairs, {"pool_pairs": 16, "num_blocks": 4}),
    (Warmup(10).at, {"step": 1}),
    (BySteps, {"entries": {0: 1, 0.5: 2}}),
    (BySteps({0: 1, 0.5: 2}).at, {"step": 1, "num_steps": 4}),
    (Selection, {
        "bits": KEPT.bits, "partition": P, "choice": "token", "bounds": KEPT.bounds, "recall": torch.ones(1, 4),
        "plan": KEPT.planned(X).plan,
    }),
    (KEPT.planned, {"query": X, "backend": "triton", "max_row_bytes": 2**20}),
    (KEPT.to, {"device": "cpu"}),
    (KEPT.selected, {"part": None}),
    (Machine, dataclasses.asdict(HOPPER)),
    (Adapter, {
        "layers": ("blocks.*.attn1",), "grid": lambda model, arguments: (1, 2, 2), "rest": "none",
        "prefix": lambda model, arguments: 0, "padding": "none", "processor": None, "stock": (),
        "refuse": lambda model: None, "refused_pipelines": {},
    }),
    (Record, {
        "query": X[0], "key": X[0], "partition": P, "kind": "spatial", "layer": 0, "num_layers": 3, "step": 0,
        "num_steps": 4, "heads": (0, 1, 2, 3), "text_length": 1, "model": "model",
    }),
    (inspect, {"records": RECORDS, "rule": TopK(1), "tail": Tail(2), "rows": 4, "seed": 0}),
    (calibrate, {"records": RECORDS, "config": SMALL, "recall": 0.1, "by": "kind", "gates": ("mean",), "rows": 4}),
    (crossover, {
        "tokens": [512], "rule": TopK(1), "heads": 1, "head_dim": 8, "device": "cpu", "dtype": torch.float32,
        "progress": print,
    }),
]  # fmt: skip
NOTHING_TAKES = [b"x", math.nan, -math.inf, 1j, {1: "x"}, np.zeros(2), np.bool_(True), object()]
ODDITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dims": lambda x: x[..., None],
    "dtype": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "size": lambda x: torch.cat([x, x], -1),
}
# Of these what is right, or which other argument is named.
TAKEN = {
    "realize.x": "dims dtype size",
    "tile_lists.tiles": "dims size",
    "to_slots.x": "dtype size",
    "from_slots.x": "dtype size",
    "pair_lookup.selected": "size",
    "group_mask.selected": "size",
    "group_mask.key_group": "size",
    "plan_rows.selected": "size",
    "attend_packed.value": "size",
    "attend_slots.value": "size",
    "merge_coarse_keys.output": "size",
    "merge_coarse_keys.query": "size",
    "merge_coarse_keys.selected": "size",
    "plan_slots.key_group": "size",
    "planned.query": "size",
    "Record.query": "size",
    "Record.key": "size",
}
BEYOND = {"key_group": torch.arange(8) // 4 + 1, "group_lengths": torch.tensor([[5, 4]], dtype=torch.int32)}


def of_working() -> Iterator[Case]:
    """One argument of a call that works at a time, in place of which it is given what nothing takes."""
    for function, given in WORKING:
        for name, value in given.items():

            def call(bad: Any, name: str = name, function: Any = function, given: dict[str, Any] = given) -> Any:
                return function(**(given | {name: bad}))

            taken = TAKEN.get(f"{function.__name__}.{name}", "")
            kinds = [kind for kind in ODDITIES if isinstance(value, torch.Tensor) and kind not in taken]
            for bad in [*NOTHING_TAKES, *(ODDITIES[kind](value) for kind in kinds)]:
                yield name, call, bad
            if name in BEYOND:
                yield name, call, BEYOND[name]
    for bad in [torch.tensor([3]), torch.tensor([-1])]:
        yield "text_lengths", attention("text_lengths"), bad
    for field in COARSE._fields:
        for bad in [None, X, torch.zeros(3), torch.ones(2, dtype=torch.bool)]:
            coarse = COARSE._replace(**{field: bad})
            given = {"query": QUERY, "output": QUERY, "lse": QUERY[..., 0], "selected": OF_QUERIES, "scale": 1.0}
            yield f"coarse.{field}", lambda _, given=given | {"coarse": coarse}: merge_coarse_keys(**given), bad
    for bad, number in [(RowBound(0), 0), (RowBound(1, 0), 0), (RowBound(1, 2), 2), (RowBound(1.5), 1.5)]:
        yield "bound", lambda _, bad=bad: attend_packed(QUERY, QUERY, QUERY, OF_QUERIES, SLOTS, bound=bad), number


CASES = [*calls(), *objects(), *of_block_masks(), *of_working()]


def words_of(value: Any) -> list[str]:
    """How a message may say a value."""
    words = [repr(value), str(value), type(value).__name__, getattr(value, "__name__", "")]
    if isinstance(value, torch.Tensor):
        odd = value.is_nested or value.layout != torch.strided
        words += [str(value.dtype), str(value.layout)]
        words += ["a nested tensor"] if value.is_nested else [str(tuple(value.shape))]
        words += [str(value.tolist())] if value.dtype in (torch.int32, torch.int64) and not odd else []
    if isinstance(value, tuple | list):
        words += [repr(part) for part in value]
    return [word for word in words if word]


@pytest.mark.parametrize(("name", "call", "value"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_a_bad_value_is_named(name: str, call: Callable[[Any], Any], value: Any):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(value)
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message), message
    assert any(word in message for word in words_of(value)), message


@pytest.mark.parametrize(("function", "given"), WORKING, ids=[function.__name__ for function, _ in WORKING])
def test_without_a_bad_value_it_works(function: Callable[..., Any], given: dict[str, Any]):
    function(**given)


def test_there_are_many():
    assert len(CASES) > 1500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopK(0.25), r"k must be an int, got 0\.25: .* TopK\(density=0\.25\)"),  # pyright: ignore
        (
            lambda: vmoba_selection(X.transpose(1, 2), X.transpose(1, 2), P, TopK(1)),
            r"query must have .* got \(1, 26, 4, 8\), .* pass query\.transpose\(1, 2\)",
        ),
    ],
)
def test_the_way_out_is_named(call: Callable[[], Any], message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
