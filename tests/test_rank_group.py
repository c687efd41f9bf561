"""RankGroup, and the keywords of ``vmoba_attention`` that it replaces."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankPool
from tests.test_distributed import PARTITION, RULES, group_of, here, problem
from vmoba_flex import BlockPartition, TopK, vmoba_attention
from vmoba_flex.distributed import HeadBalance, RankGroup, TokenShards

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.usefixtures("one_thread")]
SHARDS = TokenShards(text="split")


def old_and_new() -> list[str]:
    """What calls with the old keywords warned of, on a rank, if they gave what a RankGroup gives."""
    group, case = group_of(2), problem(RULES[6], 4)
    if dist.get_rank() >= 2:
        return []
    local = [here(x, SHARDS, PARTITION, group) for x in (case.query, case.key, case.value)]

    def attend(**options: object) -> torch.Tensor:
        return vmoba_attention(*local, PARTITION, case.rule, dispatch="packed", **options)

    shared = RankGroup(group, shards=SHARDS, balance=HeadBalance(4, group), check=True)
    expected = attend(group=shared)
    with pytest.warns(DeprecationWarning, match="RankGroup") as warned:
        assert torch.equal(
            attend(group=group, shards=SHARDS, balance=HeadBalance(4, group), check_ranks=True), expected
        )
    assert all(warning.filename == __file__ for warning in warned)
    with pytest.warns(DeprecationWarning, match="RankGroup"):
        assert torch.equal(attend(group=RankGroup(group, check=True), shards=SHARDS), expected)
    # One made outside a graph, and old keywords inside one, which cannot warn.
    outside = RankGroup(group, shards=SHARDS)
    for options in ({"group": outside}, {"group": group, "shards": SHARDS}):
        torch.compiler.reset()
        compiled = torch.compile(lambda options=options: attend(**options), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(), expected)
    return [str(warning.message) for warning in warned]


def test_old_keywords_give_the_same_and_warn(rank_pool: RankPool):
    new = {"shards": "shards", "balance": "balance", "check_ranks": "check"}
    expected = [
        f"{old} of vmoba_attention is deprecated: pass group=RankGroup(group, {name}=...)" for old, name in new.items()
    ]
    assert rank_pool.run(old_and_new)[:2] == [expected] * 2


def complaints() -> list[str]:
    """What a rank has to say about a RankGroup that cannot be made."""
    group = group_of(4)
    said = []
    for arguments in [
        {"group": "ranks"},
        {"group": group._get_root_mesh()},
        {"group": group, "shards": (1, 2)},
        {"group": group, "balance": group},
        {"group": group, "check": 1},
    ]:
        with pytest.raises((TypeError, ValueError), match=r".") as refused:
            RankGroup(**arguments)
        said.append(f"{type(refused.value).__name__}: {refused.value}")
    return said


def test_bad_values(rank_pool: RankPool):
    expected = [
        "TypeError: group must be a ProcessGroup or a DeviceMesh, got str",
        "ValueError: group must have one dim if it is a DeviceMesh, got 2",
        "TypeError: shards must be a TokenShards or None, got tuple",
        "TypeError: balance must be a HeadBalance or None, got DeviceMesh",
        "TypeError: check must be a bool, got 1",
    ]
    for said in rank_pool.run(complaints):
        assert [text[: len(start)] for text, start in zip(said, expected, strict=True)] == expected


def test_keywords_that_never_were():
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(TypeError, match=r"vmoba_attention\(\) got an unexpected keyword argument 'cheque'"):
        vmoba_attention(query, query, query, BlockPartition((1, 2, 2), (1, 1, 1)), TopK(1), cheque=True)
