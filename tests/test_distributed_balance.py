"""Heads given to ranks by their density; whether ranks agree; ranks that are lost or late."""

import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import RankPool
from tests.test_distributed import PARTITION, RULES, group_of, here, problem, whole
from vmoba_flex import BlockPartition, Threshold, TopK, vmoba_attention
from vmoba_flex.distributed import HeadBalance, Imbalance, RankGroup, TokenShards
from vmoba_flex.distributed.balance import share_out

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.usefixtures("one_thread")]
RULE = Threshold(0.3, pool="global")


def uneven(heads: int = 8, key_heads: int = 8) -> Any:
    """Heads of very different densities: a pool over all of them prefers those with large queries."""
    case = problem(RULE, heads, key_heads)
    case.query.mul_(torch.tensor([1.0, 2, 4, 8] * (heads // 4)).sort().values.view(-1, 1, 1))
    return case


def balanced(case: Any, size: int, rounds: int) -> tuple[list[Any], list[Imbalance], list[int], list[float]]:
    """Outputs and gradients of some calls, what each assignment between them came to, and the last one."""
    group = group_of(size)
    balance = HeadBalance(case.key.shape[1], group)
    local = [here(x, None, case.partition, group).requires_grad_() for x in (case.query, case.key, case.value)]
    outputs, imbalances = [], []
    for _ in range(rounds):
        output = vmoba_attention(
            *local, case.partition, case.rule, scale=case.scale, dispatch="packed", enable_gqa=True,
            group=RankGroup(group, balance=balance),
        )  # fmt: skip
        upstream = torch.randn(case.query.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(output, local, here(upstream, None, case.partition, group))
        outputs.append([output.detach(), *grads])
        imbalances.append(balance.assign())
    return outputs, imbalances, balance.order.tolist(), balance.density.tolist()


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 8, 4), (8, 8, 2), (16, 8, 4), (8, 4, 2)])
def test_outputs_stay_and_work_evens_out(rank_pool: RankPool, heads: int, key_heads: int, size: int):
    case = uneven(heads, key_heads)
    expected, stats = whole(case, dispatch="packed")
    results = rank_pool.run(balanced, case, size, 3)
    orders = [order for _, _, order, _ in results]
    assert all(order == orders[0] for order in orders)  # ranks agree
    assert sorted(orders[0]) == list(range(key_heads)) != orders[0]
    for index in range(3):
        for i, one in enumerate(expected):
            found = torch.cat([outputs[index][i] for outputs, *_ in results[:size]], 2)
            assert torch.equal(found, one)
    work = stats.density.mean(0).unflatten(0, (key_heads, -1)).mean(1)
    for _, imbalances, order, density in results:
        torch.testing.assert_close(torch.tensor(density), work, rtol=1e-5, atol=1e-6)
        first, *others = imbalances
        assert first.before > 1.2 and first.after < first.before
        # What is left is what the assignment said would be.
        for other in others:
            assert other.before == pytest.approx(first.after, rel=1e-4)
        loads = work[order].view(size, -1).sum(1)
        assert first.after == pytest.approx(float(loads.max() / loads.mean()), rel=1e-4)
    assert results[0][1][0].after < 1.15


def test_the_estimate_follows_what_calls_attend(rank_pool: RankPool):
    assert all(rank_pool.run(_follows))


def _follows() -> bool:
    balance = HeadBalance(4, group_of(4))
    heads = torch.tensor([dist.get_rank()])
    balance.record(torch.tensor([0.5]), heads)
    first = balance.density[heads] / balance.calls[heads]
    for _ in range(60):
        balance.record(torch.tensor([0.1]), heads)
    last = balance.density[heads] / balance.calls[heads]
    return bool(abs(first - 0.5) < 1e-6 and 0.1 < last < 0.11)


def test_heads_are_shared_out_the_most_work_first():
    assert share_out([5.0, 1.0, 1.0, 3.0], [2, 2]) == [[0, 2], [1, 3]]
    assert share_out([1.0, 1.0, 1.0], [2, 1]) == [[0, 2], [1]]
    work = [9.0, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1]
    loads = [sum(work[head] for head in heads) for heads in share_out(work, [3, 3, 3, 3])]
    assert max(loads) <= 1.1 * sum(work) / 4


def complaints(what: str) -> list[str]:
    """What a rank has to say about bad input of one kind."""
    group, case = group_of(4), problem(RULES[6], 4)
    local = [here(x, None, PARTITION, group) for x in (case.query, case.key, case.value)]
    arguments: dict[str, Any] = {"partition": PARTITION, "rule": case.rule, "group": group}
    calls: dict[str, list[dict[str, Any]]] = {
        "group": [{"group": "ranks"}, {"group": group._get_root_mesh()}, {"group": None, "check_ranks": True}],
        "shards": [
            {"shards": (1, 2)},
            {"shards": TokenShards(sizes=(100, 118))},
            {"shards": TokenShards(sizes=(218, 0, 0, 0))},
            {"shards": TokenShards(text="replicated")},
        ],
        "balance": [{"balance": HeadBalance(5, group)}, {"group": None, "balance": HeadBalance(4, group)}],
    }
    said = []
    for call in calls[what]:
        with pytest.raises((TypeError, ValueError), match=r".") as refused:
            vmoba_attention(*local, **arguments | call)
        said.append(f"{type(refused.value).__name__}: {refused.value}")
    if what == "balance":
        few = [x[:, :2] for x in local]
        for call in ({"dispatch": "shared"}, {"balance": HeadBalance(4, group)}):
            with pytest.raises(ValueError, match=r".") as refused:
                vmoba_attention(*few, **arguments | call)
            said.append(str(refused.value))
        for bad in (lambda: HeadBalance(3, group), lambda: HeadBalance(4, group).assign()):
            with pytest.raises(ValueError, match=r".") as refused:
                bad()
            said.append(str(refused.value))
    return said


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (
            "group",
            [
                "TypeError: group must be a ProcessGroup or a DeviceMesh, got str",
                "ValueError: group must have one dim if it is a DeviceMesh, got 2",
                "ValueError: group must be given with check_ranks, got None",
            ],
        ),
        (
            "shards",
            [
                "TypeError: shards must be a TokenShards or None, got tuple",
                "ValueError: sizes must share out 218 tokens to 4 ranks, got (100, 118)",
                "ValueError: each of 4 ranks must hold tokens of its own, got none for rank 1",
                "ValueError: query must have ",
            ],
        ),
        (
            "balance",
            [
                "ValueError: balance must be made for the 4 heads of the call, got one for 5",
                "ValueError: group must be given with balance, got None",
                "dispatch must not be 'shared' with more ranks than heads, got 4 ranks and 2 heads; its tiles of "
                "queries cannot be split over ranks",
                "balance must be None with more ranks than heads, got 4 ranks and 2 heads",
                "heads must be at least the number of ranks, 4, got 3",
                "balance must have recorded a call before heads are assigned, got none",
            ],
        ),
    ],
)
def test_bad_input(rank_pool: RankPool, what: str, expected: list[str]):
    for said in rank_pool.run(complaints, what):
        assert len(said) == len(expected)
        for text, start in zip(said, expected, strict=True):
            assert text.startswith(start)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": 4}, TypeError, "sizes must be a tuple of ints or None, got 4"),
        ({"sizes": (1, 2.0)}, TypeError, "sizes must hold ints, got (1, 2.0)"),
        ({"sizes": (3, -1)}, ValueError, "sizes must be at least 0 everywhere, got (3, -1)"),
        ({"text": "first"}, ValueError, "text must be one of ('consecutive', 'split', 'replicated'), got 'first'"),
    ],
)
def test_bad_shards(arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        TokenShards(**arguments)


def disagreement(what: str) -> str:
    """What a rank is told where rank 2 means another call."""
    group, case = group_of(4), problem(RULES[6], 4)
    query, key, value = (here(x, None, PARTITION, group) for x in (case.query, case.key, case.value))
    arguments: dict[str, Any] = {"partition": PARTITION, "rule": case.rule}
    if dist.get_rank() == 2:
        if what == "tokens":
            query, key, value = (x[:, :, 1:] for x in (query, key, value))
        elif what == "heads":
            query, key, value = (x[:, 1:] for x in (query, key, value))
        elif what == "dtype":
            query, key, value = (x.double() for x in (query, key, value))
        elif what == "type":
            query = None
        else:
            other = {
                "grid": {"partition": BlockPartition((5, 7, 6), (2, 3, 4), prefix=3, suffix=5)},
                "rule": {"rule": TopK(3)},
                "scale": {"scale": 0.5},
                "dispatch": {"dispatch": "packed"},
                "shards": {"group": RankGroup(group, shards=TokenShards(text="split"), check=True)},
            }
            arguments |= other[what]
    began = time.monotonic()
    with pytest.raises(ValueError, match=r".") as refused:
        vmoba_attention(query, key, value, **{"group": RankGroup(group, check=True)} | arguments)
    assert time.monotonic() - began < 30
    return str(refused.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "grid",
            r"partition must be the same on all ranks, got .*\(5, 6, 7\).* on rank 0 and .*\(5, 7, 6\).* on rank 2",
        ),
        ("rule", r"rule must be the same on all ranks, got Threshold.* on rank 0 and TopK\(k=3.* on rank 2"),
        ("scale", "scale must be the same on all ranks, got None on rank 0 and 0.5 on rank 2"),
        ("dispatch", "dispatch must be the same on all ranks, got auto on rank 0 and packed on rank 2"),
        ("shards", "shards must be the same on all ranks, got .*consecutive.* on rank 0 and .*split.* on rank 2"),
        ("tokens", "query must have the 54 tokens of its shards on rank 2, got 53"),
        ("heads", r"query's shape without its tokens must be .* got \[2, 4, 8\] on rank 0 and \[2, 3, 8\] on rank 2"),
        ("dtype", "query's dtype must be .* got torch.float32 on rank 0 and torch.float64 on rank 2"),
        ("type", "query's shape without its tokens must be .* on rank 0 and NoneType on rank 2"),
    ],
)
def test_ranks_that_mean_different_calls(rank_pool: RankPool, what: str, message: str):
    for said in rank_pool.run(disagreement, what):  # all ranks are told the same
        assert re.fullmatch(message, said)


def late(seconds: float) -> Tensor:
    """A call that rank 1 comes late to, or never."""
    case = problem(RULES[6], 4)
    group = dist.group.WORLD
    local = [here(x, None, PARTITION, group) for x in (case.query, case.key, case.value)]
    if dist.get_rank() == 1:
        time.sleep(seconds)
    return vmoba_attention(*local, PARTITION, case.rule, group=group)


def test_late_and_lost_ranks_are_torchs_own_errors():
    with RankPool(2, timeout_s=4) as pool:
        pool.run(late, 0.0)  # in time
        began = time.monotonic()
        pool.processes[1].kill()
        lost = pool.attempt(late, 0.0, limit_s=30)[0]
        assert time.monotonic() - began < 20
    assert isinstance(lost, RuntimeError)
    assert re.search("onnection|eer|imed out", str(lost))
    with RankPool(2, timeout_s=2) as pool:
        pool.run(late, 0.0)
        slow = pool.attempt(late, 5.0, limit_s=30)[0]
    assert isinstance(slow, RuntimeError)
    assert re.search("imed out|imeout", str(slow))
