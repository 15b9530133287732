# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Transformer layers and attention blocks that merge tokens: subclasses of transformers' own, made at run time.

They keep nothing that a forward call computes. Every call hands them its own `TokenState`.
"""

import sys
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.architectures import Architecture
from tocom_hf.merging.schedule import clamp_r
from tocom_hf.merging.subclassing import RuntimeSubclass, runtime_subclass
from tocom_hf.merging.tokens import (
    MergePlan,
    extend_heads,
    follow_tokens,
    match_tokens,
    merge_tokens,
    proportional_bias,
    restore_tokens,
    token_rows,
)


@dataclass(frozen=True)
class MergeSettings:
    """How a patched model merges; immutable, so a forward call sees one setting from start to end."""

    schedule: tuple[int, ...]
    protected: int
    proportional_attention: bool = True
    restore: bool = False
    class_tokens_only: bool = False


@dataclass
class TokenState:
    """What one forward call knows about its tokens: entry `i` is written by layer `i` and read by layer `i + 1`.

    Attributes:
        settings: The settings that the call started with.
        sizes: Token sizes after each layer, float32 `(batch, tokens)`.
        plans: Merge plans of the layers. A layer that is recomputed (gradient checkpointing) merges by the plan that it
            made the first time.
        rows: The numbers of all rows that tokens can have, made once for all layers.
    """

    settings: MergeSettings
    sizes: dict[int, torch.Tensor] = field(default_factory=dict)
    plans: dict[int, MergePlan] = field(default_factory=dict)
    rows: torch.Tensor | None = None


class AttentionCall(NamedTuple):
    """What a layer tells its attention about one forward call.

    Attributes:
        settings: The settings of the call.
        sizes: Sizes of the tokens that enter, float32 `(batch, tokens)`, or `None` where all are 1.
        r: How many tokens to merge.
        rows: The numbers of the rows that the plan is made of; `None` where there is none to make, because no token
            merges or because the layer is recomputed.
        queries: How many tokens to compute, from the front; `None` for all.
    """

    settings: MergeSettings
    sizes: torch.Tensor | None
    r: int
    rows: torch.Tensor | None
    queries: int | None


class Merging(RuntimeSubclass, nn.Module):
    """What merging layers and merging attention blocks share. `apply_tome` sets what `remove_tome` deletes again.

    Attributes:
        tome_architecture: Names of the parts of the layer and of its attention block.
    """

    tome_architecture: Architecture


class MergingLayer(Merging):
    """Mixin for a pre-norm transformer layer: merges between attention and MLP (ToMe, section 3).

    Attributes:
        tome_index: Which layer of the model it is.
    """

    tome_index: int

    def forward(self, hidden_states, attention_mask=None, tome: TokenState | None = None, **kwargs):
        # A mask that arrives here is one of ones, which transformers makes while a model is exported.
        if tome is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        call = self._attention_call(tome, hidden_states)
        if call.sizes is None and call.r == 0 and call.queries is None:
            return super().forward(hidden_states, attention_mask, **kwargs)

        names = self.tome_architecture
        normed = getattr(self, names.norm_before)(hidden_states)  # (batch, tokens, hidden)
        branch, _, plan = getattr(self, names.attention)(normed, call=call, **kwargs)  # (batch, queries, hidden)
        if call.queries is not None:
            hidden_states = hidden_states[:, : call.queries]  # (batch, protected, hidden)
        hidden_states = _scaled_and_dropped(self, names.scale_attention, names.drop, branch) + hidden_states
        sizes = call.sizes  # (batch, tokens)
        if call.r > 0:
            plan = tome.plans.setdefault(self.tome_index, plan)
            hidden_states, sizes = merge_tokens(hidden_states, sizes, plan)  # (batch, tokens - r, hidden)
        tome.sizes[self.tome_index] = cast(torch.Tensor, sizes)

        branch = getattr(self, names.mlp)(getattr(self, names.norm_after)(hidden_states))
        hidden_states = _scaled_and_dropped(self, names.scale_mlp, names.drop, branch) + hidden_states
        if tome.settings.restore and self._is_last(tome):
            positions = follow_tokens(tome.plans[index] for index in sorted(tome.plans))  # (batch, input tokens)
            hidden_states = restore_tokens(
                hidden_states, cast(torch.Tensor, positions)
            )  # (batch, input tokens, hidden)
        return hidden_states

    def _attention_call(self, tome: TokenState, hidden_states: torch.Tensor) -> AttentionCall:
        """What this layer does to the tokens of a call."""
        batch, tokens, _ = hidden_states.shape
        settings = tome.settings
        sizes = tome.sizes.get(self.tome_index - 1)  # (batch, tokens)
        if settings.class_tokens_only and self._is_last(tome):
            # class tokens do not merge, and no others leave this layer
            return AttentionCall(settings, sizes, r=0, rows=None, queries=settings.protected)
        r = clamp_r(settings.schedule[self.tome_index], tokens, settings.protected)
        if r > 0 and tome.rows is None:
            tome.rows = token_rows(batch, tokens, hidden_states.device)
        has_plan = r == 0 or self.tome_index in tome.plans
        return AttentionCall(settings, sizes, r=r, rows=None if has_plan else tome.rows, queries=None)

    def _is_last(self, tome: TokenState) -> bool:
        return self.tome_index == len(tome.settings.schedule) - 1


class MergingAttention(Merging):
    """Mixin for self-attention: adds the proportional bias, and matches tokens by their keys."""

    config: PreTrainedConfig
    head_dim: int

    def forward(self, hidden_states, attention_mask=None, *, call: AttentionCall | None = None, **kwargs):
        if call is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        names = self.tome_architecture
        querying = hidden_states if call.queries is None else hidden_states[:, : call.queries]
        query = self._split_heads(getattr(self, names.query)(querying))  # (batch, queries, heads, head_dim)
        key = self._split_heads(getattr(self, names.key)(hidden_states))  # (batch, tokens, heads, head_dim)
        value = self._split_heads(getattr(self, names.value)(hidden_states))  # (batch, tokens, heads, head_dim)
        output, weights = self._attend(query, key, value, call, **kwargs)  # (batch, queries, heads * head_dim)
        plan = None
        if call.rows is not None:
            metric = key.detach().mean(dim=2)  # (batch, tokens, head_dim)
            plan = match_tokens(metric, call.r, call.settings.protected, call.rows)
        return getattr(self, names.output)(output), weights, plan

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, heads * head_dim)` as `(batch, tokens, heads, head_dim)`."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention in whichever implementation the model is set to, with the proportional bias (ToMe, eq. 1).

        Returns:
            `(batch, queries, heads * head_dim)`, and the attention weights where the implementation tells them.
        """
        query = query.transpose(1, 2)  # (batch, heads, queries, head_dim)
        key = key.transpose(1, 2)  # (batch, heads, tokens, head_dim)
        value = value.transpose(1, 2)  # (batch, heads, tokens, head_dim)
        names = self.tome_architecture
        scaling = getattr(self, names.scaling)
        implementation = self.config._attn_implementation
        bias = None
        if call.sizes is not None and call.settings.proportional_attention:
            if implementation == "flex_attention":  # takes no bias that broadcasts, and crashes on CPUs with any other
                raise UnsupportedModelError(
                    "Proportional attention does not work with flex_attention. Call "
                    'model.set_attn_implementation("sdpa"), or "eager" or a flash kernel.'
                )
            if "flash" in implementation:  # these kernels take no bias
                query, key, value = extend_heads(query, key, value, call.sizes, scaling)
            else:
                bias = proportional_bias(call.sizes, key.dtype)  # (batch, 1, 1, tokens)
        stock_module = sys.modules[self.stock_class.__module__]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, stock_module.eager_attention_forward)
        dropout = getattr(self, names.dropout) if self.training else 0.0
        output, weights = attention(self, query, key, value, bias, dropout=dropout, scaling=scaling, **kwargs)
        # cuts off the channels that extend_heads added
        output = output[..., : self.head_dim]  # (batch, queries, heads, head_dim)
        return output.reshape(*output.shape[:2], -1), weights


def merging_class(stock_class: type[nn.Module], mixin: type[Merging]) -> type[Merging]:
    """The merging subclass of a transformers class.

    Raises:
        UnsupportedModelError: if the class is not one of transformers' own.
    """
    if stock_class.__module__.partition(".")[0] != "transformers":
        raise UnsupportedModelError(
            f"{stock_class.__module__}.{stock_class.__qualname__} is not a class of transformers, so token merging "
            "cannot know what its forward does. Supported are the stock layers of the listed architectures."
        )
    return runtime_subclass(mixin, stock_class)


def _scaled_and_dropped(layer: nn.Module, scale: str | None, drop: str | None, branch: torch.Tensor) -> torch.Tensor:
    """What a layer does to a branch before it joins the residual stream: layer scale, then dropout or drop path."""
    if scale is not None:
        branch = getattr(layer, scale)(branch)
    if drop is not None:
        branch = getattr(layer, drop)(branch)
    return branch
