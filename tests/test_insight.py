"""Records, what is measured on them, and the rules that are found from them."""

import dataclasses
import itertools
import math
import os
import stat
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.paths import attend
from tests.strategies import Problem
from tests.test_tail import tailed
from vmoba_flex import (
    BlockPartition,
    BySteps,
    Remember,
    Tail,
    Threshold,
    TopK,
    VMoBAConfig,
    block_masses,
    reference,
    vmoba_selection,
)
from vmoba_flex.dispatch.choose import choose_dispatch
from vmoba_flex.insight import Record, Timing, break_even, calibrate, crossover, inspect, load, save
from vmoba_flex.insight.calibrate import _auto_is_packed
from vmoba_flex.insight.masses import best_choice, entropy_of, overlap_of, recall_of, true_mass
from vmoba_flex.insight.measure import layer_of, own_blocks, sample_rows
from vmoba_flex.insight.search import MARGIN
from vmoba_flex.user_error import UserError

GRID = (4, 6, 8)
CONFIG = VMoBAConfig(1, (3, 4), (2, 3, 4), Threshold(0.5, normalize="softmax"))


def record_of(problem: Problem) -> Record:
    key = problem.key[0].repeat_interleave(problem.query.shape[1] // problem.key.shape[1], 0)
    length = None if problem.text_lengths is None else int(problem.text_lengths[0])
    return Record(problem.query[0], key, problem.partition, text_length=length)


def record(layer: int = 0, seed: int = 0, **facts) -> Record:
    kind = CONFIG.cycle[layer % 3]
    query, key = torch.randn(2, 2, math.prod(GRID), 16, generator=torch.Generator().manual_seed(seed))
    return Record(3 * query, key, CONFIG.partition(kind, GRID), kind=kind, layer=layer, **facts)


@given(tailed(), st.booleans())
def test_reports_are_those_of_dense_attention(problem: Problem, with_tail: bool):
    problem = dataclasses.replace(problem, query=problem.query[:1], key=problem.key[:1])
    one, partition = record_of(problem), problem.partition
    lengths = None if one.text_length is None else torch.tensor([one.text_length])
    selection = vmoba_selection(problem.query, one.key[None], partition, problem.rule)
    there = reference.attention_mask(torch.ones_like(selection), partition, lengths)
    # With the identity as value, an output is the weight of each key, and a cell spreads its own over its tokens.
    key, value = one.key[None], torch.eye(partition.num_tokens).expand(1, len(one.key), -1, -1)
    shares, mask = (
        reference.attention(one.query[None], key, value, there)[0][0],
        reference.attention_mask(selection, partition, lengths),
    )
    video = slice(partition.prefix, partition.prefix + partition.num_video_tokens)
    kept = (shares * mask[0]).sum(-1)[:, video].mean(-1)
    entropy = torch.special.entr(shares).sum(-1)[:, video].mean(-1)
    cells, tail = (key, value, mask, None), None
    if with_tail:
        tail = problem.tail
        assert tail is not None
        cells = reference.with_cells(key, value, selection, mask, partition, tail.cell_of(partition))
    weights = reference.attention(one.query[None], cells[0], cells[1], cells[2], bias=cells[3])[0][0]
    overlap = torch.minimum(weights, shares).sum(-1)[:, video].mean(-1)
    for head, report in enumerate(inspect([one], problem.rule, tail=tail, rows=10_000)):
        assert report.head == head
        assert report.density == pytest.approx(selection[0, head].float().mean().item())
        assert report.recall == pytest.approx(kept[head].item(), abs=1e-5)
        assert report.overlap == pytest.approx(overlap[head].item(), abs=1e-5)
        assert report.overlap == report.recall or with_tail
        assert report.entropy == pytest.approx(entropy[head].item(), abs=1e-4)


@given(tailed())
def test_overlap_bounds_the_error_of_outputs(problem: Problem):
    problem = dataclasses.replace(
        problem, query=problem.query[:1], key=problem.key[:1], value=problem.value[:1], text_lengths=None, scale=None
    )
    one, partition = record_of(problem), problem.partition
    rows = torch.arange(partition.num_video_tokens)
    selection = vmoba_selection(problem.query, one.key[None], partition, problem.rule)
    overlap = overlap_of(one, partition, rows, selection[0], problem.tail)
    full = attend(dataclasses.replace(problem, tail=None), dispatch="dense")
    off = (attend(problem, dispatch="packed") - full).abs().amax(-1)[0, :, partition.prefix :][:, : len(rows)]
    assert (off <= 2 * (1 - overlap) * problem.value.abs().max() + 1e-5).all()


@given(st.data())
def test_the_best_choice_is_the_best_of_all_with_as_many_pairs(data: st.DataObject):
    heads, rows, blocks = 2, 2, 3
    seed, pool = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(["query", "block", "head", "global"]))
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(heads, rows, blocks, generator=generator)
    own = torch.nn.functional.one_hot(torch.randint(blocks, (rows,), generator=generator), blocks).bool()
    chosen = own | (torch.rand(mass.shape, generator=generator) < 0.4)
    best = best_choice(mass, own, chosen, pool)
    assert (best | ~own).all()
    dims = {"query": (2,), "block": (0, 1), "head": (1, 2), "global": (0, 1, 2)}[pool]
    assert torch.equal(best.sum(dims), chosen.sum(dims))
    allowed = torch.tensor(list(itertools.product([False, True], repeat=mass.numel()))).view(-1, *mass.shape)
    fits = (allowed | ~own).flatten(1).all(1)
    # Counts of pools, one dim of them at least.
    counts = allowed.sum([dim + 1 for dim in dims]).view(len(allowed), -1)
    fits &= (counts == chosen.sum(dims).view(-1)).all(1)
    most = recall_of(mass, allowed[fits]).sum((1, 2)).max()
    assert recall_of(mass, best).sum().item() == pytest.approx(most.item(), abs=1e-5)


