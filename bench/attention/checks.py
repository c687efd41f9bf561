"""The inputs of one shape, and how outputs and gradients are checked.

Outputs are checked in up to 3 heads, on 128 query rows each, against attention in float64 over the keys that
``vmoba_selection`` chose; for a peer over all keys, for "shared" over what each tile chose. The error is the Frobenius
norm of the difference over that of the truth. The budget is the error of dense FlexAttention on the same rows, times a
stated factor. Gradients are checked on one whole head, against attention in float32, a chunk of queries at a time.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bench.attention.peers import flex
from bench.attention.shapes import Case, Sizes
from block_masks import to_slots
from vmoba_flex import BlockPartition, reference, vmoba_selection
from vmoba_flex.cells import cell_groups, cell_ids
from vmoba_flex.groups import block_slots
from vmoba_flex.rules import Rule
from vmoba_flex.selection.tiles import choose_tiles
from vmoba_flex.tail import Cells

# Dense FlexAttention rounds its weights and its output to 16 bits; packed rows round their outputs once more before
# the merge: sqrt(3 / 2) = 1.22. In float32 the order of the sums decides, and errors vary.
ERROR_FACTOR = {torch.bfloat16: 1.3, torch.float16: 1.3, torch.float32: 4.0}
# Inside torch.compile the gate may round differently, and a row whose scores nearly tie may attend another block.
FLIPPED_ROWS = 0.02


class Inputs:
    """Query, key, value and an upstream gradient of one shape, the same for all rows on it."""

    def __init__(self, case: Case, sizes: Sizes, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, case.heads, case.tokens, sizes.head_dim)

        def random(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        query, key, value, upstream = (random(shape) for _ in range(4))
        if case.inputs == "smooth":
            query = 0.25 * query + _repeated(random, case, sizes)
        self.leaves = [x.to(sizes.dtype).requires_grad_() for x in (query, key, value)]
        self.upstream = upstream.to(sizes.dtype)
        heads = sorted({0, case.heads // 2, case.heads - 1})
        rows = torch.randperm(case.tokens, generator=generator, device=device)[:128]
        self.sample = torch.tensor(heads, device=device)[:, None], rows
        self._cache: dict[Any, Any] = {}

    def selection(self, case: Case) -> Tensor:
        """What ``vmoba_selection`` chose, bool ``(1, H, S, N)``."""
        assert case.partition is not None  # asked for sparse cases only
        assert case.rule is not None
        query, key, _ = (x.detach() for x in self.leaves)
        if self._cache.get("selection", (None,))[0] != case:
            self._cache["selection"] = case, vmoba_selection(query, key, case.partition, case.rule)
        return self._cache["selection"][1]

    def row_errors(self, output: Tensor, selection: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
        """Norms of the errors of the sampled rows, and of the rows themselves, each ``(heads, rows)``."""
        heads, rows = self.sample
        query, key, value = (x.detach()[0] for x in self.leaves)
        head, mask, bias = heads[:, 0], None, None
        key, value = key[head], value[head]
        if selection is not None:
            assert case.partition is not None  # there is a selection
            chosen = selection[0, heads, rows]
            mask = chosen[:, :, case.partition.block_ids(query.device)][None]
            if case.tail is not None:
                cells = Cells(case.partition, case.tail.cell_of(case.partition))
                key, value, bias, block = _with_cells(key, value, cells)
                mask = torch.cat([mask, ~chosen[None, :, :, block]], -1)
        truth, _ = reference.attention(query[heads, rows][None], key[None], value[None], mask, bias=bias)
        return (output.detach()[0, heads, rows].double() - truth[0]).norm(dim=-1), truth[0].norm(dim=-1)

    def error(self, output: Tensor, selection: Tensor | None, case: Case, flips: bool = False) -> float:
        """Relative error of the sampled rows; ``flips`` leaves out the worst few."""
        errors, norms = (x.flatten() for x in self.row_errors(output, selection, case))
        if flips:
            kept = (errors / norms).argsort()[: math.floor((1 - FLIPPED_ROWS) * len(errors))]
            errors, norms = errors[kept], norms[kept]
        return (errors.norm() / norms.norm()).item()

    @torch.no_grad()
    def flex_error(self, case: Case) -> float:
        """Error of dense FlexAttention on the sampled rows only, so that its backward need not be compiled."""
        if "flex" not in self._cache:
            heads, rows = self.sample
            query, key, value = (x.detach()[0] for x in self.leaves)
            output = torch.zeros_like(query)
            output[heads, rows] = flex()(query[heads, rows][None], *(x[heads[:, 0]][None] for x in (key, value)))[0]
            self._cache["flex"] = self.error(output[None], None, case)
        return self._cache["flex"]

    def gradient_errors(
        self, gradients: tuple[Tensor, ...], selection: Tensor | None, case: Case, dispatch: str
    ) -> list[float]:
        """Relative errors of the gradients in query, key and value, in one head."""
        head = case.heads // 2
        name = "gradients", None if selection is None else (case.block, case.rule, dispatch == "shared")
        if name not in self._cache:
            query, key, value, upstream = (x.detach()[0, head].float() for x in (*self.leaves, self.upstream))
            chosen = ids = None
            if selection is not None:
                assert case.partition is not None  # there is a selection
                chosen, ids = selection[0, head], case.partition.block_ids(selection.device)
            self._cache[name] = _gradients(query, key, value, upstream, chosen, ids)
        pairs = zip(gradients, self._cache[name], strict=True)
        return [((x[0, head].float() - truth).norm() / truth.norm()).item() for x, truth in pairs]


def expected_selection(dispatch: str, inputs: Inputs, case: Case) -> Tensor:
    """What a dispatch must attend, bool ``(1, H, S, N)``."""
    if dispatch != "shared":
        return inputs.selection(case)
    assert case.partition is not None  # a sparse case has both
    assert case.rule is not None
    query, key, _ = (x.detach() for x in inputs.leaves)
    return chosen_blocks(query, key, case.partition, case.rule, dispatch)


def chosen_blocks(query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, dispatch: str) -> Tensor:
    """The blocks that a dispatch attends for each query, bool ``(B, H, S, N)``; "shared" chooses for a tile of queries.

    Args:
        query: ``(B, H, S, D)``, raster order.
        key: like query.
        partition: without prefix and suffix.
        rule: chooses the blocks.
        dispatch: of ours.
    """
    if dispatch != "shared":
        return vmoba_selection(query, key, partition, rule)
    slots = block_slots(partition, query.device)
    chosen = choose_tiles(to_slots(query, slots), key, partition, rule, slots)
    return chosen.index_select(2, slots.key_slot // slots.tile_size)


def _with_cells(key: Tensor, value: Tensor, cells: Cells) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key and value ``(heads, S + C, D)`` with cells in float64, their bias, and the block of each cell."""
    _, block = cell_groups(cells, key)
    ids = cell_ids(cells, key.device)
    tokens = ids.bincount(minlength=cells.total).double()
    both = []
    for x in (key.double(), value.double()):
        sums = x.new_zeros(len(x), cells.total, x.shape[2]).index_add_(1, ids, x)
        both.append(torch.cat([x, sums / tokens[:, None]], 1))
    return *both, torch.cat([tokens.new_zeros(len(ids)), tokens.log()]), block


