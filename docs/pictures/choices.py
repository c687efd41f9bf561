"""What rules choose from one matrix of scores."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vmoba_flex import BlockPartition, Threshold, TopK, vmoba_selection

PARTITION = BlockPartition((1, 1, 16), (1, 1, 2))
TAU, CAP = 0.25, 0.15


def _inputs() -> tuple[Tensor, Tensor]:
    """Query and key of one head: queries like blocks near their own, some much and some little.

    In float64, so that no machine's rounding is seen in a picture.
    """
    generator = torch.Generator().manual_seed(3)
    place = torch.arange(16, dtype=torch.float64)[:, None] / 16
    waves = torch.cat([f(2 * torch.pi * place * i) for i in (1, 2) for f in (torch.sin, torch.cos)], -1)
    strength = 0.3 + 1.4 * torch.rand((16, 1), generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn((2, 16, 4), generator=generator, dtype=torch.float64)
    query, key = strength * (waves + noise[0]), waves + noise[1]
    return query[None, None], key[None, None]


def _scores() -> Tensor:
    query, key = _inputs()
    return (query @ key.unflatten(2, (-1, 2)).mean(3).mT)[0, 0]


def draw_pools() -> Figure:
    """The scores, and what four rules choose."""
    query, key = _inputs()
    rules = {
        'TopK(2)\npool="query"': TopK(2),
        'TopK(2)\npool="head"': TopK(2, pool="head"),
        f'Threshold({TAU})\npool="query"': Threshold(TAU, pool="query"),
        f'Threshold({TAU})\npool="head"': Threshold(TAU, pool="head"),
    }
    figure = Figure(figsize=(8.4, 4.5), layout="constrained")
    scores, *others = figure.subplots(1, 5, sharey=True)
    scores.imshow(_scores(), cmap="Greys", aspect="equal")
    scores.set_title("scores of a head,\ndarker: higher", fontsize=10)
    scores.set_xlabel("blocks")
    scores.set_ylabel("queries")
    own = torch.arange(8) == PARTITION.block_ids()[:, None]
    for target, (name, rule) in zip(others, rules.items(), strict=True):
        chosen = vmoba_selection(query, key, PARTITION, rule)[0, 0]
        _choice(target, chosen, own)
        target.set_title(name, fontsize=10)
        target.set_xlabel(f"density {chosen.float().mean():.2f}")
    for target in (scores, *others):
        target.set(xticks=range(8), yticks=range(16))
        target.tick_params(labelsize=8, length=2)
    figure.supxlabel("Dark: attended. White dot: the query's own block, which is always attended.", fontsize=9.5)
    return figure


def _choice(target: Axes, chosen: Tensor, own: Tensor) -> None:
    target.imshow(0.75 * chosen.float(), cmap="Greys", vmin=0, vmax=1, aspect="equal")
    y, x = own.nonzero().T
    target.scatter(x, y, s=14, color="white", edgecolor="black", linewidth=0.6)
    target.set_xticks([i - 0.5 for i in range(9)], minor=True)
    target.set_yticks([i - 0.5 for i in range(17)], minor=True)
    target.grid(which="minor", color="black", linewidth=0.3)
    target.tick_params(which="minor", length=0)


def draw_threshold() -> Figure:
    """The pairs of a head from best to worst, and where each rule ends."""
    query, key = _inputs()
    scores = _scores()
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    own = torch.arange(8) == PARTITION.block_ids()[:, None]
    ranked = torch.cat([scaled[own].sort(descending=True).values, scaled[~own].sort(descending=True).values])
    share = ranked.cumsum(0) / ranked.sum()
    ends = {
        f"max_density={CAP}": Threshold(TAU, max_density=CAP),
        "TopK(2)": TopK(2, pool="head"),
        f"Threshold({TAU})": Threshold(TAU),
    }
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    places = torch.arange(len(ranked))
    count = int(own.sum())
    above.bar(places[:count], ranked[:count], width=1, color="#d0d0d0", edgecolor="black", linewidth=0.5, hatch="////",
              label="own blocks, in any case")  # fmt: skip
    above.bar(places[count:], ranked[count:], width=1, color="#7a7a7a", edgecolor="black", linewidth=0.3,
              label="other pairs, best first")  # fmt: skip
    above.set_ylabel("scaled score")
    above.legend(loc="upper right", frameon=False)
    below.plot(places + 0.5, share, color="black")
    below.axhline(TAU, color="black", linewidth=0.8, linestyle=":")
    below.text(len(ranked) - 0.5, TAU + 0.03, f"tau = {TAU}", ha="right", va="bottom", fontsize=9)
    below.set(ylabel="share of the sum", xlabel="pairs of one head (128: 16 queries x 8 blocks)", ylim=(0, 1.02))
    above.set_title("own blocks, then the best others, until their scaled scores hold tau of the sum", fontsize=10)
    styles = zip(("--", "-.", "-"), (0.97, 0.84, 0.71), strict=True)
    for (name, rule), (style, height) in zip(ends.items(), styles, strict=True):
        end = int(vmoba_selection(query, key, PARTITION, rule).sum()) - 0.5
        for target in (above, below):
            target.axvline(end, color="black", linestyle=style, linewidth=1.3)
        above.text(
            end + 0.9, height, f"{name} ends here", fontsize=9, va="top", transform=above.get_xaxis_transform(),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    above.set(xlim=(-0.5, len(ranked) - 0.5), ylim=(0, 1.35))
    return figure