def test_samples_are_seeded_and_mass_takes_them_in_parts(monkeypatch: pytest.MonkeyPatch):
    one = record(2)
    rows = sample_rows(one.partition, 50, seed=1)
    assert len(rows.unique()) == 50 and torch.equal(rows, sample_rows(one.partition, 50, seed=1))
    assert not torch.equal(rows, sample_rows(one.partition, 50, seed=2))
    mass, entropy = true_mass(one, one.partition, rows), entropy_of(one, one.partition, rows)
    torch.testing.assert_close(mass, block_masses(one.query[None], one.key[None], one.partition)[0, :, rows])
    monkeypatch.setattr("vmoba_flex.insight.masses._LOGITS", 7 * one.query.shape[1])
    torch.testing.assert_close(entropy_of(one, one.partition, rows), entropy)
    chosen = own_blocks(one.partition, mass.device)[rows].expand(2, -1, -1)
    overlap = overlap_of(one, one.partition, rows, chosen, Tail(8))
    monkeypatch.undo()
    torch.testing.assert_close(overlap, overlap_of(one, one.partition, rows, chosen, Tail(8)))
    assert mass.sum(-1).allclose(torch.ones(()))
    assert own_blocks(one.partition, mass.device)[rows].sum() == 50


def test_a_config_brings_its_own_blocks_and_its_dense_layers():
    config = dataclasses.replace(CONFIG, spatial=(2, 2), dense_layers=1)
    reports = inspect([record(0), record(1)], config)
    assert [(r.layer, r.kind, r.head) for r in reports] == [(i, CONFIG.cycle[i], h) for i in (0, 1) for h in (0, 1)]
    assert all(r.density == r.tile_density == 1 and r.recall == pytest.approx(1) for r in reports[:2])
    expected = inspect([record(1)], config.rule)[0]
    assert reports[2].density < 1 and reports[2].density != expected.density
    assert all(r.best_recall >= r.recall - 1e-6 for r in reports)


