"""One attention call over several ranks, on torch's own distributed engine.

    collectives.py  what ranks say to one another
    shards.py       which tokens each rank holds
    exchange.py     tokens of all heads <-> heads of all tokens
    cut.py          a pool's best pairs where the pool lies on several ranks
    balance.py      which rank attends which heads
    agreement.py    whether all ranks mean the same call
    attend.py       all of it together
"""

from vmoba_flex.distributed.balance import HeadBalance, Imbalance
from vmoba_flex.distributed.shards import TokenShards

__all__ = ["HeadBalance", "Imbalance", "TokenShards"]
