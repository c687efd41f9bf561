"""The commands inspect, calibrate, plot and bench; ``arguments`` has their options."""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.dispatch.machine import path_of
from vmoba_flex.insight.calibrate import Calibrated, calibrate
from vmoba_flex.insight.crossover import Timing, break_even, crossover, grid_of
from vmoba_flex.insight.measure import inspect
from vmoba_flex.insight.profile import write_profile
from vmoba_flex.insight.records import Record, load
from vmoba_flex.rules import Rule, Threshold, TopK
from vmoba_flex.tail import Tail
from vmoba_flex.user_error import UserError, check_extra, new_file, one_line


def run_inspect(arguments: argparse.Namespace) -> str:
    """Prints a table of each head's density, recall and entropy; writes it as JSON and PNG."""
    rule = _rule(arguments)
    with contextlib.ExitStack() as files, _mendable():
        json_draft = _draft(files, arguments.json, ".json")
        png_draft = _draft(files, arguments.plot, ".png")
        tail = _tail(arguments)
        reports = inspect(_records(arguments), rule, tail=tail, rows=arguments.rows, seed=arguments.seed)
        if json_draft:
            facts = {"rows": arguments.rows, "seed": arguments.seed, "rule": _rule_in_words(rule), "tail": repr(tail)}
            json_draft.write_text(json.dumps(facts | {"heads": [dataclasses.asdict(one) for one in reports]}, indent=1))
        if png_draft:
            from vmoba_flex.insight.plot import plot_inspection

            plot_inspection(reports, png_draft)
        return _table(reports) + (
            f"\nRecall, overlap and entropy: of {arguments.rows} sampled queries, seed {arguments.seed}. Overlap: the "
            "attention weight that this and full attention give to the same keys; what a tail adds over recall."
        )


def run_calibrate(arguments: argparse.Namespace) -> str:
    """Finds rules for a wanted recall or density, and writes a config."""
    with new_file(arguments.output, ".json", "the config is JSON") as draft, _mendable():
        config = VMoBAConfig.load(arguments.config) if arguments.config else None
        records = _records(arguments)
        if config is None:
            paper = VMoBAConfig.paper("inference", records[0].partition.grid)
            config = dataclasses.replace(paper, rule=Threshold(0.5, normalize="softmax"), tail=_tail(arguments))
        wanted = {"recall": arguments.recall, "overlap": arguments.overlap, "density": arguments.wanted_density}
        options = {"by": arguments.by, "gates": arguments.gates or (), "rows": arguments.rows, "seed": arguments.seed}
        config, found = calibrate(records, config, **wanted, **options)
        draft.write_text(config.to_json() + "\n")
    lines = [_table(found), *_about_auto(config, [one for one in found if one.kept])]
    if config.dense_steps:
        lines.append(f"dense_steps: {config.dense_steps}, as in {arguments.config or 'the paper'}.")
    return "\n".join([*lines, f"Config: {arguments.output}, for VMoBAConfig.load"])


def _about_auto(config: VMoBAConfig, found: list[Calibrated]) -> list[str]:
    """What ``dispatch="auto"`` will do with the config on a GPU."""
    if config.dispatch != "auto":
        return [f"dispatch is {config.dispatch!r}, whatever dispatch='auto' would take."]
    lines = ["auto: what dispatch='auto' takes on a GPU at the recorded sizes, for one sample without gradients."]
    for one in found:
        if one.auto == "dense" and one.share >= 1:
            lines.append(
                f"{one.kind}: auto runs full attention, as 'packed' may take {one.share:.2f} of its time. "
                "Want a lower recall or density, or take smaller blocks."
            )
        elif one.auto == "dense":
            lines.append(
                f"{one.kind}: auto runs full attention, which at this size is faster than launching 'packed'. Record a "
                "larger video."
            )
    return lines


