"""The insight tools on the command line: inspect, calibrate, plot, bench."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.insight.calibrate import calibrate
from vmoba_flex.insight.crossover import break_even, crossover
from vmoba_flex.insight.measure import inspect
from vmoba_flex.insight.records import Record, load
from vmoba_flex.rules import NORMALIZE, POOLS, Rule, Threshold, TopK
from vmoba_flex.user_error import UserError, check_extra, new_file


def run_inspect(arguments: argparse.Namespace) -> str:
    """Prints a table of each head's density, recall and entropy; writes it as JSON and PNG."""
    rule = _rule(arguments)
    with contextlib.ExitStack() as files, _mendable():
        json_draft = _draft(files, arguments.json, ".json")
        png_draft = _draft(files, arguments.plot, ".png")
        reports = inspect(_records(arguments), rule, rows=arguments.rows, seed=arguments.seed)
        if json_draft:
            facts = {"rows": arguments.rows, "seed": arguments.seed, "rule": _rule_in_words(rule)}
            json_draft.write_text(json.dumps(facts | {"heads": [dataclasses.asdict(one) for one in reports]}, indent=1))
        if png_draft:
            from vmoba_flex.insight.plot import plot_inspection

            plot_inspection(reports, png_draft)
        return _table(reports) + f"\nRecall and entropy: of {arguments.rows} sampled queries, seed {arguments.seed}."


def run_calibrate(arguments: argparse.Namespace) -> str:
    """Finds rules for a wanted recall or density, and writes a config."""
    with new_file(arguments.output, ".json", "the config is JSON") as draft, _mendable():
        config = _config(arguments.config) if arguments.config else None
        records = _records(arguments)
        if config is None:
            paper = VMoBAConfig.paper("training", records[0].partition.grid)
            config = dataclasses.replace(paper, rule=Threshold(0.5, normalize="softmax"))
        wanted = {"recall": arguments.recall, "density": arguments.density}
        config, found = calibrate(records, config, **wanted, rows=arguments.rows, seed=arguments.seed)
        draft.write_text(config.to_json() + "\n")
    return _table(found) + f"\nConfig: {arguments.output}, for VMoBAConfig.from_json"


