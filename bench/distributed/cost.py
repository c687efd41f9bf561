"""A model of what attention over several GPUs costs: pairs, tokens, bytes, links and launches.

Each GPU attends ``heads / gpus`` heads of all tokens, as evenly as possible. Each pair and each token of a head costs a
time that does not depend on the number of GPUs, and a call costs at least what the host needs to launch it. Forward
sends query, key, value and output once, backward their gradients: of its part of such a tensor each GPU sends
``(gpus - 1) / gpus``, over the links of its node to GPUs of the node and over its network link to others.
With more GPUs than heads, queries stay, each GPU receives all keys and values, and sends back as many gradients; its
share of the queries is ``1 / gpus``.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

# Backward computes 2.5 times the forward's products.
FORWARD_BACKWARD = 3.5
# Exchanges of one call: query, key, value and output; backward as many again.
EXCHANGES = {"forward": 4, "forward_backward": 8}
MODES = tuple(EXCHANGES)
# Seconds of a call over several GPUs; measured (NOTES.md).
LAUNCHES = {
    ("packed", "forward"): 4.8e-3,
    ("packed", "forward_backward"): 8e-3,
    ("shared", "forward"): 6e-3,
    ("shared", "forward_backward"): 8e-3,
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the cost depends on, other than the call.

    Attributes:
        rates: products of queries and keys, and of weights and values, in FLOP/s, by attention and mode.
        tokens: seconds for each token of a head, in addition to its pairs; by attention and mode.
        launches: seconds in which the host launches a call, by attention and mode; 0 for others.
        link: bytes that a GPU sends in a second to the others of its node.
        latency: seconds of an exchange of nothing.
        network: bytes that a GPU sends in a second to GPUs of other nodes.
        node: GPUs of one node.
    """

    rates: Mapping[tuple[str, str], float]
    tokens: Mapping[tuple[str, str], float]
    link: float
    launches: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=lambda: dict(LAUNCHES))
    latency: float = 30e-6
    network: float = 50e9
    node: int = 8


@dataclasses.dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        tokens: of all GPUs.
        heads: of all GPUs.
        head_dim: D.
        density: pairs attended / all pairs.
        attention: by which ``Machine`` knows its rate.
        bytes_each: of an entry of a tensor.
    """

    tokens: int
    heads: int
    head_dim: int
    density: float
    attention: str
    bytes_each: int = 2


def work(call: Call, mode: str) -> float:
    """FLOP of a call on all GPUs together."""
    products = 4.0 * call.tokens**2 * call.heads * call.head_dim * call.density
    return products * (FORWARD_BACKWARD if mode == "forward_backward" else 1)


def share(call: Call, gpus: int) -> float:
    """The share of the work that the busiest GPU has."""
    return math.ceil(call.heads / gpus) / call.heads if call.heads >= gpus else 1 / gpus


def sent(call: Call, gpus: int, mode: str) -> float:
    """Bytes that a GPU sends."""
    tensor = call.tokens * call.heads * call.head_dim * call.bytes_each
    if call.heads >= gpus:
        return EXCHANGES[mode] * tensor / gpus * (gpus - 1) / gpus
    return EXCHANGES[mode] / 2 * tensor / gpus * (gpus - 1)  # keys and values, to each other GPU


def exchange_s(call: Call, gpus: int, mode: str, machine: Machine) -> float:
    """Seconds of the exchanges."""
    if gpus == 1:
        return 0.0
    inside = (min(gpus, machine.node) - 1) / (gpus - 1)
    total = sent(call, gpus, mode)
    return EXCHANGES[mode] * machine.latency + total * inside / machine.link + total * (1 - inside) / machine.network


def compute_s(call: Call, gpus: int, mode: str, machine: Machine) -> float:
    """Seconds of the busiest GPU's own work."""
    key = call.attention, mode
    whole = work(call, mode) / machine.rates[key] + call.tokens * call.heads * machine.tokens[key]
    return whole * share(call, gpus)


def predict_s(call: Call, gpus: int, mode: str, machine: Machine) -> float:
    """Seconds of a call: work and exchanges one after another, or its launches if they take longer."""
    total = compute_s(call, gpus, mode, machine) + exchange_s(call, gpus, mode, machine)
    return max(total, machine.launches.get((call.attention, mode), 0.0))


def fit(rows: Iterable[Mapping[str, Any]], **assumed: Any) -> Machine:
    """A machine from measured rows: rates from those on one GPU, the link from those on the fewest other GPUs.

    The costs of pairs and tokens solve the two one-GPU rows with the most and the fewest tokens; one row gives only the
    cost of pairs. Rows on more GPUs are left to check the predictions.

    Raises:
        ValueError: if no row is on one GPU.
    """
    done = [row for row in rows if row["status"] == "ok" and row["attention"] != "step"]
    single = [row for row in done if row["gpus"] == 1]
    if not single:
        raise ValueError("rows must have one on one GPU, got none")
    rates, tokens = {}, {}
    for attention in dict.fromkeys(row["attention"] for row in single):
        its = [row for row in single if row["attention"] == attention]
        ends = min(its, key=_tokens), max(its, key=_tokens)
        for mode in MODES:
            (pairs, lengths, first), (most, longest, last) = (
                (work(call_of(row), mode), row["tokens"] * row["heads"], row[f"{mode}_ms"] / 1e3) for row in ends
            )
            # first = pairs * pair + lengths * token, and the same of the last.
            scale = pairs * longest - most * lengths
            token = (pairs * last - most * first) / scale if scale else 0.0
            tokens[attention, mode] = token = max(token, 0.0)
            rates[attention, mode] = most / (last - longest * token)
    several = [row for row in done if row["gpus"] > 1]
    few = min((row["gpus"] for row in several), default=0)
    # By the most bytes, at which latency counts least.
    largest = max((row for row in several if row["gpus"] == few), key=_tokens, default=None)
    link = 300e9
    if largest is not None:
        link = sent(call_of(largest), few, "forward") / (largest["forward_exchange_ms"] / 1e3)
    return Machine(rates, tokens, link, **assumed)


def _tokens(row: Mapping[str, Any]) -> int:
    return row["tokens"]


def call_of(row: Mapping[str, Any]) -> Call:
    """The call of a measured row."""
    return Call(
        row["tokens"], row["heads"], row["head_dim"], row.get("density", 1.0), row["attention"], row["bytes_each"]
    )
