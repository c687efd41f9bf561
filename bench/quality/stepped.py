"""A model whose layers know the step of a denoise: dense steps record what later steps attend."""

import dataclasses
from statistics import mean
from typing import Any

from torch import Tensor, nn

from bench.common.sizes import Sizes3
from bench.quality.variants import Variant
from vmoba_flex import Selection, Tail, TopK, VMoBAConfig, vmoba_attention, vmoba_selection
from vmoba_flex.demo.model import VideoTransformer


class Stepped:
    """An attention over the steps of a denoise, for all layers of a model.

    Attributes:
        step: the step that the next forward is.
    """

    def __init__(self, variant: Variant, attention: VMoBAConfig, steps: int) -> None:
        self.variant, self.attention, self.steps, self.step = variant, attention, steps, 0

    def attach(self, model: VideoTransformer) -> None:
        """Makes it the attention of the model's layers, which remember nothing yet."""
        for index, block in enumerate(model.blocks):
            layer: Any = _Layer(self, index, len(model.blocks))
            block.attention = layer

    def rule(self, step: int, **changes: Any) -> TopK:
        """What a sparse step chooses by."""
        rule = self.attention.rule
        assert isinstance(rule, TopK)  # as variants.config makes it
        assert rule.density is not None
        return dataclasses.replace(rule, density=self.variant.density(rule.density, step, self.steps), **changes)

    def density(self, grid: Sizes3, num_layers: int) -> float:
        """Chosen (query, block) pairs / all, the mean over layers and sparse steps."""
        kinds = [self.attention.layer(index, num_layers).kind for index in range(num_layers)]
        blocks = [self.attention.partition(kind, grid).num_blocks for kind in kinds]
        rules = [self.rule(step) for step in range(self.steps) if not self.variant.is_dense(step)]
        return mean(rule.blocks_per_query(count) / count for rule in rules for count in blocks)

    def later_rules(self) -> list[TopK]:
        """What the sparse steps after this one, up to the next dense one, choose by, each rule once."""
        found = []
        for step in range(self.step + 1, self.steps):
            if self.variant.is_dense(step):
                break
            found.append(self.rule(step, gate="exact"))
        return list(dict.fromkeys(found))


class _Layer(nn.Module):
    """One layer's attention, in place of ``VMoBAAttention``."""

    def __init__(self, stepped: Stepped, index: int, num_layers: int) -> None:
        super().__init__()
        self.stepped, self.kind = stepped, stepped.attention.layer(index, num_layers).kind
        self.kept: dict[TopK, Selection] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, grid: Sizes3) -> Tensor:
        stepped, variant, attention = self.stepped, self.stepped.variant, self.stepped.attention
        partition = attention.partition(self.kind, grid)
        if variant.is_dense(stepped.step):
            if variant.remembers:
                choice = "tile" if variant.dispatch == "shared" else "token"
                self.kept = {
                    rule: vmoba_selection(query, key, partition, rule, choice=choice, as_bits=True)
                    for rule in stepped.later_rules()
                }
            return vmoba_attention(query, key, value, partition, stepped.rule(stepped.step), dispatch="dense")
        rule, kept, tail = stepped.rule(stepped.step), None, attention.tail
        assert tail is None or isinstance(tail, Tail)  # as variants.config makes it
        if variant.remembers:
            kept = self.kept[dataclasses.replace(rule, gate="exact")]
        return vmoba_attention(
            query, key, value, partition, None if kept is not None else rule, selection=kept,
            dispatch=variant.dispatch, backend=attention.backend, tail=tail,
        )  # fmt: skip
