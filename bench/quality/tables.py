"""Answers and tables from the results; a table is its columns' names and rows of cells."""

from statistics import mean, median

from bench.quality.results import Log, finished, last_loss, loss, measured, step_ms, tokens
from bench.quality.runs import LONG, MAIN

Table = tuple[list[str], list[list[str]]]

DISPATCHES = ("dense", "packed", "shared", "auto", "tiles")
_WITHIN = 0.01

# The attentions of conditioning.py, and their names in tables.
ROUNDED = {"exact": "exact", "held": "exact, blocks held", "full": "full"}


def aims(data: Log) -> list[str]:
    """VMoBA exact against full attention, at equal steps and at equal GPU time, as a list in Markdown."""
    return [*_equal_steps(data), *_equal_time(data)]


def summary(data: Log) -> list[str]:
    """``aims``, and the other findings."""
    lines = [*aims(data), *_other_attentions(data), *_recall(data)]
    return lines or ["- No two runs to compare have ended."]


def where(data: Log) -> str:
    """The machine, its software and the date."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['gpus']} x {machine['device']}, {versions}, {machine['date']}"


def _equal_steps(data: Log) -> list[str]:
    full, exact = finished(data, "full", MAIN), finished(data, "exact", MAIN)
    if not (full and exact):
        return []
    ends = [last_loss(log) for log in full]
    a, b = mean(ends), mean(map(last_loss, exact))
    x, y = mean(map(step_ms, full)), mean(map(step_ms, exact))
    apart = f" Seeds of full attention lie {100 * (max(ends) - min(ends)) / a:.1f} % apart." if ends[1:] else ""
    return [
        f"- **At equal steps** ({tokens(data, MAIN):,} tokens, {full[0]['steps']:,} steps, mean over seeds): held-out "
        f"loss {b:.4f} with VMoBA exact, {a:.4f} with full attention: {100 * (b / a - 1):+.1f} %. The aim, at "
        f"most 1 % more, is {_verdict(b <= (1 + _WITHIN) * a)}.{apart}",
        f"- **Time of a training step** there: {y:.1f} ms with VMoBA exact, {x:.1f} ms with full attention.",
    ]


def _equal_time(data: Log) -> list[str]:
    full, exact = finished(data, "full", LONG)[:1], finished(data, "exact", LONG)[:1]
    return [
        f"- **At equal GPU time** ({tokens(data, LONG):,} tokens, {x['seconds']:.0f} and {y['seconds']:.0f} s): "
        f"held-out loss {b:.4f} with VMoBA exact after {y['steps']:,} steps of {step_ms(y):.0f} ms, {a:.4f} with full "
        f"attention after {x['steps']:,} of {step_ms(x):.0f} ms: {100 * (b / a - 1):+.1f} %. The aim, less, is "
        f"{_verdict(b < a)}."
        for x, y in zip(full, exact, strict=False)
        for a, b in [(last_loss(x), last_loss(y))]
    ]


def _other_attentions(data: Log) -> list[str]:
    rivals = {log["run"]["seed"]: last_loss(log) for log in finished(data, "full", MAIN)}
    against = [
        f"{variant} {100 * (last_loss(log) / rivals[log['run']['seed']] - 1):+.1f} %"
        for variant in measured(data, MAIN)
        for log in finished(data, variant, MAIN)
        if variant not in ("full", "exact") and log["run"]["seed"] in rivals
    ]
    if not against:
        return []
    return [f"- **Other attentions**, against full attention of the same seed: {', '.join(against)}."]


def _recall(data: Log) -> list[str]:
    layers = {
        variant: [layer for log in finished(data, variant, MAIN) for layer in log.get("layers", [])]
        for variant in ("full", "exact")
    }
    if not all(layers.values()):
        return []
    recall = {variant: mean(layer["recall"] for layer in each) for variant, each in layers.items()}
    density = mean(layer["density"] for layer in layers["exact"])
    return [
        f"- **Recall**: the paper's rule, at density {density:.2f}, finds {recall['exact']:.2f} of the attention mass "
        f"in the models trained with VMoBA exact, {recall['full']:.2f} in those trained with full attention."
    ]


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def runs(data: Log) -> Table:
    """A row for each run."""
    rows = []
    for log in data["runs"]:
        if not log.get("held_out"):
            continue
        run, layers = log["run"], log.get("layers", [])
        full = run["variant"] == "full"
        rivals = [other for other in finished(data, "full", run["size"]) if other["run"]["seed"] == run["seed"]]
        rows.append(
            [
                run["variant"],
                f"{tokens(data, run['size']):,}",
                f"{log['parameters'] / 1e6:.1f} M",
                str(run["seed"]),
                f"{log['step']:,}",
                f"{step_ms(log):.1f}",
                f"{log['seconds']:.0f}",
                f"{last_loss(log):.4f}",
                f"{100 * (last_loss(log) / last_loss(rivals[0]) - 1):+.1f} %" if rivals and not full else "",
                "1" if full else f"{mean(layer['density'] for layer in layers):.3f}" if layers else "",
                f"{log['gradient_error']['all']:.0e}" if "gradient_error" in log else "",
            ]
        )
    names = ["attention", "tokens", "parameters", "seed", "steps", "ms a step", "s of training", "held-out loss"]
    return [*names, "against full", "density", "gradients off"], rows


def levels(data: Log) -> Table:
    """Held-out loss of each run and clip at each noise level."""
    rows = [
        [log["name"], clip, *(f"{each:.3f}" for each in losses)]
        for log in data["runs"]
        if log.get("held_out")
        for clip, losses in log["held_out"][-1]["loss"].items()
    ]
    return ["run", "clip", *(f"{level:g}" for level in data["levels"])], rows


def swapped(data: Log) -> Table:
    """Held-out losses of the same weights with two attentions."""
    rows = []
    for log in data["runs"]:
        if "swapped" in log:
            own, other = f"{last_loss(log):.4f}", f"{loss(log['swapped']):.4f}"
            under = [own, other] if log["run"]["variant"] == "full" else [other, own]
            rows.append(
                [log["run"]["variant"], f"{tokens(data, log['run']['size']):,}", str(log["run"]["seed"]), *under]
            )
    return ["trained with", "tokens", "seed", "loss under full attention", "loss under VMoBA exact"], rows


def layers(data: Log) -> Table:
    """Density, tile density and recall of each layer."""
    rows = []
    for log in data["runs"]:
        if log["run"]["variant"] in ("full", "exact", "MoBA") and log["run"]["seed"] == 0:
            for index, layer in enumerate(log.get("layers", [])):
                shares = (f"{layer[name]:.3f}" for name in ("density", "tile_density", "recall"))
                rows.append([log["name"], str(index), layer["kind"], str(layer["blocks"]), *shares])
    return ["run", "layer", "kind", "blocks", "density", "tile density", "recall"], rows


def tiles(data: Log) -> Table:
    """Tile densities and errors on trained models' own query and key."""
    rows = []
    for log in data["runs"]:
        for row in log.get("probe", []):
            cells = [f"{row['tokens']:,}", f"{row['blocks']}, {row['kind']}", f"{row['density']:.3f}"]
            cells += [f"{row['tile_density'][order]:.2f}" for order in ("raster", "block", "sorted")]
            errors = row.get("relative_error", {})
            rows.append(cells + [f"{errors[name]:.1e}" if errors else "" for name in ("dense", "tiles", "packed")])
    names = ["tokens", "blocks", "density", "tiles: raster order", "block order", "queries sorted"]
    return [*names, "error: dense", "tiles", "packed"], rows


