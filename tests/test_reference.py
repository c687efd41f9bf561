"""The two oracles, written apart from each other, agree."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle_numpy
from tests.strategies import Problem, gates, partitions, problems, rules
from vmoba_flex import Threshold, TopK, reference


def numpy_selection(scores, ids, rule):
    """The NumPy oracle's selection for a rule object."""
    if isinstance(rule, TopK):
        options = {"k": rule.blocks_per_query(scores.shape[-1])}
    else:
        options = {"tau": rule.tau, "max_density": rule.max_density, "normalize": rule.normalize}
    return oracle_numpy.select(scores, ids, pool=rule.pool, always=rule.always, **options)


def is_softmax(rule) -> bool:
    return isinstance(rule, Threshold) and rule.normalize == "softmax"


@given(st.data())
def test_oracles_select_the_same(data: st.DataObject):
    partition = data.draw(partitions(text=False))
    rule = data.draw(rules(partition.num_blocks))
    scores = data.draw(gates(partition, masses=is_softmax(rule)))
    ids = reference.block_ids(partition.grid, partition.block)
    expected = numpy_selection(scores.numpy(), ids.numpy(), rule)
    assert np.array_equal(reference.select(scores, ids, rule), expected)


@given(problems(), st.sampled_from([1, 3, 4, 128]))
def test_oracles_share_the_same(problem: Problem, tile_size: int):
    p = problem.partition
    rule = dataclasses.replace(problem.rule, gate="mean")  # test_gates.py has the others
    _, selection = reference.vmoba(problem.query, problem.key, problem.value, p, rule, tile_size=tile_size)
    ids = oracle_numpy.block_ids(p.grid, p.block)
    query, key = (x.double().numpy()[:, :, p.prefix : p.prefix + len(ids)] for x in (problem.query, problem.key))
    # In block order, a tile begins with its block and then every tile_size tokens.
    order = np.argsort(ids, kind="stable")
    rank = np.arange(len(ids)) - np.searchsorted(ids[order], ids[order])
    starts = np.flatnonzero(rank % tile_size == 0)
    sizes = np.diff(np.append(starts, len(ids)))
    means = np.add.reduceat(query[:, :, order], starts, axis=2) / sizes[:, None]
    scores = oracle_numpy.gate(means, key, ids, p.num_blocks)
    if is_softmax(problem.rule):
        scores = oracle_numpy.mass(scores, ids, query.shape[-1])
    chosen = numpy_selection(scores, ids[order][starts], problem.rule)
    assert np.array_equal(selection.numpy()[:, :, order], chosen.repeat(sizes, axis=2))


@given(problems())
def test_oracles_attend_the_same(problem: Problem):
    p = problem.partition
    rule = dataclasses.replace(problem.rule, gate="mean")
    output, selection = reference.vmoba(problem.query, problem.key, problem.value, p, rule, scale=0.3)
    ids = oracle_numpy.block_ids(p.grid, p.block)
    mask = oracle_numpy.attention_mask(selection.numpy(), ids, p.prefix, p.suffix)
    assert np.array_equal(reference.attention_mask(selection, p), mask)
    query, key, value = problem.query.numpy(), problem.key.numpy(), problem.value.numpy()
    expected, lse = oracle_numpy.attention(query, key, value, mask, scale=0.3)
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-11)
    _, reference_lse = reference.attention(
        problem.query, problem.key, problem.value, reference.attention_mask(selection, p), scale=0.3
    )
    np.testing.assert_allclose(reference_lse, lse, rtol=1e-11, atol=1e-11)