def run_plot(arguments: argparse.Namespace) -> str:
    """Draws a picture of records."""
    rule = _rule(arguments)
    check_extra("insight", "matplotlib")
    with new_file(arguments.output, ".png", "the picture is a PNG") as draft, _mendable():
        from vmoba_flex.insight import plot

        records = _records(arguments)
        if arguments.what == "density":
            tail = _tail(arguments)
            plot.plot_density(inspect(records, rule, tail=tail, rows=arguments.rows, seed=arguments.seed), draft)
        elif arguments.what == "mass":
            plot.plot_mass(_one(records, arguments), draft, rows=arguments.rows, seed=arguments.seed)
        else:
            record = _one(records, arguments)
            frames, height, width = record.partition.grid
            token = arguments.query or (frames // 2, height // 2, width // 2)
            plot.plot_choice(record, rule, draft, token=token, head=arguments.head, tail=_tail(arguments))
    return f"Picture: {arguments.output}"


def run_bench(arguments: argparse.Namespace) -> str:
    """Times sparse against full attention over token counts; on a GPU, writes what ``"auto"`` then decides by."""
    rule = _plain_rule(arguments)
    with contextlib.ExitStack() as files, _mendable():
        json_draft = _draft(files, arguments.json, ".json")
        png_draft = _draft(files, arguments.plot, ".png")
        on_gpu = torch.cuda.is_available()
        if arguments.profile and not on_gpu:
            raise UserError(f"--profile {arguments.profile} has no effect without a GPU: leave it out")
        device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
        name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        name += f", torch {torch.__version__}, {arguments.heads} heads x {arguments.head_dim}"
        sizes: dict[str, Any] = {
            "heads": arguments.heads,
            "head_dim": arguments.head_dim,
            "dispatch": arguments.dispatch,
            "tail": _tail(arguments),
        }
        tokens = arguments.tokens or [1024 << i for i in (range(2, 7) if on_gpu else range(2))]
        sizes["progress"] = lambda timing: sys.stderr.write(_in_words(timing) + "\n")
        timings = crossover(tokens, rule, **sizes, device=device, dtype=dtype)
        lines = [name, *_rounded(tokens), _table([_shown(timing) for timing in timings])]
        for backward in (False, True):
            even = break_even([timing for timing in timings if timing.backward == backward])
            what = "forward + backward" if backward else "forward"
            result = f"sparse wins from about {even:,.0f} tokens" if even else "full attention wins"
            lines.append(f"{what}: {result}")
        if json_draft:
            facts = {"device": name, "rule": repr(rule), "dispatch": arguments.dispatch, "unit": "seconds"}
            facts["tail"] = repr(sizes["tail"])
            json_draft.write_text(json.dumps(facts | {"timings": [dataclasses.asdict(t) for t in timings]}, indent=1))
        if png_draft:
            from vmoba_flex.insight.plot import plot_crossover

            plot_crossover(timings, png_draft, name)
        if on_gpu and not arguments.no_profile:
            index = torch.cuda.current_device()
            lines += write_profile(arguments.profile or path_of(index), arguments.heads, arguments.head_dim)
        return "\n".join(lines)


@contextlib.contextmanager
def _mendable() -> Iterator[None]:
    """Turns what the library refuses into an error of one line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error


def _draft(files: contextlib.ExitStack, path: Path | None, suffix: str) -> Path | None:
    if path is None:
        return None
    if suffix == ".png":
        check_extra("insight", "matplotlib")
    return files.enter_context(new_file(path, suffix, "this is a PNG" if suffix == ".png" else "this is JSON"))


def _records(arguments: argparse.Namespace) -> list[Record]:
    return [record for path in arguments.files for record in load(path)]


def _one(records: list[Record], arguments: argparse.Namespace) -> Record:
    """The first record of the layer and step that were asked for."""
    for record in records:
        if arguments.layer in (None, record.layer) and arguments.step in (None, record.step):
            return record
    recorded = sorted({(record.layer, record.step) for record in records})
    raise UserError(
        f"no record has layer {arguments.layer} and step {arguments.step}: name one of the recorded "
        f"{', '.join(f'{layer} and {step}' for layer, step in recorded[:8])}"
    )


def _rule(arguments: argparse.Namespace) -> Rule | VMoBAConfig:
    return VMoBAConfig.load(arguments.config) if arguments.config else _plain_rule(arguments)


def _plain_rule(arguments: argparse.Namespace) -> Rule:
    with _mendable():
        if arguments.density is not None:
            return TopK(density=arguments.density, pool=arguments.pool, gate=arguments.gate)
        options = {"max_density": arguments.max_density, "normalize": arguments.normalize, "gate": arguments.gate}
        return Threshold(arguments.tau, pool=arguments.pool, **options)


def _tail(arguments: argparse.Namespace) -> Tail | None:
    with _mendable():
        return None if arguments.tail is None else Tail(arguments.tail)


def _in_words(timing: Timing) -> str:
    what = "forward + backward" if timing.backward else "forward"
    times = f"full attention {1e3 * timing.dense:,.1f} ms, sparse {1e3 * timing.sparse:,.1f} ms"
    return f"{timing.tokens:,} tokens, {what}: {times}"


def _rounded(tokens: Sequence[int]) -> list[str]:
    """A line for each wanted number of tokens that no video of square frames has."""
    grids = [(count, grid_of(count)) for count in tokens]
    return [
        f"{count:,} tokens: timed at {'x'.join(map(str, grid))} = {math.prod(grid):,}, the nearest with square frames."
        for count, grid in grids
        if math.prod(grid) != count
    ]


class _Shown(NamedTuple):
    """A timing as the table shows it, by the names of the columns."""

    tokens: str
    direction: str
    full_attention_ms: str
    sparse_ms: str
    speed_up: float
    density: float


def _shown(timing: Timing) -> _Shown:
    direction = "forward + backward" if timing.backward else "forward"
    times = f"{1e3 * timing.dense:,.1f}", f"{1e3 * timing.sparse:,.1f}"
    return _Shown(f"{timing.tokens:,}", direction, *times, timing.dense / timing.sparse, timing.density)


def _rule_in_words(rule: Rule | VMoBAConfig) -> Any:
    return json.loads(rule.to_json()) if isinstance(rule, VMoBAConfig) else repr(rule)


def _table(rows: Sequence[Any]) -> str:
    """Dataclasses or named tuples as text, one a line."""
    facts = [one._asdict() if hasattr(one, "_asdict") else dataclasses.asdict(one) for one in rows]
    empty = {name for name in facts[0] if all(one[name] is None for one in facts)}
    facts = [{name: value for name, value in one.items() if name not in empty} for one in facts]
    cells = [[name.replace("_", " ") for name in facts[0]]]
    cells += [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in one.values()] for one in facts]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
