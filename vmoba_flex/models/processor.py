"""A layer's attention in a diffusers model: sparse, or the stock processor's where it is dense."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from vmoba_flex.attention import attend
from vmoba_flex.call import Call
from vmoba_flex.models.parallel import ranks_of
from vmoba_flex.models.state import ModelState
from vmoba_flex.models.step_op import attend_at_step, attend_everything, layout_of, record_density
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.warmup import WarmedThreshold


class VMoBAProcessor:
    """An attention processor of diffusers for one self-attention layer.

    A subclass for each model family says how the layer makes query, key and value: ``sparse``. It holds the layer's
    kind and never its index, so that ``torch.compile`` makes a graph for each kind, and not for each layer.

    Attributes:
        stock: the processor that it stands in for, which dense layers and steps call, but while they are recorded.
        run: what all layers of the model share.
        kind: of the layer's blocks.
        rule: which chooses them.
        dense: whether the layer attends everything in the forward under way.
        dense_flag: the same as a bool tensor on the CPU: a compiled graph without gradients reads it as it runs, so
            that no graph is made anew between dense and sparse steps.
        ranks: that share the video's tokens, under diffusers' context parallelism; None for one.
        density: what the last forward attended, a float32 scalar on the model's device.
        joint: whether the layer also takes text and returns it.
        has_dense: whether dense layers and steps run here as well, and not in the stock processor.
    """

    joint: ClassVar[bool] = False
    has_dense: ClassVar[bool] = False

    def __init__(self, stock: Any, run: ModelState, kind: str, rule: Rule) -> None:
        self.stock, self.run, self.kind, self.rule = stock, run, kind, rule
        self.set_dense(False)
        self.density = torch.zeros(())
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

    def ready(self, dense: bool, device: torch.device) -> None:
        """Readies the layer for a forward on ``device``."""
        self.set_dense(dense)
        if self.density.device != device:
            with torch.inference_mode(False):  # it will be written to outside of one, too
                self.density = torch.zeros((), device=device)

    def set_dense(self, dense: bool) -> None:
        """Sets ``dense``, both ways."""
        self.dense, self.dense_flag = dense, self.run.flags[dense]

    def warm(self, share: float) -> None:
        """Sets how far a rule that is warmed up is on its way."""
        if isinstance(self.rule, WarmedThreshold):
            self.rule.warm(share)

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
        if not _decides_as_it_runs() and self.dense:  # in this order: one graph serves both
            with torch.no_grad():
                self.density.fill_(1)
            if not self.has_dense and self.run.recorder is None:
                return self.stock(*arguments)
        return self.sparse(*arguments)

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
            key: likewise.
            value: likewise.
            prefix: text tokens before the video's.
            suffix: text tokens behind the video's.
            text_lengths: as in ``vmoba_attention``.

        Returns:
            ``(B, S, H * D)``.

        Raises:
            ValueError: if the grid does not match the tokens.
            RuntimeError: if the layer runs without its model.
        """
        run = self.run
        if run.grid is None:
            raise RuntimeError("the grid is not known: call the whole model, not a layer of it alone")
        partition = BlockPartition(run.grid, run.blocks[self.kind], prefix=prefix, suffix=suffix)
        if run.recorder is not None:
            run.recorder(self, query, key, partition, text_lengths)
        dispatch, backend = run.config.dispatch, run.config.backend
        dense_backend = getattr(self.stock, "_attention_backend", None)
        dense_backend = "" if dense_backend is None else dense_backend.value
        if _decides_as_it_runs():
            output = attend_at_step(
                query, key, value, text_lengths, self.dense_flag, self.density, partition, self.rule, dispatch, backend,
                dense_backend, self.ranks,
            )  # fmt: skip
        elif self.dense:
            output = attend_everything(query, key, value, text_lengths, partition, dense_backend)
        else:
            call = Call(partition, self.rule, text_lengths=text_lengths)
            attended = attend(query, key, value, call, dispatch, backend, layout_of(self.ranks, partition))
            output = attended.output
            record_density(self.density, attended.density())
        return output.transpose(1, 2).flatten(2).to(query.dtype)


def _decides_as_it_runs() -> bool:
    """Whether one graph must serve dense and sparse steps."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()
