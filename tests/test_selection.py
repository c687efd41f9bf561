"""The selection: equal to both oracles, and what must hold for every rule and pool."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.strategies import Problem, gates, partitions, problems, rules, shares
from tests.test_reference import is_softmax, numpy_selection
from vmoba_flex import BlockPartition, Threshold, TopK, reference, vmoba_selection
from vmoba_flex.rules import POOLS, Pool
from vmoba_flex.selection.select import SHORT, _log_sort, _search, select


def own_blocks(partition: BlockPartition) -> torch.Tensor:
    return torch.nn.functional.one_hot(partition.block_ids(), partition.num_blocks).bool()


def choose(problem: Problem, **changes) -> torch.Tensor:
    problem = dataclasses.replace(problem, **changes)
    return vmoba_selection(problem.query, problem.key, problem.partition, problem.rule)


@pytest.mark.parametrize("pool", POOLS)
@given(st.data())
def test_select_equals_both_oracles(pool: str, data: st.DataObject):
    partition = data.draw(partitions(text=False))
    rule = data.draw(rules(partition.num_blocks, pool))
    scores = data.draw(gates(partition, masses=is_softmax(rule)))
    ids = reference.block_ids(partition.grid, partition.block)
    selection = select(scores, own_blocks(partition), rule)
    assert torch.equal(selection, reference.select(scores, ids, rule))
    assert np.array_equal(selection, numpy_selection(scores.numpy(), ids.numpy(), rule))


@given(problems(exact=True))
def test_whole_selection_equals_the_reference_where_arithmetic_is_exact(problem: Problem):
    _, expected = reference.vmoba(problem.query, problem.key, problem.value, problem.partition, problem.rule)
    assert torch.equal(choose(problem), expected)


@given(problems(dtype=torch.bfloat16))
def test_16_bit_inputs_choose_as_their_float32_copies_do(problem: Problem):
    problem = dataclasses.replace(problem, rule=dataclasses.replace(problem.rule, gate="mean"))  # no sum is rounded
    assert torch.equal(choose(problem), choose(problem, query=problem.query.float(), key=problem.key.float()))


@given(problems())
def test_own_block_is_always_chosen(problem: Problem):
    assert choose(problem)[..., own_blocks(problem.partition)].all()


@given(problems())
def test_everything_is_chosen_at_the_upper_end(problem: Problem):
    blocks = problem.partition.num_blocks
    for pool in POOLS:
        assert choose(problem, rule=Threshold(1.0, pool=pool)).all()
        if pool != "block":
            assert choose(problem, rule=TopK(blocks, pool=pool)).all()


@given(problems(), st.data())
def test_more_budget_chooses_a_superset(problem: Problem, data: st.DataObject):
    pool = data.draw(st.sampled_from(POOLS))
    low, high = sorted([data.draw(shares()), data.draw(shares())])
    assert (choose(problem, rule=Threshold(low, pool=pool)) <= choose(problem, rule=Threshold(high, pool=pool))).all()
    capped = choose(problem, rule=Threshold(high, pool=pool, max_density=low))
    assert (capped <= choose(problem, rule=Threshold(high, pool=pool))).all()
    if pool != "block":
        few = choose(problem, rule=TopK(density=low, pool=pool))
        assert (few <= choose(problem, rule=TopK(density=high, pool=pool))).all()


@given(problems(), st.data())
def test_top_k_keeps_exactly_k_per_query_of_its_pool(problem: Problem, data: st.DataObject):
    k = data.draw(st.integers(1, problem.partition.num_blocks))
    tokens, heads = problem.partition.num_video_tokens, problem.query.shape[1]
    assert (choose(problem, rule=TopK(k)).sum(-1) == k).all()
    assert (choose(problem, rule=TopK(k, pool="head")).sum((-1, -2)) == k * tokens).all()
    assert (choose(problem, rule=TopK(k, pool="global")).sum((-1, -2, -3)) == k * tokens * heads).all()


@given(problems(), st.sampled_from(POOLS), shares(), st.data())
def test_blocks_of_always_are_chosen_as_own_ones_are(problem: Problem, pool: Pool, share: float, data: st.DataObject):
    """The choice is that of a rule whose queries all lie in these blocks, too: others are chosen with what is left."""
    always = tuple(data.draw(st.sets(st.integers(0, problem.partition.num_blocks - 1), max_size=3)))
    every = [Threshold(share, pool=pool), Threshold(share, pool=pool, max_density=share)]
    every += [] if pool == "block" else [TopK(density=share, pool=pool)]
    for rule in every:
        chosen = choose(problem, rule=dataclasses.replace(rule, always=always))
        assert chosen[..., list(always)].all()
        assert chosen[..., own_blocks(problem.partition)].all()
        assert always or torch.equal(chosen, choose(problem, rule=rule))
        if isinstance(rule, TopK) and pool == "query":
            k = rule.blocks_per_query(problem.partition.num_blocks)
            kept = own_blocks(problem.partition)
            kept[:, list(always)] = True
            assert torch.equal(chosen.sum(-1), kept.sum(-1).clamp(min=k).expand(chosen.shape[:-1]))


@given(problems(), st.sampled_from(POOLS), shares())
def test_max_density_caps_each_pool_but_never_drops_own_blocks(problem: Problem, pool: str, cap: float):
    selection = choose(problem, rule=Threshold(1.0, pool=pool, max_density=cap))
    dims = {"query": (3,), "block": (1, 2), "head": (2, 3), "global": (1, 2, 3)}[pool]
    own = own_blocks(problem.partition).expand_as(selection)
    limit = math.floor(cap * math.prod(selection.shape[dim] for dim in dims) + 0.5)
    assert torch.equal(selection.sum(dims), own.sum(dims).clamp(min=limit))
    assert selection[own].all()


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_samples_permutes_selections(problem: Problem, random):
    order = list(range(problem.query.shape[0]))
    random.shuffle(order)
    permuted = choose(problem, query=problem.query[order], key=problem.key[order])
    assert torch.equal(permuted, choose(problem)[order])


@given(problems(), st.sampled_from([1.0, 100.0, float("nan"), float("inf")]))
def test_a_sample_does_not_see_another(problem: Problem, change: float):
    query, key = (torch.cat([x, x.roll(1, 2)]) for x in (problem.query, problem.key))
    before = choose(problem, query=query, key=key)
    query[0], key[0] = query[0] * -change, key[0] * change
    assert torch.equal(choose(problem, query=query, key=key)[1:], before[1:])


@given(problems(heads=3), st.sampled_from([1.0, 100.0, float("nan"), float("inf")]))
@example(
    Problem(
        torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8), torch.ones(1), BlockPartition((2, 1, 1), (1, 1, 1)), TopK(1)
    ),
    100.0,
)
def test_a_head_does_not_see_another_in_per_head_pools(problem: Problem, change: float):
    for rule in (TopK(density=0.5), TopK(density=0.5, pool="head"), Threshold(0.3), Threshold(0.3, pool="query")):
        before = choose(problem, rule=rule)
        query, key = problem.query.clone(), problem.key.clone()
        query[:, 1], key[:, 1] = -query[:, 1] * change, key[:, 1].flip(1) * change
        after = choose(problem, rule=rule, query=query, key=key)
        assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


@given(problems())
def test_grouped_keys_equal_repeated_keys(problem: Problem):
    groups = problem.query.shape[1] // problem.key.shape[1]
    assert torch.equal(choose(problem), choose(problem, key=problem.key.repeat_interleave(groups, 1)))


@given(problems(), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.booleans())
def test_a_pool_with_a_non_finite_score_keeps_everything(problem: Problem, bad: float, in_query: bool):
    problem = dataclasses.replace(problem, rule=Threshold(0.25, pool="head"))
    x = (problem.query if in_query else problem.key).clone()
    x[0, 0, problem.partition.prefix] = bad
    selection = choose(problem, **{"query" if in_query else "key": x})
    assert selection[0, 0].all()


@given(problems())
def test_inputs_are_not_changed(problem: Problem):
    query, key = problem.query.clone(), problem.key.clone()
    choose(problem)
    assert torch.equal(query, problem.query) and torch.equal(key, problem.key)


@pytest.mark.parametrize(
    ("spread", "chosen"), [(0.0, 4), (0.5e-6, 4), (0.999e-6, 4), (1e-6, 4), (1.001e-6, 3), (2e-6, 3), (7.0, 3)]
)
def test_pools_of_a_spread_up_to_1e_6_are_not_stretched(spread: float, chosen: int):
    own = torch.tensor([[True, False, False, False]])
    scores = torch.tensor([0.0, spread, spread, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    # Stretched, the two best hold the whole sum; unstretched, 2 spread / (2 spread + 1e-6), below 0.9.
    selection = select(scores, own, Threshold(0.9, pool="query"))
    assert selection.sum() == chosen
    assert torch.equal(selection, reference.select(scores, torch.tensor([0]), Threshold(0.9, pool="query")))


@pytest.mark.parametrize(("guard", "chosen"), [(0.5e-6, 3), (0.9e-6, 3), (1.1e-6, 2), (2e-6, 2)])
def test_the_total_is_guarded_by_1e_6(guard: float, chosen: int):
    own = torch.tensor([[True, False, False]])
    scores = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64).view(1, 1, 1, 3)
    assert select(scores, own, Threshold(1 / (1.5 + guard), pool="query")).sum() == chosen


def test_shares_far_below_the_best_one_are_summed_exactly():
    own = torch.zeros(1, 102, dtype=torch.bool)
    own[0, 0] = True
    scores = torch.tensor([0.0, 1.0, *[1e-8] * 100]).view(1, 1, 1, 102)
    # Sum 1 + 100e-8, guard 100e-8; the best pair and 51 small ones are the fewest to reach 1 + 50.5e-8.
    rule = Threshold((1 + 50.5e-8) / (1 + 200e-8), pool="query")
    assert select(scores, own, rule)[0, 0, 0].nonzero().flatten().tolist() == list(range(53))


def test_shares_are_scaled_in_float64():
    own = torch.zeros(1, 12, dtype=torch.bool)
    own[0, 0] = True
    # Shares 0, 1, four of 0.5 + 0.5e-9, six of 0.5: the best five sum to 3 + 2e-9, in float32 to 3.
    scores = torch.tensor([-1.0, 1.0, *[1e-9] * 4, *[0.0] * 6]).view(1, 1, 1, 12)
    rule = Threshold((3 + 1.5e-9) / (6 + 2e-9 + 1e-6), pool="query")
    assert select(scores, own, rule)[0, 0, 0].nonzero().flatten().tolist() == list(range(6))


@pytest.mark.parametrize(
    "bad", [[torch.inf], [-torch.inf], [torch.nan], [torch.inf, -torch.inf], [torch.inf, torch.nan]]
)
@pytest.mark.parametrize("pool", POOLS)
def test_non_finite_scores_keep_their_pool_and_rank_as_in_the_oracle(pool: str, bad: list[float]):
    partition = BlockPartition((2, 2, 3), (1, 2, 1))
    ids, own = partition.block_ids(), own_blocks(partition)
    scores = torch.randn(2, 2, 12, partition.num_blocks, generator=torch.Generator().manual_seed(0))
    scores[0, 1, 3, : len(bad)] = torch.tensor(bad)
    broken = ~scores.isfinite()
    for dim in {"query": (3,), "block": (1, 2), "head": (2, 3), "global": (1, 2, 3)}[pool]:
        broken = broken.any(dim, keepdim=True)
    selection = select(scores, own, Threshold(0.25, pool=pool))
    assert np.array_equal(selection, numpy_selection(scores.numpy(), ids.numpy(), Threshold(0.25, pool=pool)))
    assert selection[broken.expand_as(selection)].all()
    if pool != "block":
        expected = numpy_selection(scores.numpy(), ids.numpy(), TopK(2, pool=pool))
        assert np.array_equal(select(scores, own, TopK(2, pool=pool)), expected)


@pytest.mark.parametrize("tau", [0.25, 0.9, 0.999999])
@pytest.mark.parametrize("pool", ["block", "head", "global"])
def test_long_pools_equal_the_oracle(pool: str, tau: float):
    partition = BlockPartition.spatial((4, 18, 32), (6, 8))
    ids = partition.block_ids()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, len(ids), partition.num_blocks, generator=generator)
    rule = Threshold(tau, pool=pool)
    selection = select(scores, own_blocks(partition), rule)
    assert np.array_equal(selection, numpy_selection(scores.numpy(), ids.numpy(), rule))


def test_ties_go_to_the_lower_block_then_query_then_head():
    partition = BlockPartition((4, 1, 1), (1, 1, 1))
    own = own_blocks(partition)
    ties = torch.zeros(1, 2, 4, 4)
    assert (select(ties, own, TopK(2))[0, 0].int() - own.int()).argmax(-1).tolist() == [1, 0, 0, 0]
    # Four extra pairs per head: block 0 has three non-own ones, and block 1's first is query 0.
    extra = select(ties, own, TopK(2, pool="head"))[0, 0] & ~own
    assert extra.nonzero().tolist() == [[0, 1], [1, 0], [2, 0], [3, 0]]
    # Eight extra pairs over both heads: six of block 0, then block 1 for query 0 of head 0 and of head 1.
    extra = select(ties, own, TopK(2, pool="global"))[0] & ~own
    assert extra.nonzero().tolist() == [[h, s, n] for h in range(2) for s, n in [(0, 1), (1, 0), (2, 0), (3, 0)]]
    # At 1 of 8 pairs over: query before head.
    rule = Threshold(1.0, pool="global", max_density=(8 + 7) / 32)
    extra = select(ties, own, rule)[0] & ~own
    assert extra.sum((1, 2)).tolist() == [4, 3]
    # Three extra pairs of each block, over both heads: query before head.
    extra = select(ties, own, Threshold(1.0, pool="block", max_density=5 / 8))[0] & ~own
    assert [extra[..., n].T.nonzero().tolist() for n in (0, 1)] == [
        [[1, 0], [1, 1], [2, 0]],
        [[0, 0], [0, 1], [2, 0]],
    ]


def test_signed_zeros_and_nans_tie():
    own = own_blocks(BlockPartition((4, 1, 1), (1, 1, 1)))
    scores = torch.zeros(1, 1, 4, 4)
    scores[..., 1] = -0.0
    assert torch.equal(select(scores, own, TopK(2)), select(scores.abs(), own, TopK(2)))
    negative_nan = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)
    scores[..., 2], scores[..., 3] = negative_nan, torch.nan
    assert select(scores, own, TopK(2))[0, 0, 0].tolist() == [True, False, True, False]


def test_random_scores_at_the_paper_threshold():
    """Min-max scaling makes tau 0.25 nearly a fixed quantile: about 0.19 of the pairs."""
    partition = BlockPartition.spatial((8, 18, 32), (6, 8))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, partition.num_tokens, 64, generator=generator)
    density = vmoba_selection(query, key, partition, Threshold(0.25)).float().mean((2, 3))
    assert ((density > 0.17) & (density < 0.22)).all()


def test_a_gpu_sorts_only_where_no_kernel_takes_the_pools_and_says_so_once(caplog: pytest.LogCaptureFixture):
    def search(blocks: int, pool: Pool, dtype: torch.dtype = torch.float32, device: str = "cuda") -> str:
        with FakeTensorMode():
            return _search(torch.empty(1, 1, 3, blocks, dtype=dtype, device=device), pool)

    _log_sort.cache_clear()
    assert search(SHORT, "query") == "short"
    assert [search(SHORT + 1, pool) for pool in POOLS if pool != "query"] == ["long"] * 3
    assert search(SHORT + 1, "query", device="cpu") == "sort"
    assert not caplog.records
    for _ in range(2):
        assert search(SHORT + 1, "query") == search(2, "head", torch.float64) == "sort"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "the kernel for pool='query' takes at most 4096 blocks, got 4097" in caplog.text
    assert "the kernels take float32 scores, got torch.float64" in caplog.text


PARTITION = BlockPartition((2, 3, 4), (1, 3, 2), prefix=1)
X = torch.zeros(1, 4, 25, 8)


@pytest.mark.parametrize(
    ("query", "key", "partition", "rule", "error", "message"),
    [
        (X[0], X, PARTITION, TopK(1), ValueError, r"query must have 4 dims \(B, H, S, D\), got shape \(4, 25, 8\)"),
        (X, X[0], PARTITION, TopK(1), ValueError, "key must have 4 dims"),
        ("x", X, PARTITION, TopK(1), TypeError, "query must be a float16, .* tensor, got str"),
        (X.long(), X.long(), PARTITION, TopK(1), TypeError, "query must be a float16, .* tensor, got torch.int64"),
        (X, X.half(), PARTITION, TopK(1), TypeError, "key must have query's dtype torch.float32, got torch.float16"),
        (X, X.to("meta"), PARTITION, TopK(1), ValueError, "key must be on query's device cpu, got meta"),
        (X, X[:, :3], PARTITION, TopK(1), ValueError, "key heads must divide query heads 4, got 3"),
        (X, X[:, :0], PARTITION, TopK(1), ValueError, "key heads must divide query heads 4, got 0"),
        (X, X[..., :4], PARTITION, TopK(1), ValueError, r"key must have shape \(1, 4, 25, 8\) .* got \(1, 4, 25, 4\)"),
        (X, X[:, :, :9], PARTITION, TopK(1), ValueError, r"key must have shape \(1, 4, 25, 8\)"),
        (X[:0], X[:0], PARTITION, TopK(1), ValueError, r"query must have no empty dim, got shape \(0, 4, 25, 8\)"),
        (
            X[:, :, 1:],
            X[:, :, 1:],
            PARTITION,
            TopK(1),
            ValueError,
            r"query must have grid \+ prefix \+ suffix = 2x3x4 \+ 1 \+ 0 = 25 tokens in dim -2, got 24",
        ),
        (X, X, (2, 3, 4), TopK(1), TypeError, "partition must be a BlockPartition, got tuple"),
        (X, X, PARTITION, 3, TypeError, "rule must be a TopK or a Threshold, got int"),
        (X, X, PARTITION, TopK(1, always=(4,)), ValueError, r"always must lie in 0..num_blocks - 1 = 0..3, got \(4,\)"),
        (X, X, PARTITION, TopK(5), ValueError, "k must lie in 1..num_blocks = 1..4, got 5"),
    ],
)
def test_bad_input(query, key, partition, rule, error, message):
    with pytest.raises(error, match=message):
        vmoba_selection(query, key, partition, rule)


def test_selection_too_large_to_index():
    partition = BlockPartition((64, 128, 128), (1, 8, 8))
    query = torch.empty(1, 1, partition.num_tokens, 8, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 entries .* got 1 \* 1 \* 1048576 \* 16384 = 17179869184"):
        vmoba_selection(query, query, partition, TopK(1))