def attended_pairs(selection: Tensor, case: Case) -> tuple[float, float]:
    """Density, and (query, key) pairs over all heads."""
    assert case.partition is not None  # there is a selection
    chosen = selection.sum((0, 1, 2))
    return (chosen.sum() / selection.numel()).item(), (chosen * case.partition.block_sizes(chosen.device)).sum().item()


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, chosen: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one head's attention in float32; S x D each, ``chosen`` ``(S, N)``."""
    scale = 1 / math.sqrt(query.shape[-1])
    dquery, dkey, dvalue = (torch.zeros_like(x) for x in (query, key, value))
    for start in range(0, len(query), 1024):
        rows = slice(start, start + 1024)
        scores = query[rows] @ key.T * scale
        if chosen is not None:
            scores.masked_fill_(~chosen[rows][:, ids], -torch.inf)
        weights = scores.softmax(-1)
        dvalue += weights.T @ upstream[rows]
        dweights = upstream[rows] @ value.T
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
        dquery[rows] = dscores @ key
        dkey += dscores.T @ query[rows]
    return dquery, dkey, dvalue


def _repeated(random: Any, case: Case, sizes: Sizes) -> Tensor:
    """One random vector per cell of 4 x 6 x 8 tokens, repeated over it: ``(1, H, S, D)``."""
    cell = (4, 6, 8)
    coarse = random(
        (case.heads, sizes.head_dim, *(-(-size // part) for size, part in zip(case.grid, cell, strict=True)))
    )
    for dim, (size, part) in enumerate(zip(case.grid, cell, strict=True), start=2):
        coarse = coarse.repeat_interleave(part, dim).narrow(dim, 0, size)
    return coarse.flatten(2).mT[None]
