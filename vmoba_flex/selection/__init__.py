"""Query, key and a rule -> which blocks each query attends.

    gate.py            query, key -> scores (B, H, S, N): the gate "mean"
    cell_places.py     where the cells of each block stand, and what is known of their keys
    cell_gate.py       the gates "cells" and "spread"
    exact_gate.py      the gate "exact", and block masses of full attention
    mass.py            scores -> attention masses
    scores.py          query, key, rule -> what the rule ranks
    weights.py         scores -> a threshold's integer weights
    select.py          scores, rule -> selection (B, H, S, N) bool
    sorted_pools.py    scores, targets -> selection, by a sort
    across_ranks.py    scores, targets -> selection, for pools that span ranks
    tiles.py           the same for tiles of queries that share one choice
    bounds.py          a rule -> the rows and the density that it allows
    bits.py, kept.py   selection -> bits, which later calls take in place of a rule
    choose.py          the public call

``*_kernels.py`` do the same in Triton: ``gate_kernels``, ``cell_gate_kernels`` and ``exact_kernels`` the gates,
``short_pool_kernels`` the selection in pools of one query, and ``long_pool_kernels`` the selection in all other pools,
with ``bracket_kernels`` and ``digit_kernels``. ``pair_kernels`` holds what these share.
"""