def test_records_survive_a_file(tmp_path):
    partition = BlockPartition(GRID, (2, 3, 4), prefix=2, suffix=3)
    query, key = torch.randn(2, 2, partition.num_tokens, 8).bfloat16()
    facts = {
        "kind": "spatial",
        "layer": 7,
        "num_layers": 30,
        "step": 9,
        "num_steps": 20,
        "heads": (1, 5),
        "text_length": 4,
        "model": "transformer_2",
    }
    first = Record(query, key, partition, **facts)
    save([first, record(1)], tmp_path / "a.safetensors")
    again, other = load(tmp_path / "a.safetensors")
    assert torch.equal(again.query, query) and torch.equal(again.key, key)
    assert {name: getattr(again, name) for name in facts} == facts and again.partition == partition
    assert torch.equal(other.key, record(1).key)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(tmp_path, umask: int):
    before = os.umask(umask)
    try:
        save([record()], tmp_path / "a.safetensors")
        CONFIG.save(tmp_path / "a.json")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_record_prints_shapes_and_no_values():
    words = repr(record(4, num_layers=6))
    assert words.startswith(
        "Record(query=<float32 (2, 192, 16)>, key=<float32 (2, 192, 16)>, partition=BlockPartition("
    )
    assert words.endswith(
        "layer=4, num_layers=6, step=0, num_steps=None, heads=(0, 1), text_length=None, model='model')"
    )
    assert "tensor(" not in words


@pytest.mark.parametrize(
    ("dense", "num_layers", "expected"),
    [(1, None, False), ([1], None, True), ([0, 9], None, False), ([-1], 2, True), ([-1], 3, False), ([], None, False)],
)
def test_a_record_is_dense_where_its_config_is(dense: Any, num_layers: int | None, expected: bool):
    config = dataclasses.replace(CONFIG, dense_layers=dense)
    _, _, rule, _ = layer_of(record(1, num_layers=num_layers), config)
    assert (rule is None) == expected


