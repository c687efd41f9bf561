"""One attention call over several ranks, on torch's own distributed engine.

    shards.py      which tokens each rank holds
    exchange.py    tokens of all heads <-> heads of all tokens
    balance.py     which rank attends which heads
    agreement.py   whether all ranks mean the same call
    group.py       the ranks that share a call, and how
    attend.py      a whole call

``vmoba_flex.collectives`` has what ranks send to each other.
"""

from vmoba_flex.distributed.balance import HeadBalance, Imbalance
from vmoba_flex.distributed.group import RankGroup
from vmoba_flex.distributed.shards import TokenShards

__all__ = ["HeadBalance", "Imbalance", "RankGroup", "TokenShards"]
