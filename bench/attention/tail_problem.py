"""The tail's kernels on random inputs, in a chosen tile shape, and next to their eager twins."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from block_masks import CoarseKeys, to_slots
from block_masks.attention import coarse_steps, row_steps
from block_masks.attention.launches import Tile
from vmoba_flex import BlockPartition, Tail, TopK, vmoba_selection
from vmoba_flex.cell_slots import _backward_op, slots_and_cells
from vmoba_flex.cells import plain_means
from vmoba_flex.groups import block_slots
from vmoba_flex.tail import Cells

# The most that results may differ from the eager twin's in float32, relative to these: bfloat16 keeps 8 bits.
TOLERANCE = 0.01


@contextlib.contextmanager
def variant(name: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Lets the kernels run in this shape."""
    from block_masks.attention import coarse_kernels
    from vmoba_flex import cell_slot_kernels

    with contextlib.ExitStack() as stack:
        if name == "words":
            stack.enter_context(mock.patch.object(coarse_kernels, "_ROWS", shape[0]))
        elif name == "cells":
            stack.enter_context(mock.patch.object(cell_slot_kernels, "_TOKENS", shape[0]))
            stack.enter_context(mock.patch.object(cell_slot_kernels, "_WARPS", shape[1]))
        else:
            launch = dataclasses.replace(
                coarse_kernels.coarse_launch("sm90", 128, torch.bfloat16), **{name: Tile(*shape)}
            )
            stack.enter_context(mock.patch.object(coarse_kernels, "coarse_launch", return_value=launch))
        yield


class Problem:
    """Random inputs, choices, and what forward makes of them."""

    def __init__(self, device: str, heads: int, small: bool) -> None:
        grid, cube, dim = ((4, 8, 8), (2, 4, 4), 16) if small else ((24, 36, 64), (8, 12, 8), 128)
        if heads < 12 and not small:
            # Sizes that Triton compiles the same kernels for.
            grid = (16, 24, 32)
        self.device, self.partition = device, BlockPartition.spatiotemporal(grid, cube)
        generator = torch.Generator(device).manual_seed(0)
        dtype, shape = torch.bfloat16 if device == "cuda" else torch.float32, (1, heads, self.partition.num_tokens, dim)
        self.query, self.key, self.value, self.output, self.grad = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(5)
        )
        self.selected = vmoba_selection(self.query, self.key, self.partition, TopK(density=0.125))[0]
        self.slots = block_slots(self.partition, torch.device(device))
        self.scale, self.lse = dim**-0.5, torch.randn(shape[1:3], generator=generator, device=device) + 7
        *_, self.coarse = slots_and_cells(self.key, self.value, self.partition, Tail(), self.slots)
        flat = (self.query, self.output, self.grad)
        self.flat_query, self.flat_output, self.flat_grad = (x.flatten(0, 1) for x in flat)
        self.merged = torch.empty_like(self.flat_output), torch.empty_like(self.lse)
        self.steps().merge_coarse(*self.merge_arguments(), self.merged, self.scale)
        self.delta = row_steps.delta(self.flat_grad, self.merged[0])

    def steps(self, eager: bool = False) -> Any:
        """The kernels, or their eager twins."""
        if eager or self.device == "cpu":
            return coarse_steps
        from block_masks.attention import coarse_kernels

        return coarse_kernels

    def merge_arguments(self) -> tuple[Any, ...]:
        """What ``merge_coarse`` takes, up to where it writes."""
        return self.flat_query, self.coarse, self.selected, self.flat_output, self.lse

    def results(self, eager: bool = False) -> list[Tensor]:
        """Of all kernels; the eager twin's in float32."""
        merged = torch.empty_like(self.flat_output), torch.empty_like(self.lse)
        coarse, inputs = self.coarse, [self.flat_query, self.flat_output, self.flat_grad]
        if eager:
            coarse = CoarseKeys(coarse.key.float(), coarse.value.float(), coarse.bias.float(), coarse.group)
            inputs = [x.float() for x in inputs]
            merged = torch.empty_like(inputs[1]), torch.empty_like(self.lse)
        query, output, grad = inputs
        steps, grad_query = self.steps(eager), torch.zeros_like(query)
        steps.merge_coarse(query, coarse, self.selected, output, self.lse, merged, self.scale)
        of_coarse = steps.coarse_backward(
            query, coarse, self.selected, grad, self.merged[1], self.delta, grad_query, self.scale
        )
        return [*merged, grad_query, *of_coarse]

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed; with ``merge``, ``query`` and ``key`` the other kernels that go with it are timed too."""
        query, coarse, selected, output, lse = self.merge_arguments()
        grad_query, steps = torch.zeros_like(query), self.steps()
        arguments = self.flat_grad, self.merged[1], self.delta, grad_query, self.scale
        moved = [torch.randn_like(to_slots(x, self.slots)) for x in (self.key, self.value)]
        means = [x.unflatten(0, self.key.shape[:2]) for x in coarse[:2]]
        index, sizes = (self.slots.slot_key, self.slots.key_slot), (self.partition.flat, [4, 4, 4])
        stages: dict[str, Callable[[], object]] = {
            "words": lambda: steps.pack_words(coarse, selected),
            "merge": lambda: steps.merge_coarse(query, coarse, selected, output, lse, self.merged, self.scale),
            "gradients": lambda: steps.coarse_backward(query, coarse, selected, *arguments),
            "split": lambda: steps.split_grad(self.flat_grad, output, lse, self.merged[1], self.delta),
            "slots of key and value": lambda: [to_slots(x, self.slots) for x in (self.key, self.value)],
            "cells": lambda: slots_and_cells(self.key, self.value, self.partition, Tail(), self.slots),
            "cells, gradients": lambda: _backward_op(*moved, *means, *index, *sizes),
        }
        if self.device == "cpu":
            del stages["words"]
        return stages


def check(name: str, shape: tuple[int, ...], device: str, small: bool) -> float:
    """The largest error of any result of a small problem, relative to the eager twin's in float32.

    Raises:
        ValueError: if it is too large.
    """
    with variant(name, shape) if device == "cuda" else contextlib.nullcontext():
        problem = Problem(device, 3, small)
        results = problem.results()
        pairs = list(zip(results, problem.results(eager=True), strict=True))
        # Values and keys too, through the means that ``Problem`` took.
        means = coarse_means(problem)
        pairs += list(zip(problem.coarse[:2], means, strict=True))
        if device == "cuda":
            problem.stages()["cells, gradients"]()
    errors = [((a.float() - e.float()).norm() / e.float().norm()).item() for a, e in pairs]
    if not max(errors) < TOLERANCE:
        raise ValueError(f"{name} {shape}: relative errors {errors}")
    return max(errors)


def coarse_means(problem: Problem) -> list[Tensor]:
    """The means of cells in plain PyTorch."""
    cells = Cells(problem.partition, Tail().cell_of(problem.partition))
    return [plain_means(x, cells).flatten(0, 1) for x in (problem.key, problem.value)]
