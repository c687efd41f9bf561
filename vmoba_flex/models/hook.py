"""The hook: a stock processor of diffusers makes query, key and value, and hands them to VMoBA.

Almost every processor ends in diffusers' dispatcher, ``dispatch_attention_fn``, with two attributes of its own: the
backend and the parallel config. A layer's VMoBA processor calls a copy of the stock one in which the first names a
backend of ours, and the second is the VMoBA processor itself. The dispatcher looks the backend up and passes the config
on to it as it is, so the call arrives here, after projections, norms and rotary embedding, with the layer that it is
for.

B batch, H heads, S tokens, D head dim.
"""

import copy
import functools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoba_flex.config_fields import LayerRule
from vmoba_flex.models.dispatcher import our_backend
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import ModelState

# Where padding lies among tokens that are not the grid's.
Padding = Literal["none", "last", "anywhere"]


class HookedProcessor(VMoBAProcessor):
    """A layer whose stock processor runs as it is, up to the attention itself; made by ``hooked``.

    Attributes:
        padding: where padding lies among tokens that are not the grid's, if the layer has a mask.
        handing_over: the copy of the stock processor that calls ``attend_call``.
    """

    def __init__(
        self, stock: Any, state: ModelState, kind: str, rule: LayerRule, *, padding: Padding, joint: bool
    ) -> None:
        self.padding: Padding = padding
        self.joint = joint
        super().__init__(stock, state, kind, rule)
        self.handing_over = self._handing_over()

    def _handing_over(self) -> Any:
        processor = copy.copy(self.stock)  # a stock processor may be shared by layers that stay dense
        processor._attention_backend, processor._parallel_config = our_backend(), self
        return processor

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies make a copy of the stock processor themselves: ours names a backend that no enum can look up.
        state = {name: value for name, value in vars(self).items() if name != "handing_over"}
        return _unmade, (type(self.stock),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.handing_over = self._handing_over()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, by whichever stock processor this call is for."""
        return self.stock(*args, **kwargs) if self.runs_stock() else self.handing_over(*args, **kwargs)

    def attend_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, **options: Any
    ) -> Tensor:
        """What the dispatcher returns.

        Args:
            query: ``(B, S, H, D)``.
            key: ``(B, S, H, D)``.
            value: ``(B, S, H, D)``.
            mask: of the call.
            is_causal: whether the call is causal, as one of only the text before the video may be, which stays dense.
            **options: of the call, for a dense one.

        Returns:
            ``(B, S, H, D)``.

        Raises:
            ValueError: if the call has dropout, a scale, an order or a mask of other than padding, or the grid does not
                match the tokens.
        """
        if is_causal and key.shape[1] == self.plan().prefix:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            options |= {"backend": self._attention_backend, "parallel_config": self._parallel_config}
            return dispatch_attention_fn(query, key, value, attn_mask=mask, is_causal=True, **options)
        if is_causal or options["dropout_p"] or options["scale"] is not None:
            options["is_causal"] = is_causal
            raise ValueError(f"attention must be without dropout, scale and order with VMoBA applied, got {options}")
        tokens, order = key.shape[1], None
        prefix, suffix = self._others(tokens)
        valid = None if mask is None else self._valid(mask)
        # Queries may be fewer, where tokens before the video have a call of their own.
        without = tokens - query.shape[1]
        query = F.pad(query, (0, 0, 0, 0, without, 0)) if without else query
        if valid is not None and self.padding == "anywhere":
            order = _around(valid, prefix, suffix).sort(dim=1, descending=True, stable=True).indices
            query, key, value = (_reordered(x, order, prefix, suffix) for x in (query, key, value))
        lengths = None if valid is None else valid.sum(1) - (tokens - prefix - suffix)
        turned = (x.transpose(1, 2) for x in (query, key, value))
        output = self.attend(*turned, prefix=prefix, suffix=suffix, text_lengths=lengths)
        output = output.unflatten(2, (query.shape[2], -1))
        output = output if order is None else _reordered(output, order.argsort(1), prefix, suffix)
        return output[:, without:] if without else output

    def _others(self, tokens: int) -> tuple[int, int]:
        """How many tokens lie before and after the video's."""
        plan, ranks = self.plan(), 1 if self.ranks is None else self.ranks.size
        if plan.rest == "none":
            return plan.prefix, 0
        rest = tokens * ranks - math.prod(plan.grid) - plan.prefix
        if rest < 0:
            arrive = tokens * ranks - plan.prefix
            raise ValueError(f"grid must have no more than the {arrive} tokens that arrive, got {plan.grid}")
        if rest and ranks > 1:
            raise ValueError(
                "context parallelism must be off with VMoBA applied where other tokens attend with the video, got "
                f"{rest} of them"
            )
        return (plan.prefix + rest, 0) if plan.rest == "prefix" else (plan.prefix, rest)

    def _valid(self, mask: Tensor) -> Tensor:
        """Which tokens are valid, bool ``(B, S)``."""
        if self.padding == "none" or mask.dtype != torch.bool or mask.shape[1:3] != (1, 1):
            masks = "None" if self.padding == "none" else "None or bool (B, 1, 1, S)"
            raise ValueError(f"attention_mask must be {masks} with VMoBA applied, got a mask")
        return mask[:, 0, 0]


def _around(x: Tensor, prefix: int, suffix: int) -> Tensor:
    """What stands before and after the video ``(B, S, ...)``, together."""
    return torch.cat([x[:, :prefix], x[:, x.shape[1] - suffix :]], 1)


def _reordered(x: Tensor, order: Tensor, prefix: int, suffix: int) -> Tensor:
    """``(B, S, H, D)`` with the tokens around the video in ``order``, int64 ``(B, prefix + suffix)``."""
    around = _around(x, prefix, suffix)
    around = around.gather(1, order[..., None, None].expand_as(around))
    return torch.cat([around[:, :prefix], x[:, prefix : x.shape[1] - suffix], around[:, prefix:]], 1)


@functools.cache
def hooked(stock: type) -> type[HookedProcessor]:
    """The processor class for a stock one, whose signature it has: diffusers passes it what that names."""

    @functools.wraps(stock.__call__)
    def call(self: HookedProcessor, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    return type(f"VMoBA{stock.__name__}", (HookedProcessor,), {"__call__": call, "__module__": __name__})


def _unmade(stock: type) -> HookedProcessor:
    return object.__new__(hooked(stock))