def times(data: Log) -> Table:
    """Milliseconds, forward / forward + backward, on trained models' own query and key."""
    rows = []
    for log in data["runs"]:
        for row in log.get("probe", []):
            both = row.get("times", {})
            cells = [
                " / ".join(f"{each:.1f}" for each in both[name].values()) if name in both else "" for name in DISPATCHES
            ]
            rows.append([f"{row['tokens']:,}", f"{row['blocks']}, {row['kind']}", *cells])
    return ["tokens", "blocks", *(f"`{name}`" for name in DISPATCHES)], rows


def conditioning(data: Log) -> Table:
    """How far noise moves the gradients of bench.quality.conditioning's samples."""
    rows = []
    for key, name in ROUNDED.items():
        each = [row[key] for row in data["samples"]]
        off = [x["off"] for x in each]
        shares = [median(off), max(off), median(x["median_token"] for x in each)]
        many = f"{sum(x > 0.05 for x in off)} of {len(off)}"
        hold = " / ".join(f"{100 * median(x[part] for x in each):.0f} %" for part in ("largest", "largest_off"))
        rows.append([name, *(f"{100 * share:.1f} %" for share in shares), many, hold])
    names = [
        "attention",
        "gradients off, median",
        "most",
        "a token, median",
        "off by more than 5 %",
        "ten tokens hold, of gradients / of what noise adds",
    ]
    return names, rows
