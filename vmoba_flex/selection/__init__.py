"""Query, key and a rule -> which blocks each query attends.

    gate.py            query, key -> scores (B, H, S, N)
    mass.py            scores -> estimated attention masses
    weights.py         scores -> a threshold's integer weights
    select.py          scores, rule -> selection (B, H, S, N) bool
    sorted_pools.py    scores, targets -> selection, by a sort
    across_ranks.py    scores, targets -> selection, for pools that span ranks
    tiles.py           the same for tiles of queries that share one choice
    bounds.py          a rule -> the rows and the density that it allows
    bits.py, kept.py   selection -> bits, which later calls take in place of a rule
    choose.py          the public call

``*_kernels.py`` do the same in Triton: ``gate_kernels`` the gate, ``short_pool_kernels`` the selection in pools of one
query, and ``long_pool_kernels`` the selection in all other pools, with ``bracket_kernels`` and ``digit_kernels``.
``pair_kernels`` holds what these share.
"""