def run_plot(arguments: argparse.Namespace) -> str:
    """Draws a picture of records."""
    rule = _rule(arguments)
    check_extra("insight", "matplotlib")
    with new_file(arguments.output, ".png", "the picture is a PNG") as draft, _mendable():
        from vmoba_flex.insight import plot

        records = _records(arguments)
        if arguments.what == "density":
            plot.plot_density(inspect(records, rule, rows=arguments.rows, seed=arguments.seed), draft)
        elif arguments.what == "mass":
            plot.plot_mass(_one(records, arguments), draft, rows=arguments.rows, seed=arguments.seed)
        else:
            record = _one(records, arguments)
            frames, height, width = record.partition.grid
            token = arguments.query or (frames // 2, height // 2, width // 2)
            plot.plot_choice(record, rule, draft, token=token, head=arguments.head)
    return f"Picture: {arguments.output}"


def run_bench(arguments: argparse.Namespace) -> str:
    """Times sparse against full attention over token counts."""
    rule = _plain_rule(arguments)
    with contextlib.ExitStack() as files, _mendable():
        json_draft = _draft(files, arguments.json, ".json")
        png_draft = _draft(files, arguments.plot, ".png")
        on_gpu = torch.cuda.is_available()
        device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
        name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        name += f", torch {torch.__version__}, {arguments.heads} heads x {arguments.head_dim}"
        sizes = {"heads": arguments.heads, "head_dim": arguments.head_dim, "dispatch": arguments.dispatch}
        tokens = arguments.tokens or [1024 << i for i in (range(2, 7) if on_gpu else range(3))]
        timings = crossover(tokens, rule, **sizes, device=device, dtype=dtype)
        lines = [name, _table(timings)]
        for backward in (False, True):
            even = break_even([timing for timing in timings if timing.backward == backward])
            what = "forward + backward" if backward else "forward"
            result = f"sparse wins from about {even:,.0f} tokens" if even else "full attention wins"
            lines.append(f"{what}: {result}")
        if json_draft:
            facts = {"device": name, "rule": repr(rule), "dispatch": arguments.dispatch}
            json_draft.write_text(json.dumps(facts | {"timings": [dataclasses.asdict(t) for t in timings]}, indent=1))
        if png_draft:
            from vmoba_flex.insight.plot import plot_crossover

            plot_crossover(timings, png_draft, name)
        return "\n".join(lines)


def add_commands(commands: Any, token: Any) -> None:
    """Adds the subcommands to a parser; ``token`` parses T,Y,X."""
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what capture(model).save wrote")
    reading.add_argument("--rows", type=int, default=256, help="sampled queries of a record (default: %(default)s)")
    reading.add_argument("--seed", type=int, default=0, help="that draws them (default: %(default)s)")
    choosing = argparse.ArgumentParser(add_help=False)
    choosing.add_argument("--config", type=Path, metavar="JSON", help="blocks and rules of a VMoBAConfig")
    plain = argparse.ArgumentParser(add_help=False)
    plain.add_argument("--tau", type=float, default=0.25, help="a Threshold's share (default: %(default)s)")
    plain.add_argument("--density", type=float, help="instead, a TopK's share of the blocks")
    plain.add_argument("--pool", choices=POOLS, default="head", help="what competes (default: %(default)s)")
    plain.add_argument("--normalize", choices=NORMALIZE, default="minmax", help="a Threshold's (default: %(default)s)")
    plain.add_argument("--max-density", type=float, help="a Threshold's cap")
    outputs = argparse.ArgumentParser(add_help=False)
    outputs.add_argument("--json", type=Path, metavar="JSON", help="write the results here")
    outputs.add_argument("--plot", type=Path, metavar="PNG", help="draw them here")

    words = "density, recall and entropy of each head"
    one = commands.add_parser("inspect", parents=[reading, choosing, plain, outputs], help=words, description=words)
    one.set_defaults(run=run_inspect)

    words = "find the rules that reach a wanted recall or density"
    one = commands.add_parser("calibrate", parents=[reading, choosing], help=words, description=words)
    wanted = one.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--recall", type=float, help="wanted share of attention")
    wanted.add_argument("--density", type=float, help="wanted share of the pairs")
    one.add_argument("--output", type=Path, metavar="JSON", default=Path("vmoba.json"), help="default: %(default)s")
    one.set_defaults(run=run_calibrate)

    words = "draw attention by block, a query's choice, or density over layers and steps"
    one = commands.add_parser("plot", parents=[reading, choosing, plain], help=words, description=words)
    one.add_argument("--what", choices=("mass", "choice", "density"), default="mass", help="default: %(default)s")
    one.add_argument("--output", type=Path, metavar="PNG", default=Path("vmoba_plot.png"), help="default: %(default)s")
    one.add_argument("--layer", type=int, help="of mass and choice (default: the first recorded)")
    one.add_argument("--step", type=int, help="likewise")
    one.add_argument("--head", type=int, help="of a choice (default: the first recorded)")
    one.add_argument("--query", type=token, metavar="T,Y,X", help="of a choice (default: the middle)")
    one.set_defaults(run=run_plot)

    words = "time sparse against full attention on this machine"
    one = commands.add_parser("bench", parents=[plain, outputs], help=words, description=words)
    one.add_argument("--tokens", type=int, nargs="+", help="default: 4096 to 65536 on a GPU, 1024 to 4096 on a CPU")
    one.add_argument("--heads", type=int, default=12, help="default: %(default)s")
    one.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    one.add_argument("--dispatch", choices=("packed", "shared", "tiles"), default="packed", help="default: %(default)s")
    one.set_defaults(run=run_bench)


@contextlib.contextmanager
def _mendable() -> Iterator[None]:
    """Turns what the library refuses into an error of one line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


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
    there = sorted({(record.layer, record.step) for record in records})
    raise UserError(
        f"no record has layer {arguments.layer} and step {arguments.step}: name one of the recorded "
        f"{', '.join(f'{layer} and {step}' for layer, step in there[:8])}"
    )


def _config(path: Path) -> VMoBAConfig:
    try:
        return VMoBAConfig.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: name a JSON file that VMoBAConfig.to_json wrote") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no VMoBAConfig ({' '.join(str(error).split())}): mend it") from error


def _rule(arguments: argparse.Namespace) -> Rule | VMoBAConfig:
    return _config(arguments.config) if arguments.config else _plain_rule(arguments)


def _plain_rule(arguments: argparse.Namespace) -> Rule:
    with _mendable():
        if arguments.density is not None:
            return TopK(density=arguments.density, pool=arguments.pool)
        options = {"max_density": arguments.max_density, "normalize": arguments.normalize}
        return Threshold(arguments.tau, pool=arguments.pool, **options)


def _rule_in_words(rule: Rule | VMoBAConfig) -> Any:
    return json.loads(rule.to_json()) if isinstance(rule, VMoBAConfig) else repr(rule)


def _table(rows: Sequence[Any]) -> str:
    """Dataclasses or named tuples as text, a line each."""
    facts = [one._asdict() if hasattr(one, "_asdict") else dataclasses.asdict(one) for one in rows]
    cells = [[name.replace("_", " ") for name in facts[0]]]
    cells += [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in one.values()] for one in facts]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
