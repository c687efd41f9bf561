"""How much slower "auto" is than the better of full attention and "packed", here and where the host is slower.

    python -m bench.attention.auto --output bench/results/<gpu>_<date>_auto.json     # on a GPU

Calls from Python at many sizes, densities and numbers of heads, forward and forward + backward; bfloat16, head dim 128,
48 windows. "auto" chooses by an H200's times, and by those of the machine itself, as any other GPU does: its rate and
launch time are in the result, and ``machine.py`` has the H200's as constants. A host that launches half as fast is
simulated: no call of "packed" then takes less than twice the least of them. ``--device cpu --small`` tries it out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from bench.common import script
from bench.common.report import number, table
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.dispatch.choose import dense_seconds, packed_wins
from vmoba_flex.dispatch.machine import HOPPER, HOPPER_LAUNCH, Machine, scaled
from vmoba_flex.dispatch.machine_probe import probe
from vmoba_flex.insight.crossover import crossover, grid_of
from vmoba_flex.rules import TopK

HEADS, TOKENS, DENSITIES, DIM = (3, 12, 24), (4096, 8192, 13824, 27648, 55296), (0.0625, 0.125, 0.25), 128


def measure(device: str, small: bool) -> list[dict[str, Any]]:
    """A row for each number of heads and tokens, density, and forward or forward + backward."""
    heads, tokens, dim = ((1,), (512, 1024), 8) if small else (HEADS, TOKENS, DIM)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    for head, density in ((head, density) for head in heads for density in DENSITIES):
        rule = TopK(density=density)
        for timing in crossover(tokens, rule, heads=head, head_dim=dim, device=device, dtype=dtype):
            rows.append({"heads": head, "head_dim": dim, "asked": density} | dataclasses.asdict(timing))
            print(*rows[-1].values(), flush=True)
    return rows


def slower(rows: Sequence[dict[str, Any]], machine: Machine, launches: float = 1.0) -> list[float]:
    """How much longer what "auto" takes takes than the better one, for each row, as a share.

    Args:
        rows: of ``measure``.
        machine: that it decides by.
        launches: of the host, as a multiple of this one's.
    """
    shares = []
    for row in rows:
        least = min(other["sparse"] for other in rows if other["backward"] == row["backward"])
        packed = max(row["sparse"], launches * least)
        partition = VMoBAConfig.paper("training").partition("spatial", grid_of(row["tokens"]))
        dense = dense_seconds(row["heads"], row["tokens"], row["head_dim"], row["backward"], machine)
        wins = packed_wins(dense, row["backward"], TopK(density=row["asked"]), partition, None, machine)
        shares.append((packed if wins else row["dense"]) / min(packed, row["dense"]) - 1)
    return shares


def markdown(facts: dict[str, Any], rows: Sequence[dict[str, Any]], hosts: dict[str, list[float]]) -> str:
    """The result as a page."""
    head = ["heads", "tokens", "density", "direction", "full attention ms", "`packed` ms", *hosts]
    body = [
        [str(row["heads"]), f"{row['tokens']:,}", str(row["asked"]), "forward" + " + backward" * row["backward"],
         number(1e3 * row["dense"], 2), number(1e3 * row["sparse"], 2), *(f"{each[i]:.0%}" for each in hosts.values())]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    lines = [f"`{facts['command']}`, {facts['device']}, {facts['date']}", ""]
    lines += [f"{name}: at most {max(shares):.1%} slower" for name, shares in hosts.items()]
    return "\n".join([*lines, "", *table(head, body), ""])


def main() -> None:
    """Measures and writes the JSON file, and the table next to it."""
    args = script.output_parser(__doc__).parse_args()
    facts = script.facts_of("bench.attention.auto", args)
    hosts = {"an H200": (HOPPER, 1.0), "an H200, slow host": (scaled(HOPPER.dense_rate, 2 * HOPPER_LAUNCH), 2.0)}
    if args.device == "cuda":
        facts["dense_rate"], facts["launch_seconds"] = probe(torch.device("cuda", torch.cuda.current_device()))
        print(f"{facts['dense_rate']:.3g} operations per second, {1e6 * facts['launch_seconds']:.2f} us a launch")
        hosts["measured"] = scaled(facts["dense_rate"], facts["launch_seconds"]), 1.0
    rows = measure(args.device, args.small)
    shares = {name: slower(rows, *host) for name, host in hosts.items()}
    page = markdown(facts, rows, shares)
    script.write_results(args.output, facts | {"rows": rows, "slower": shares}, page)
    print(page)


if __name__ == "__main__":
    main()
