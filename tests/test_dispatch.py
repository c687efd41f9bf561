"""What "auto" picks, on tensors that are said to be on a GPU and hold nothing."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from block_masks.launching import architecture
from block_masks.plans.rows import TILE
from vmoba_flex import BlockPartition, Tail, Threshold, TopK, vmoba_attention, vmoba_selection
from vmoba_flex.call import Call
from vmoba_flex.dispatch.choose import choose, choose_backend, choose_dispatch, dense_seconds, packed_share
from vmoba_flex.groups import with_text
from vmoba_flex.part import Queries
from vmoba_flex.rules import POOLS, Pool, Rule
from vmoba_flex.selection.bounds import row_bound

ROOT = Path(__file__).parent.parent
CAPPED = Threshold(0.25, max_density=0.25)


def pick(
    tokens: int, rule: Rule = CAPPED, tail: Tail | None = None, *, heads: int = 12, gradients: bool = False,
    **changes: object,
) -> str:  # fmt: skip
    partition = BlockPartition((1, 1, tokens), (1, 1, -(-tokens // 48)))
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": gradients} | changes
    with FakeTensorMode():
        query = torch.empty(1, heads, tokens, 128, **options)
        return choose_dispatch(query, query, query, partition, rule, tail)[0]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rule", [CAPPED, Threshold(0.25), TopK(9)])
def test_full_attention_at_few_tokens_and_packed_at_many(rule: Rule, gradients: bool):
    picked = [pick(tokens, rule, gradients=gradients) for tokens in range(2048, 120_000, 4096)]
    first = picked.index("packed")
    assert set(picked[:first]) == {"dense"}
    assert set(picked[first:]) == {"packed"}


def test_gradients_and_heads_make_packed_pay_sooner():
    def first(**changes: object) -> int:
        return next(tokens for tokens in range(2048, 120_000, 1024) if pick(tokens, **changes) == "packed")

    assert first(gradients=True) < first()
    assert first(heads=40) < first()
    assert first(heads=3) > 32_000  # launches take as long for few heads
    assert pick(55_296, heads=3) == "packed"


def test_full_attention_where_nearly_all_is_chosen():
    assert pick(110_592, TopK(48)) == "dense"
    assert pick(110_592, Threshold(0.9)) == "dense"


def test_tiles_where_packed_has_no_kernels():
    assert pick(110_592, dtype=torch.float64) == "tiles"


def test_packed_on_a_cpu():
    assert pick(110_592, device="cpu") == "packed"


def test_gradients_count_only_where_they_are_wanted():
    tokens = next(n for n in range(2048, 120_000, 1024) if pick(n, gradients=True) == "packed")
    with torch.no_grad():
        assert pick(tokens, gradients=True) == "dense"


def test_stats_count_what_max_density_cut():
    query, key, value = torch.randn(3, 1, 2, 64, 8)
    partition = BlockPartition.spatial((1, 8, 8), (2, 2))
    _, free = vmoba_attention(query, key, value, partition, Threshold(0.6), return_stats=True)
    _, capped = vmoba_attention(query, key, value, partition, Threshold(0.6, max_density=0.2), return_stats=True)
    assert torch.equal(capped.pairs + capped.cut, free.pairs)
    assert (capped.cut > 0).all()
    assert (free.cut == 0).all()


def test_float64_takes_no_named_backend():
    partition = BlockPartition((1, 8, 8), (1, 4, 4))
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, 8, dtype=torch.float64, device="cuda")
        assert choose_backend("auto", "packed", query, query, query, partition) == ("eager", "")
        for backend in ("triton", "flash"):
            with pytest.raises(
                ValueError, match=r"backend must be 'auto' for dispatch='packed' and dtype torch\.float64"
            ):
                choose_backend(backend, "packed", query, query, query, partition)


@pytest.mark.parametrize("dispatch", ["packed", "shared"])
def test_flash_where_it_saves_more_than_its_launches_cost(dispatch: str):
    def taken(tokens: int, backend: str = "auto", gradients: bool = False) -> str:
        partition = BlockPartition((1, 1, tokens), (1, 1, -(-tokens // 48)))
        with FakeTensorMode(), mock.patch("vmoba_flex.dispatch.choose._flash_cannot_run", return_value=None):
            query = torch.empty(1, 12, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=gradients)
            return choose_backend(backend, dispatch, query, query, query, partition)[0]

    for gradients in (False, True):
        assert taken(13_440, gradients=gradients) == "triton"
        assert taken(55_296, gradients=gradients) == "flash"
    assert (taken(28_000), taken(28_000, gradients=True)) == ("triton", "flash")
    assert taken(13_440, "flash") == "flash"
    assert taken(55_296, "triton") == "triton"


def test_flash_takes_padding_but_for_shared_in_float16():
    def taken(dispatch: str, dtype: torch.dtype, backend: str = "auto") -> str:
        partition = BlockPartition((1, 1, 55_296), (1, 1, 1152), suffix=256)
        with FakeTensorMode(), mock.patch("vmoba_flex.dispatch.choose._flash_cannot_run", return_value=None):
            query = torch.empty(1, 12, partition.num_tokens, 128, device="cuda", dtype=dtype)
            return choose_backend(backend, dispatch, query, query, query, partition, padded=True)[0]

    for dispatch, dtype in (("packed", torch.bfloat16), ("packed", torch.float16), ("shared", torch.bfloat16)):
        assert taken(dispatch, dtype) == "flash"
    assert taken("shared", torch.float16) == "triton"
    with pytest.raises(ValueError, match=r"FlashAttention-4 in torch.float16 only if .* and text_lengths is None"):
        taken("shared", torch.float16, "flash")


@pytest.mark.parametrize("gradients", [False, True])
def test_a_tail_counts_by_its_cells(gradients: bool):
    # Of 48 blocks 32 are 0.99 of full attention's time; 864 cells are 0.04 more, 240 cells 0.01.
    assert pick(55_296, TopK(32), gradients=gradients) == "packed"
    assert pick(55_296, TopK(32), Tail(64), gradients=gradients) == "dense"
    assert pick(55_296, TopK(32), Tail(256), gradients=gradients) == "packed"


@pytest.mark.parametrize(("mode", "backward"), [("forward_ms", False), ("forward_backward_ms", True)])
def test_the_estimated_cost_of_a_tail_is_what_was_measured(mode: str, backward: bool):
    rows = json.loads((ROOT / "bench/results/h200_2026-11-30_tail.json").read_text())["rows"]
    times = {(row["dispatch"], row["backend"], row["density"], row["tail"]): row[mode] for row in rows}
    added = [
        times[*case, "Tail(cell=64)"] - without
        for (*case, tail), without in times.items()
        if case[0] == "packed" and tail == "None"
    ]
    partition, rule = BlockPartition.spatiotemporal((24, 36, 64), (8, 12, 8)), TopK(density=0.125)
    shares = [packed_share(rule, partition, tail, backward) for tail in (Tail(64), None)]
    estimated = 1e3 * (shares[0] - shares[1]) * dense_seconds(12, partition.num_tokens, 128, backward)
    assert estimated == pytest.approx(sum(added) / len(added), rel=0.02)
    assert all(estimated == pytest.approx(each, rel=0.3) for each in added)


def test_full_attention_on_gpus_older_than_the_kernels(caplog: pytest.LogCaptureFixture):
    partition = BlockPartition((1, 1, 110_592), (1, 1, 2304))
    with (
        FakeTensorMode(),
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)),
        mock.patch("torch.cuda.get_device_name", return_value="a T4"),
    ):
        query = torch.empty(1, 12, 110_592, 128, device="cuda", dtype=torch.float16)
        for _ in range(2):
            assert choose_dispatch(query, query, query, partition, TopK(9))[0] == "dense"
        assert choose_backend("auto", "dense", query, query, query, partition) == ("triton", "")
        with pytest.raises(ValueError, match=r"compute capability 8.0 .* unless dispatch='dense', got a T4 with 7.5"):
            choose_backend("auto", "packed", query, query, query, partition)
    assert caplog.text.count("full attention: the device must have") == 1


@pytest.mark.parametrize(
    ("case", "expected", "words"),
    [
        ({"tokens": 110_592}, ("packed", "flash"), ""),
        ({"tokens": 2048}, ("dense", "triton"), "too few tokens"),
        ({"tokens": 110_592, "rule": TopK(48)}, ("dense", "triton"), "the rule allows too many pairs"),
        ({"tokens": 110_592, "dtype": torch.float64}, ("tiles", "triton"), "no kernels for float64"),
        ({"tokens": 110_592, "refusal": "it is not installed"}, ("packed", "triton"), "no FlashAttention-4: it is not"),
        ({"tokens": 110_592, "rule": Threshold(0.25), "compiled": True}, ("tiles", "triton"), "give it max_density"),
        ({"tokens": 2048, "compiled": True}, ("dense", "triton"), "full attention is estimated to be faster"),
        ({"tokens": 2048, "dispatch": "packed"}, ("packed", "triton"), ""),
    ],
)
def test_what_runs_comes_with_its_reason(case: dict[str, Any], expected: tuple[str, str], words: str):
    tokens, refusal = case["tokens"], case.get("refusal")
    call = Call(BlockPartition((1, 1, tokens), (1, 1, -(-tokens // 48))), case.get("rule", CAPPED))
    with (
        FakeTensorMode(),
        mock.patch("vmoba_flex.dispatch.choose._flash_cannot_run", return_value=refusal),
        mock.patch("torch.compiler.is_compiling", return_value=case.get("compiled", False)),
    ):
        query = torch.empty(1, 12, tokens, 128, device="cuda", dtype=case.get("dtype", torch.bfloat16))
        chosen = choose(query, query, query, call, case.get("dispatch", "auto"), "auto")
    assert (chosen.dispatch, chosen.backend) == expected
    assert words in chosen.why and bool(words) == bool(chosen.why)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "sm80"), ((8, 6), "sm86"), ((8, 7), "sm80"), ((8, 9), "sm86"), ((9, 0), "sm90"), ((10, 0), "sm100"),
     ((10, 3), "sm100"), ((11, 0), "sm100"), ((12, 0), "sm120"), ((12, 1), "sm120"), ((13, 0), "sm120")],
)  # fmt: skip
def test_architectures(capability: tuple[int, int], expected: str):
    assert architecture.nvidia(*capability) == expected


def test_amds_capabilities_are_none_of_nvidias():
    assert [architecture.amd(name) for name in ("gfx942:sramecc+:xnack-", "gfx90a", "gfx1100", "gfx1201")] == [
        *["cdna"] * 2, *["rdna"] * 2
    ]  # fmt: skip
    with mock.patch("torch.version.hip", "7.0"), mock.patch("torch.cuda.get_device_capability", return_value=(9, 4)):
        assert not architecture.is_hopper(0)
        assert architecture.refusal(0) is None


@pytest.mark.parametrize("pool", POOLS)
def test_the_bound_on_rows_holds_where_kept_blocks_exceed_the_cap(pool: Pool):
    partition = BlockPartition((4, 8, 16), (1, 8, 16), suffix=3)
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 8, generator=torch.Generator().manual_seed(0))
    rules: list[Rule] = [Threshold(0.01, pool=pool, max_density=0.01, always=always) for always in ((), (1,), (1, 2))]
    rules += [] if pool == "block" else [TopK(k, pool=pool, always=(1, 2)) for k in (1, 4)]
    for rule in rules:
        bound = row_bound(partition, rule, 2, 2)
        assert bound is not None
        selection = with_text(vmoba_selection(query, key, partition, rule), partition, Queries.of(partition))
        tiles = (-(-selection.sum(2) // TILE)).sum(2).view(-1, bound.heads).sum(1)
        assert tiles.max() <= bound.row_tiles
