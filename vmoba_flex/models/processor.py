"""A layer's attention in a diffusers model: sparse, or dense by the stock processor.

B batch, H heads, S tokens, D head dim.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from block_masks.launching.constant import constant_when_compiled
from vmoba_flex.config_fields import LayerRule
from vmoba_flex.models.parallel import ranks_of
from vmoba_flex.models.plan import LayerNow, LayerPlan
from vmoba_flex.models.state import ModelState
from vmoba_flex.models.step_op import attend_at_step, attend_planned, record_density
from vmoba_flex.partition import BlockPartition


class VMoBAProcessor:
    """An attention processor of diffusers for one self-attention layer.

    Its subclass for models that use diffusers' dispatcher is in ``hook.py``. That of another model family says in
    ``sparse`` how the layer makes query, key and value. A processor holds the layer's kind and never its index, so that
    ``torch.compile`` makes a graph for each kind, not for each layer.

    Attributes:
        stock: the processor that it replaces, which runs dense layers and steps unless they are recorded.
        state: what belongs to the whole model.
        kind: of the layer's blocks.
        rule: which chooses them, at each step.
        now: the plan of the forward that is under way on this thread.
        last: the plan of the last forward, to look at.
        density: what the last forward attended, a float32 scalar on the model's device.
        ranks: that share the video's tokens, under diffusers' context parallelism; None for one.
        joint: whether other tokens attend together with the video.
        has_dense: whether dense layers and steps also run here, and not in the stock processor.
    """

    joint: bool = False
    has_dense: ClassVar[bool] = False

    def __init__(self, stock: Any, state: ModelState, kind: str, rule: LayerRule) -> None:
        self.stock, self.state, self.kind, self.rule = stock, state, kind, rule
        self.now = LayerNow()
        self.last: LayerPlan | None = None
        self.density = _zero(torch.device("cpu"))
        self.ranks = ranks_of(self._parallel_config, self.joint, type(stock).__name__)

    @property
    def _attention_backend(self) -> Any:
        """Of dense layers and steps: ``set_attention_backend`` sets it where the stock processor has one."""
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        """Of the stock processor: ``enable_parallelism`` sets it."""
        return getattr(self.stock, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.ranks = ranks_of(config, self.joint, type(self.stock).__name__)
        self.stock._parallel_config = config

    @property
    def dense_backend(self) -> str:
        """What dense layers and steps attend with, by diffusers' name; empty for the fastest of torch's."""
        backend = getattr(self.stock, "_attention_backend", None)
        return "" if backend is None else backend.value

    @property
    def dense(self) -> bool:
        """Whether the layer attended everything in the last forward."""
        return self.last is not None and self.last.dense

    def ready(self, plan: LayerPlan, device: torch.device) -> None:
        """Readies what is looked at after a forward on ``device``."""
        self.last = plan
        if self.density.device != device:
            self.density = _zero(device)

    # The names are those by which diffusers' layers pass their arguments.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """The layer's output, and its text's where it is joint."""
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.stock(*arguments) if self.runs_stock() else self.sparse(*arguments)

    def runs_stock(self) -> bool:
        """Whether the call that begins is the stock processor's; notes the density of a dense layer."""
        if _decides_as_it_runs() or not self.plan().dense:  # in this order, so that one graph serves both
            return False
        with torch.no_grad():
            self.density.fill_(1)
        return not self.has_dense and self.state.recorder is None and not self.plan().records

    def sparse(
        self, attn: Any, video: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The layer with VMoBA; for a subclass.

        Args:
            attn: the attention layer, with its projections.
            video: ``(B, video tokens, channels)``.
            text: ``(B, text tokens, channels)`` in joint attention.
            mask: what the model passes as attention mask.
            rotary: what it passes as rotary embedding.
        """
        raise NotImplementedError

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        prefix: int = 0,
        suffix: int = 0,
        text_lengths: Tensor | None = None,
    ) -> Tensor:
        """Attention over the blocks of the grid that arrived.

        Args:
            query: ``(B, H, S, D)``, video tokens in raster order.
            key: ``(B, key heads, S, D)``.
            value: ``(B, key heads, S, D)``.
            prefix: text tokens before the video's.
            suffix: text tokens after the video's.
            text_lengths: as in ``vmoba_attention``.

        Returns:
            ``(B, S, H * D)``.

        Raises:
            ValueError: if the grid does not match the tokens.
            RuntimeError: if the layer runs outside of its model's forward.
        """
        plan, state = self.plan(), self.state
        if plan.skips_scores:
            return value.transpose(1, 2).flatten(2)
        partition = BlockPartition(plan.grid, plan.block, prefix=prefix, suffix=suffix)
        if state.recorder is not None:
            state.recorder(self, query, key, partition, text_lengths)
        if _decides_as_it_runs():
            output = attend_at_step(query, key, value, text_lengths, plan.handle, self.density, partition.flat)
        else:
            output, density = attend_planned(query, key, value, text_lengths, plan, partition)
            if density is not None:
                record_density(self.density, density)
        return output.transpose(1, 2).flatten(2).to(query.dtype)

    def plan(self) -> LayerPlan:
        """The plan of the forward that the layer runs in, or is computed again for."""
        plan = self.now.plan
        return self.state.recomputed_plan(self) if plan is None else plan


def _zero(device: torch.device) -> Tensor:
    """A float32 scalar, whatever the defaults, that can also be written to outside of inference mode."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.float32, device=device)


def _decides_as_it_runs() -> bool:
    """Whether one graph serves all steps. An export does not: it would know no plan in another process."""
    return torch.compiler.is_compiling() and not _is_exporting() and not torch.is_grad_enabled()


@constant_when_compiled
def _is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which is True in every graph on torch 2.11."""
    return torch.compiler.is_exporting()
