"""One attention call over several ranks, on torch's own distributed engine.

From below: ``collectives`` is what ranks say to one another, ``shards`` which tokens each rank holds, ``exchange``
tokens of all heads for heads of all tokens, ``cut`` a pool's best pairs where it lies on several ranks, ``balance``
which rank attends which heads, ``agreement`` whether all ranks mean the same call, ``attend`` all of it together.
"""

from vmoba_flex.distributed.balance import HeadBalance, Imbalance
from vmoba_flex.distributed.shards import TokenShards

__all__ = ["HeadBalance", "Imbalance", "TokenShards"]