def test_dense_layers_from_the_end_need_the_number_of_layers():
    with pytest.raises(ValueError, match=r"num_layers of a record must be given where .* \(0, -1\), got None"):
        inspect([record(1)], dataclasses.replace(CONFIG, dense_layers=[0, -1]))


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"kind": "cubes"}, ValueError, "kind must be one of"),
        ({"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        ({"layer": 3, "num_layers": 3}, ValueError, "layer must lie in 0..num_layers - 1 = 0..2, got 3"),
        ({"heads": (0, 0)}, ValueError, r"heads must name the 2 heads of query, got \(0, 0\)"),
        ({"heads": (0, 1, 2)}, ValueError, r"heads must name the 2 heads of query, got \(0, 1, 2\)"),
        ({"text_length": 1}, ValueError, "text_length must lie in 0..prefix"),
        ({"key": torch.zeros(1, 192, 16)}, ValueError, "key must have query's shape"),
        ({"query": torch.zeros(2, 5, 16)}, ValueError, r"query must have grid \+ prefix"),
        ({"query": None}, TypeError, "query must be a float16, .* tensor, got NoneType"),
    ],
)
def test_bad_records(facts, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(record(), **facts)


def test_records_that_share_memory_survive_a_file(tmp_path):
    one = record()
    same = dataclasses.replace(one, key=one.query, layer=1)
    save([one, same, one], tmp_path / "a.safetensors")
    for saved, again in zip([one, same, one], load(tmp_path / "a.safetensors"), strict=True):
        assert torch.equal(saved.query, again.query) and torch.equal(saved.key, again.key)


def test_nothing_is_saved_of_nothing(tmp_path):
    with pytest.raises(UserError, match="there are no records to write"):
        save([], tmp_path / "a.safetensors")


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Record]]:
    """Of the demo's model under full attention: frames and noise to calibrate on, and others held out."""
    pytest.importorskip("av")
    from vmoba_flex.demo import checkpoint
    from vmoba_flex.demo.clip import BUNNY, read_clip
    from vmoba_flex.demo.denoise import add_noise
    from vmoba_flex.demo.run import layer_inputs

    model, config, _ = checkpoint.load()
    blocks: Any = model.blocks
    for block in blocks:
        block.attention.set_warmup(0.0)
    frames, found = read_clip(BUNNY, 64, 96, 128), {}
    parts = {"calibration": (frames[:32], (0.3, 0.7), 0), "held out": (frames[32:], (0.4, 0.6), 1)}
    for name, (part, levels, seed) in parts.items():
        found[name] = []
        for level in levels:
            noisy = add_noise(part, level, torch.Generator().manual_seed(seed))
            inputs = layer_inputs(model, noisy, torch.tensor([level]))
            side = model.shape.patch
            grid = tuple(size // p for size, p in zip(noisy.shape[2:], side, strict=True))
            for layer, (query, key, _) in enumerate(inputs):
                kind = config.cycle[layer % len(config.cycle)]
                partition = BlockPartition.temporal(grid, 1)
                found[name].append(Record(query[0], key[0], partition, kind=kind, layer=layer))
    return found


@pytest.mark.parametrize(
    "rule", [CONFIG.rule, Threshold(0.25), Threshold(0.5, pool="query", normalize="softmax")], ids=repr
)
def test_calibrate_reaches_the_wanted_recall_on_held_out_frames(trained: dict[str, list[Record]], rule: Threshold):
    config = VMoBAConfig(1, (3, 4), (2, 3, 4), rule)
    config, found = calibrate(trained["calibration"], config, recall=0.85)
    assert all(0 <= one.recall - 0.85 <= 0.003 for one in found)
    reports = inspect(trained["held out"], config, seed=1)
    for one in found:
        recalls = [report.recall for report in reports if report.kind == one.kind]
        assert sum(recalls) / len(recalls) == pytest.approx(0.85, abs=0.02)
        assert 0 < one.density < 1


def test_calibrate_reaches_a_wanted_overlap_at_fewer_pairs_than_recall():
    config = dataclasses.replace(CONFIG, cycle=("spatial",), tail=Tail(4))
    records = [dataclasses.replace(record(1, seed), layer=0) for seed in range(2)]
    _, (by_recall,) = calibrate(records, config, recall=0.8)
    found, (by_overlap,) = calibrate(records, config, overlap=0.8)
    assert 0 <= by_overlap.overlap - 0.8 <= 0.02
    assert by_overlap.recall < 0.8 <= by_recall.recall < by_recall.overlap
    assert by_overlap.density < by_recall.density
    assert found.tail == Tail(4)
    reports = inspect(records, found)
    assert sum(report.overlap for report in reports) / len(reports) == pytest.approx(by_overlap.overlap, abs=1e-5)
    _, (without,) = calibrate(records, dataclasses.replace(config, tail=None), recall=0.8)
    assert without.overlap == without.recall
    with pytest.raises(ValueError, match="tail must be None next to a config, which has its own, got Tail"):
        inspect(records, found, tail=Tail(4))


def test_calibrate_compares_gates_and_keeps_the_best():
    config = dataclasses.replace(CONFIG, rule=Threshold(0.5, normalize="softmax", pool="query"), cycle=("spatial",))
    records = [dataclasses.replace(record(1, seed), layer=0) for seed in range(2)]
    for wanted in ({"recall": 0.7}, {"density": 0.3}):
        kept, found = calibrate(records, config, gates=("mean", "spread", "exact"), **wanted)
        mean_gate, spread, exact = found
        assert [one.rule.gate for one in found] == ["mean", "spread", "exact"]
        # Nothing beats the masses themselves, but as the gate of each call they cost most of full attention.
        key = (lambda one: one.density) if "recall" in wanted else lambda one: -one.overlap
        best = min((mean_gate, spread), key=key)
        assert [one.kept for one in found] == [one is best for one in found]
        assert isinstance(kept.rule, Mapping) and kept.rule["spatial"] == best.rule
        remembers = dataclasses.replace(config, remember=Remember(refresh=4))
        assert [one.kept for one in calibrate(records, remembers, gates=("mean", "exact"), **wanted)[1]] == [
            False,
            True,
        ]
        (alone,) = calibrate(records, config, **wanted)[1]
        assert alone == mean_gate._replace(kept=True)
        if "recall" in wanted:
            assert exact.density < min(mean_gate.density, spread.density)
        else:
            assert exact.overlap > max(mean_gate.overlap, spread.overlap)
    # What the exact gate chooses is the best choice of as many pairs.
    report = inspect(records[:1], TopK(2, gate="exact"), rows=10_000)[0]
    assert report.recall == pytest.approx(report.best_recall, abs=1e-6)
    with pytest.raises(ValueError, match=r"gates must be one of .* got 'median'"):
        calibrate(records, config, recall=0.5, gates=("median",))


def test_calibrate_reaches_a_wanted_density():
    records = [record(layer, seed) for layer in range(3) for seed in range(2)]
    config, found = calibrate(records, CONFIG, density=0.4)
    assert [one.kind for one in found] == list(CONFIG.cycle) and all(one.records == 2 for one in found)
    for one in found:
        assert one.density == pytest.approx(0.4, abs=0.01)
        assert isinstance(config.rule, Mapping) and config.rule[one.kind] == one.rule
    assert VMoBAConfig.from_json(config.to_json()) == config


def test_calibrate_finds_a_rule_for_each_layer_and_each_of_its_steps():
    falling = BySteps({0: TopK(1), 0.5: TopK(2)})
    config = dataclasses.replace(CONFIG, rule=dict.fromkeys(CONFIG.cycle, falling), dense_layers=[-1], dense_steps=1)
    facts: Any = [{"layer": layer, "step": step} for layer in range(4) for step in (1, 4, 6)]
    records = [record(**fact, num_steps=8, num_layers=5, seed=i) for i, fact in enumerate(facts)]
    records[6] = dataclasses.replace(records[6], query=0.3 * records[6].query)  # a flat one needs more blocks
    found, parts = calibrate(records, config, recall=0.7, by="layer")
    assert [(one.layer, one.start, one.records) for one in parts[:3]] == [(0, 0, 1), (0, 0.5, 2), (1, 0, 1)]
    assert len(parts) == 8 and parts[4].density > parts[5].density
    for i, one in enumerate(parts):
        assert found.layer(i // 2, 5, 6 if i % 2 else 1, 8).rule == one.rule
    assert found.layer(4, 5, 6, 8).rule == TopK(2)  # dense, and left as it was
    of_kinds, parts = calibrate(records, config, recall=0.7)
    assert [(one.kind, one.layer, one.start) for one in parts[:2]] == [("temporal", None, 0), ("temporal", None, 0.5)]
    assert isinstance(of_kinds.rule, Mapping) and isinstance(of_kinds.rule["temporal"], BySteps)
    for changes, message in (
        ({"records": records[3:]}, "records must have layer 0, which is not dense in the config, got none"),
        ({"records": records[1:]}, "records must have a step at which layer 0 has the rule from 0 on, got none"),
        (
            {"records": [*records, record(num_layers=6, num_steps=8)]},
            r"one number of layers for by='layer', got \[5, 6\]",
        ),
        ({"by": "head"}, "by must be one of .*, got 'head'"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(**{"records": records, "config": config, "recall": 0.7, "by": "layer"} | changes)


@pytest.mark.parametrize("pool", ["query", "block", "head", "global"])
def test_calibrate_caps_the_density_with_a_margin(pool: str):
    rule = Threshold(0.5, pool=pool, normalize="softmax")
    config = dataclasses.replace(CONFIG, rule=rule, cycle=("spatial",), dense_steps=(0.25, 1), dense_layers=[-1])
    records = [dataclasses.replace(record(1, seed), layer=0, num_layers=9) for seed in range(3)]
    wanted, (one,) = calibrate(records, config, recall=0.8)
    assert isinstance(one.rule, Threshold) and one.rule.max_density is not None
    # Without the cap as much is reached at a density of which the cap is 1.25 times, or 1.25 times that, and so on.
    _, (free,) = calibrate(
        records, dataclasses.replace(config, rule=dataclasses.replace(rule, max_density=1.0)), recall=0.8
    )
    ratio = one.rule.max_density / free.density
    assert any(ratio == pytest.approx(MARGIN**n, rel=0.01) for n in (1, 2, 3)) or one.rule.max_density == 1
    assert one.density <= one.rule.max_density + 1e-6 and 0.8 <= one.recall < 0.85
    assert (wanted.dense_steps, wanted.dense_layers) == ((0.25, 1), (-1,))
    reports = inspect(records, wanted)
    assert sum(report.recall for report in reports) / len(reports) == pytest.approx(one.recall)


def test_calibrate_keeps_a_cap():
    rule = Threshold(0.5, max_density=0.6, normalize="softmax")
    _, (one,) = calibrate([record(0)], dataclasses.replace(CONFIG, rule=rule, cycle=("temporal",)), recall=0.5)
    assert isinstance(one.rule, Threshold) and one.rule.max_density == 0.6


@pytest.mark.parametrize("tokens", [(4, 16, 16), (8, 32, 32), (21, 30, 52)])
@pytest.mark.parametrize("heads", [(0, 1), (0, 11), (0, 39)])
@pytest.mark.parametrize(
    "rule", [Threshold(0.9), Threshold(0.9, max_density=0.3), TopK(density=0.5), TopK(density=0.7)]
)
@pytest.mark.parametrize("tail", [None, Tail(1)])
def test_calibrate_knows_what_auto_takes(
    tokens: tuple[int, int, int], heads: tuple[int, int], rule: Any, tail: Tail | None
):
    partition = CONFIG.partition("spatial", tokens)
    one = Record(*torch.empty(2, 2, partition.num_tokens, 128), partition, heads=heads)
    with FakeTensorMode():
        shape = (1, max(heads) + 1, partition.num_tokens, 128)
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        auto, _ = choose_dispatch(q, k, v, partition, rule, tail)
    assert _auto_is_packed(one, partition, rule, tail) == (auto == "packed")


def test_calibrate_moves_top_k_in_whole_blocks():
    config = dataclasses.replace(CONFIG, rule=TopK(1), cycle=("spatial",))
    config, (found,) = calibrate([record(1)], config, recall=0.7)
    blocks = CONFIG.partition("spatial", GRID).num_blocks
    assert isinstance(found.rule, TopK)
    k = found.rule.blocks_per_query(blocks)
    one = dataclasses.replace(record(1), layer=0)
    with_k = [inspect([one], TopK(count)) for count in (k, k - 1)]
    enough, too_few = (sum(report.recall for report in reports) / 2 for reports in with_k)
    assert enough == pytest.approx(found.recall) and too_few < 0.7 <= enough


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([record()], {}, "exactly one of recall, overlap and density must be given, got recall=None, "),
        ([record()], {"recall": 0.5, "density": 0.5}, "exactly one of recall, overlap and density"),
        ([record()], {"overlap": 1.5}, r"overlap must lie in \(0, 1\], got 1.5"),
        ([record()], {"recall": 1.5}, r"recall must lie in \(0, 1\], got 1.5"),
        ([record()], {"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ([record()], {"recall": 0.5, "rows": 0}, "rows must be at least 1, got 0"),
        ([record()], {"recall": 0.5}, "records must have a spatial layer that is not dense in the config, got none"),
    ],
)
def test_calibrate_refuses(records, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(records, CONFIG, **options)


def test_calibrate_says_what_is_out_of_reach():
    rule = Threshold(0.5, max_density=0.2)
    with pytest.raises(ValueError, match=r"recall 0.95 must be within reach of Threshold.* got at most 0\.\d+ for"):
        calibrate([record()], dataclasses.replace(CONFIG, rule=rule, cycle=("temporal",)), recall=0.95)


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [((2.0, 0.5), 2000.0), ((2.0, 2.0, 0.5), 4000.0), ((0.9, 0.5), 1000.0), ((2.0, 1.5), None), ((0.5, 2.0), None)],
)
def test_break_even(ratios, tokens):
    counts = [1000 * 4**i for i in range(len(ratios))]
    timings = [Timing(count, False, 1.0, ratio, 0.2) for count, ratio in zip(counts, ratios, strict=True)]
    if len(ratios) == 3:
        tokens = 8000.0
    assert break_even(timings[::-1]) == (None if tokens is None else pytest.approx(tokens))


def test_crossover_times_both_directions():
    timings = crossover([512], Threshold(0.25), heads=1, head_dim=8)
    assert [(one.tokens, one.backward) for one in timings] == [(512, False), (512, True)]
    assert all(one.dense > 0 and one.sparse > 0 and 0 < one.density < 1 for one in timings)
    with pytest.raises(ValueError, match="tokens must be at least one number of 512 or more, got"):
        crossover([100], Threshold(0.25))
