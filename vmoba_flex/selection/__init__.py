"""Which blocks each query attends.

    gate.py            query, key -> scores (B, H, S, N)
    mass.py            scores -> estimated attention masses
    weights.py         scores -> a threshold's integer weights
    select.py          scores, rule -> selection (B, H, S, N) bool
    across_ranks.py    the same where a pool lies on several ranks

``*_kernels.py`` are the same in Triton: ``pair_kernels`` what the others share, ``short_pool_kernels`` pools of one
query, ``long_pool_kernels`` all others, by ``bracket_kernels`` and ``digit_kernels``.
"""
