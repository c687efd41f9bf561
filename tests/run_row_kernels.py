"""Runs the Triton kernels of packed rows and slots at odd sizes against their eager twins: a script, not a test module.

TRITON_INTERPRET=1 python -m tests.run_row_kernels                       # on a CPU
compute-sanitizer --tool memcheck python -m tests.run_row_kernels        # on a GPU
"""

from unittest import mock

import torch

from block_masks import RowPlan, attend_slots, plan_slots, tile_lists, to_slots
from block_masks.attention import (
    coarse_kernels,
    coarse_steps,
    flash_check,
    flash_kernels,
    launches,
    padding_kernels,
    row_kernels,
    row_steps,
    slot_steps,
)
from block_masks.attention.row_attention import Room, attend_rows
from block_masks.masks import list_kernels
from block_masks.plans import move_kernels, plan_kernels
from block_masks.plans.rows import _plan, _plan_on_gpu
from block_masks.plans.slots import SLOT_TENSORS
from tests import flash_emulator
from vmoba_flex import BlockPartition, cell_kernels, cell_slot_kernels, cell_slots
from vmoba_flex.groups import block_slots
from vmoba_flex.tail import Cells

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(heads: int, queries: int, sizes: list[int], density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices ``(heads, queries, groups)``, S-contiguous, and the group of each key, in no order."""
    keys = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (torch.rand(heads, len(sizes), queries) < density).mT, keys[torch.randperm(len(keys))]


def check_plan(heads: int, queries: int, sizes: list[int], density: float, together: int, room: int = 0) -> None:
    """The plan, and the steps that move rows."""
    selected, key_group = problem(heads, queries, sizes, density)
    row_tiles = room or together * len(sizes) * -(-queries // 128) + 1
    plan = RowPlan(*_plan(selected, row_tiles, together, 128), 128)
    names = ("row_query", "row_pool", "query_rows", "query_count", "first_tile", "tiles")
    for name, actual in zip(names, _plan_on_gpu(selected, row_tiles, together, 128), strict=True):
        expected = getattr(plan, name)
        if name == "query_rows":  # anything may follow the last row
            actual, expected = (row_steps._listed(x, plan.query_count) for x in (actual, expected))
        assert torch.equal(actual, expected), name
    check_take(plan, queries)
    slots = plan_slots(key_group, sizes)
    x = torch.randn(heads, len(key_group), 5)
    padded = row_steps.take_slots(x, slots.slot_key)
    assert torch.equal(move_kernels.take_slots(x, slots.slot_key), padded)
    valid = slots.valid((torch.rand(heads, len(sizes)) * torch.tensor(sizes)).int())
    of_head = valid.slot_key(slots), valid.key_slot(slots)
    assert torch.equal(move_kernels.take_slots(x, of_head[0]), row_steps.take_slots(x, of_head[0]))
    for repeats, index in ((1, slots.key_slot), (heads, slots.key_slot), (1, of_head[1]), (heads, of_head[1][:1])):
        expected = row_steps.take_slots(padded, index, repeats)
        torch.testing.assert_close(move_kernels.take_slots(padded, index, repeats), expected)
    query, output = torch.randn(heads, queries, 5), torch.randn(row_tiles * 128, 5)
    lse = torch.randn(row_tiles * 128)
    lists = plan.query_rows[:together], plan.query_count[:together]
    results = []
    for steps in (row_steps, row_kernels):
        merged, merged_lse, total = query[:together].clone(), query[:together, :, 0].clone(), query[:together].clone()
        steps.merge_rows(output, lse, *lists, merged, merged_lse)
        steps.sum_rows(output, *lists, total)
        results.append([merged.clone(), merged_lse.clone(), total, steps.delta(query, query.flip(0))])
        padding = torch.where(torch.arange(queries) % 3 == 0, -torch.inf, results[0][1] - 0.5 - lse[:queries].abs())
        steps.merge_rows(output, lse, *lists, merged, merged_lse, padding)
        results[-1] += [merged, merged_lse]
    # NaN where rows of a query had no room, and only there.
    torch.testing.assert_close(*results, equal_nan=True)
    assert torch.equal(results[0][1].isnan(), plan.query_count[:together] < 0)


def check_slots(sizes: list[int], tile_size: int) -> None:
    """The plan of slots."""
    _, key_group = problem(1, 1, sizes, 1.0)
    tiles = sum(-(-size // tile_size) for size in sizes)
    expected = plan_slots(key_group.cpu(), sizes, tile_size)
    for name, actual in zip(
        SLOT_TENSORS, plan_kernels.place_keys(key_group, len(sizes), tiles, tile_size), strict=True
    ):
        assert actual.dtype == getattr(expected, name).dtype, name
        assert torch.equal(actual.cpu(), getattr(expected, name)), name


def check_lists(shape: tuple[int, ...], by_columns: bool) -> None:
    """Lists of the tiles of each row, where maps lie in memory row by row, or column by column."""
    tiles = torch.rand(shape) < torch.rand(*shape[:-1], 1)
    tiles = tiles.mT.contiguous().mT if by_columns else tiles
    for actual, expected in zip(list_kernels.list_tiles(tiles), tile_lists(tiles.cpu()), strict=True):
        assert actual.dtype == expected.dtype
        assert actual.is_contiguous()
        assert torch.equal(actual.cpu(), expected)


def check_take(plan: RowPlan, queries: int) -> None:
    """Queries to the rows of a section, up to the tile after the last used one where that is wanted."""
    row_query, row_pool = plan.row_query[0], plan.row_pool[0]
    used = int((row_pool >= 0).sum())
    source = torch.randn(len(plan.query_count) * queries, 5)
    for numbers in (source, source[:, 0].contiguous()):
        there = (row_query >= 0).view(-1, *[1] * (numbers.dim() - 1))
        expected = torch.where(there, numbers[row_query.clamp(min=0)], 7.0)
        for clear_next in (False, True):
            end = (used + (clear_next and used > 0)) * plan.tile_size
            taken = move_kernels.take_rows(numbers, row_query, row_pool, 7.0, clear_next)
            assert torch.equal(taken[:end], expected[:end])


def check_attention(
    heads: int,
    repeats: int,
    sizes: list[int],
    dims: tuple[int, int],
    scale: float,
    shift: float = 0,
    short: bool = False,
    in_order: bool = False,
) -> None:
    """Forward and backward of ``attend_rows``.

    ``shift`` makes all scores negative, ``short`` leaves keys out, and ``in_order`` has each key in its slot already.
    """
    selected, key_group = problem(heads, 150, sizes, 0.5)
    slots = plan_slots(key_group.sort().values if in_order else key_group, sizes, sorted_keys=in_order)
    assert slots.in_place == in_order
    query, grad = torch.randn(heads, 150, dims[0]), torch.randn(heads, 150, dims[1])
    keys = (torch.randn(heads // repeats, len(key_group), dim) for dim in dims)
    key, value = keys
    inputs = [x.requires_grad_() for x in (query + shift, key - shift, value)]
    group_lengths = (torch.rand(heads, len(sizes)) * torch.tensor(sizes)).int() + 1 if short else None
    results = []
    for backend in ("eager", "triton"):
        output, lse = attend_rows(
            *inputs, selected, slots,
            rooms=(Room(heads, 2 * heads * len(sizes)), Room(heads // 2, heads * len(sizes))),
            scale=scale, backend=backend, group_lengths=group_lengths,
        )  # fmt: skip
        results.append((output, lse, *torch.autograd.grad(output, inputs, grad)))
    # Scores of some hundreds are rounded that much more before they are subtracted from one another.
    tolerance = 1e-3 if shift else 1e-4
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def check_flash_rows(heads: int, repeats: int, sizes: list[int], dims: tuple[int, int], short: bool) -> None:
    """``attend_rows`` around FlashAttention-4; ``short`` leaves keys out, and all of the last group's."""
    selected, key_group = problem(heads, 150, sizes, 0.5)
    in_order = not any(size % 128 for size in sizes)
    slots = plan_slots(key_group.sort().values if in_order else key_group, sizes, sorted_keys=in_order)
    query, grad = torch.randn(heads, 150, dims[0]), torch.randn(heads, 150, dims[1])
    key, value = (torch.randn(heads // repeats, len(key_group), dim) for dim in dims)
    group_lengths = None
    if short:  # the same for heads that share a key head
        group_lengths = (torch.rand(heads // repeats, len(sizes)) * (torch.tensor(sizes) + 1)).int()
        group_lengths[:, -1] = 0
        group_lengths = group_lengths.repeat_interleave(repeats, 0)
        selected = selected & (group_lengths > 0)[:, None]
    inputs = [x.requires_grad_() for x in (query, key, value)]
    results = []
    for backend in ("eager", "flash"):
        with flash_emulator.installed():
            output, lse = attend_rows(
                *inputs, selected, slots,
                rooms=(Room(heads, 2 * heads * len(sizes)), Room(heads // 2, heads * len(sizes))),
                scale=0.3, backend=backend, group_lengths=group_lengths,
            )  # fmt: skip
            results.append((output, lse, *torch.autograd.grad(output, inputs, grad)))
    # What is left of a sum shows its rounding up to 128 times.
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def check_flash_tiles(sizes: list[int], dims: tuple[int, int], short: bool) -> None:
    """``attend_slots`` around FlashAttention-4; ``short`` leaves keys out."""
    _, key_group = problem(1, 1, sizes, 1.0)
    slots = plan_slots(key_group, sizes)
    group_lengths, valid = None, None
    if short:
        group_lengths = (torch.rand(2, len(sizes)) * (torch.tensor(sizes) + 1)).int()
        group_lengths[:, 0] = group_lengths[:, 0].clamp(min=1)
        valid = slots.valid(group_lengths)
    selected = torch.rand(2, 2, len(slots.tile_group), len(sizes)) < 0.5
    selected[..., 0] = True
    query, grad = (torch.randn(2, 2, len(slots.slot_key), dim) for dim in dims)
    keys = (torch.randn(2, 2, len(key_group), dim) for dim in dims)
    inputs = [x.requires_grad_() for x in (query, *keys)]
    results = []
    for modules in ((slot_steps, slot_steps, coarse_steps), (flash_kernels, padding_kernels, coarse_kernels)):
        with (
            flash_emulator.installed(),
            mock.patch("block_masks.attention.slot_attention._modules", return_value=modules),
        ):
            key, value = (to_slots(x, slots, valid) for x in inputs[1:])
            output, _ = attend_slots(inputs[0], key, value, selected, slots, 0.3, group_lengths)
            results.append((output, *torch.autograd.grad(output, inputs, grad)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def check_coarse(
    heads: int, repeats: int, queries: int, cells: int, dims: tuple[int, int], together: int, kind: str = "some"
) -> None:
    """Coarse keys merged into attention, forward and backward; some queries chose everything.

    ``kind``: ``"some"`` queries chose nothing, ``"all"`` chose something, or coarse keys are so ``"heavy"`` beside it
    that weights relative to a query's own sum overflow.
    """
    groups = 5
    key, value = torch.randn(heads // repeats, cells, dims[0]), torch.randn(heads // repeats, cells, dims[1])
    coarse = coarse_steps.CoarseKeys(key, value, torch.rand(cells) * 5, torch.randint(groups, (cells,)))
    selected = (torch.rand(heads, groups, -(-queries // together)) < torch.rand(heads, 1, 1)).mT
    selected[:, 0], selected[:, -1] = True, False
    query, output, grad = (torch.randn(heads, queries, dim) for dim in (dims[0], dims[1], dims[1]))
    lse = torch.randn(heads, queries) * 3 - (200 if kind == "heavy" else 0)
    if kind == "some":
        lse = torch.where(torch.rand(heads, queries) < 0.1, -torch.inf, lse)
    results = []
    for steps in (coarse_steps, coarse_kernels):
        merged, merged_lse = torch.full_like(output, 7.0), torch.full_like(lse, 7.0)
        steps.merge_coarse(query, coarse, selected, output, lse, (merged, merged_lse), 0.4, together)
        grad_query, delta = torch.ones_like(query), (grad * merged).sum(-1)
        arguments = grad, torch.where(merged_lse == -torch.inf, 0, merged_lse), delta, grad_query
        grads = steps.coarse_backward(query, coarse, selected, *arguments, 0.4, together)
        split = steps.split_grad(grad, output, lse, merged_lse, delta)
        results.append([merged, merged_lse, grad_query, *grads, *split])
    assert torch.equal(results[1][0][:, :together], output[:, :together])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def check_coarse_tiles() -> None:
    """The tiles of 16-bit inputs, whose products of 16-bit numbers Triton's interpreter does not have, in float32."""
    launch = launches.coarse_launch("sm90", 128, torch.bfloat16)
    with mock.patch.object(coarse_kernels, "coarse_launch", return_value=launch):
        check_coarse(2, 2, 150, 200, (16, 24), 1, "all")
        check_coarse(2, 1, 70, 64, (16, 16), 64)


def check_cells(grid: tuple[int, ...], block: tuple[int, ...], cell: tuple[int, ...], prefix: int, suffix: int) -> None:
    """Keys and values to slots, and the means of their cells; with all tokens, and with some that are not valid."""
    partition = BlockPartition(grid, block, prefix=prefix, suffix=suffix)  # pyright: ignore[reportArgumentType]
    cells = Cells(partition, cell)  # pyright: ignore[reportArgumentType]
    slots = block_slots(partition, torch.device(DEVICE))
    key = torch.randn(2, partition.num_tokens, 3, 24).transpose(1, 2)
    value = torch.randn(2, 3, partition.num_tokens, 40)
    lengths = torch.minimum(torch.randint(1, 9, (2, len(slots.group_sizes)), dtype=torch.int32), slots.group_lengths)
    valid = slots.valid(lengths)
    for index in ((slots.slot_key, slots.key_slot), (valid.slot_key(slots), valid.key_slot(slots))):
        expected = cell_slots._plain(key, value, *index, partition.flat, [*cell])
        actual = cell_slot_kernels.slots_and_means(key, value, *index, cells)
        assert all(map(torch.equal, actual[:2], expected[:2]))
        torch.testing.assert_close(actual[2:], expected[2:])
        grads = [torch.randn_like(x) for x in expected[:4]]
        moved = [move_kernels.take_slots(x.flatten(0, 1), index[1]).unflatten(0, (2, 3)) for x in grads[:2]]
        whole = [x + cell_kernels.cell_means_backward(mean, cells) for x, mean in zip(moved, grads[2:], strict=True)]
        actual = cell_slot_kernels.slots_and_means_backward(grads[:2], grads[2:], index[1], cells)
        torch.testing.assert_close(actual, whole)


def check_flash_check(of_slots: bool, problem: tuple[list[int], list[int] | None]) -> None:
    """What FlashAttention-4 must get right before it is used: its way is the exact one."""
    sizes, there = problem
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group_lengths = None if there is None else torch.tensor([there], dtype=torch.int32)
    make = flash_check._slot_ways if of_slots else flash_check._packed_ways
    ways = make(group, plan_slots(group, sizes, sorted_keys=True), group_lengths, 0.2, torch.Generator())
    inputs = [torch.randn(2, len(group), dim).requires_grad_() for dim in (24, 24, 40)]
    grad = torch.randn(2, len(group), 40)
    results = []
    modules = (flash_kernels, padding_kernels, coarse_kernels)
    in_slots = "block_masks.attention.slot_attention._modules"
    with flash_emulator.installed(), mock.patch(in_slots, return_value=modules):
        for name in ("exact", "flash"):
            output = ways[name](*inputs)
            results.append((output, *torch.autograd.grad(output, inputs, grad)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def check_leave_out(heads: int, sizes: list[int], dims: tuple[int, int], together: int) -> None:
    """Padding slots taken out of an output."""
    queries, groups = 300, len(sizes)
    query, last_keys = torch.randn(2, heads, queries, dims[0]), torch.randn(2, 1, groups, dims[0])
    query[0, 0, 7] *= 100  # scores of some hundreds
    output = torch.randn(2, heads, queries, dims[1])
    padding = -torch.tensor([sizes, [max(size - 1, 0) for size in sizes]], dtype=torch.int32) % 128  # of each sample
    selected = torch.rand(2, heads, groups, -(-queries // together)).mT < 0.5
    arguments = query, last_keys, padding, selected, 0.2, together
    padding_lse = slot_steps.padding_lse(*arguments)
    torch.testing.assert_close(padding_kernels.padding_lse(*arguments), padding_lse, rtol=1e-4, atol=1e-4)
    lse = torch.where(padding_lse == -torch.inf, 3.0, padding_lse + 0.01 + torch.rand(padding_lse.shape))
    lse[0, 0, 0] = torch.where(selected[0, 0, 0].any(), lse[0, 0, 0], -torch.inf)  # nothing was attended
    results = []
    for steps in (padding_kernels, slot_steps):
        kept = output.clone()
        results.append([kept, steps.remove_padding(kept, lse, padding_lse)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    check_plan(4, 300, [1, 130, 40], 0.3, 2)
    check_plan(2, 5000, [3], 1.0, 1)
    check_plan(1, 1, [1, 1], 0.5, 1)
    check_plan(2, 700, [3, 200], 0.8, 2, room=7)  # too little
    check_plan(1, 129, [2], 1.0, 1)  # one row in the last tile
    check_plan(1, 40, [2] * 20, 1.0, 1)  # more rows of a query than merge looks at at once
    check_slots([1, 130, 40, 256], 128)
    check_slots([3, 1, 700, 5], 3)  # many tiles of few slots
    check_slots([1] * 70, 1)
    check_slots([900, 1, 1500], 64)  # several programs for a group's keys
    for by_columns in (False, True):
        check_lists((2, 3, 7, 130), by_columns)
        check_lists((2, 3, 13, 7), by_columns)
        check_lists((5, 1), by_columns)
        check_lists((1, 130), by_columns)
        check_lists((3, 9000), by_columns)  # several chunks of columns, the last one cut short
    check_attention(4, 1, [100, 128, 3], (24, 24), 0.3)
    check_attention(4, 2, [200, 31], (16, 40), -0.2)
    check_attention(4, 2, [200, 31, 1], (16, 40), 0.2, short=True)
    check_attention(2, 1, [70, 64], (16, 16), 0.0)
    check_attention(2, 1, [70, 64], (16, 16), 1.0, shift=4)  # a padding slot's score of 0 would weigh e^200
    check_attention(4, 1, [128, 256], (16, 40), 0.3, in_order=True)
    check_attention(4, 2, [256, 128], (24, 24), 0.3, in_order=True)
    for short in (False, True):
        check_flash_rows(4, 1, [100, 128, 3], (24, 24), short)
        check_flash_rows(4, 2, [200, 31, 300], (16, 40), short)
        check_flash_rows(2, 1, [128, 256], (16, 16), short)
    check_coarse(4, 2, 150, 70, (16, 40), 1)
    check_coarse(2, 1, 200, 3, (24, 24), 64)
    check_coarse(2, 1, 33, 130, (72, 16), 1, "all")
    check_coarse(2, 1, 33, 130, (16, 16), 1, "heavy")
    if DEVICE == "cpu":
        check_coarse_tiles()
    check_cells((4, 5, 6), (2, 2, 3), (1, 2, 2), 0, 0)
    check_cells((4, 5, 6), (2, 3, 3), (2, 2, 2), 3, 2)
    check_cells((4, 16, 8), (2, 8, 8), (2, 4, 4), 0, 0)  # whole tiles
    check_leave_out(1, [1], (16, 16), 1)
    check_leave_out(3, [100, 256, 129], (24, 40), 128)
    check_leave_out(2, [3] * 18, (72, 128), 1)  # more groups than are looked at at once
    if DEVICE == "cpu":  # what these compare with is for CPUs; on a GPU the real FlashAttention-4 is tested
        for short in (False, True):
            check_flash_tiles([100, 128, 3], (24, 40), short)
            check_flash_tiles([128, 256], (16, 16), short)
        for flash_problem in flash_check._PROBLEMS:
            check_flash_check(False, flash_problem)
            check_flash_check(True, flash_problem)
