# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Transformer layers and attention blocks that merge tokens: subclasses of transformers' own, made at run time.

They keep nothing that a forward call computes. Every call hands them its own `TokenState`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.architectures import Architecture
from tocom_hf.merging.attention import attend
from tocom_hf.merging.kernels import fused_merge, fused_plan
from tocom_hf.merging.schedule import clamp_r
from tocom_hf.merging.subclassing import RuntimeSubclass, runtime_subclass
from tocom_hf.merging.tokens import (
    MergePlan,
    follow_tokens,
    match_tokens,
    merge_tokens,
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
        biases: The logarithms of the sizes after each layer, `(batch, 1, 1, tokens)`, where a kernel made them.
    """

    settings: MergeSettings
    sizes: dict[int, torch.Tensor] = field(default_factory=dict)
    plans: dict[int, MergePlan] = field(default_factory=dict)
    rows: torch.Tensor | None = None
    biases: dict[int, torch.Tensor] = field(default_factory=dict)


class AttentionCall(NamedTuple):
    """What a layer tells its attention about one forward call.

    Attributes:
        settings: The settings of the call.
        sizes: Sizes of the tokens that enter, float32 `(batch, tokens)`, or `None` where all are 1.
        r: How many tokens to merge.
        rows: The numbers of the rows that the plan is made of; `None` where there is none to make, because no token
            merges or because the layer is recomputed.
        queries: How many tokens to compute, from the front; `None` for all.
        bias: The logarithms of the sizes, `(batch, 1, 1, tokens)`, where the last layer made them.
    """

    settings: MergeSettings
    sizes: torch.Tensor | None
    r: int
    rows: torch.Tensor | None
    queries: int | None
    bias: torch.Tensor | None = None


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
        branch = _scaled_and_dropped(self, names.scale_attention, names.drop, branch)
        sizes = call.sizes  # (batch, tokens)
        if call.r > 0:
            plan = tome.plans.setdefault(self.tome_index, plan)
            fused = fused_merge(hidden_states, branch, plan, sizes)
            if fused is None:
                hidden_states, sizes = merge_tokens(branch + hidden_states, sizes, plan)  # (batch, tokens - r, hidden)
            else:
                hidden_states, sizes, tome.biases[self.tome_index] = fused
        else:
            hidden_states = branch + hidden_states
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
        bias = tome.biases.get(self.tome_index - 1)  # (batch, 1, 1, tokens)
        if settings.class_tokens_only and self._is_last(tome):
            # class tokens do not merge, and no others leave this layer
            return AttentionCall(settings, sizes, r=0, rows=None, queries=settings.protected, bias=bias)
        r = clamp_r(settings.schedule[self.tome_index], tokens, settings.protected)
        if r > 0 and tome.rows is None:
            tome.rows = token_rows(batch, tokens, hidden_states.device)
        has_plan = r == 0 or self.tome_index in tome.plans
        return AttentionCall(settings, sizes, r=r, rows=None if has_plan else tome.rows, queries=None, bias=bias)

    def _is_last(self, tome: TokenState) -> bool:
        return self.tome_index == len(tome.settings.schedule) - 1


class MergingAttention(Merging):
    """Mixin for self-attention: weighs keys by their sizes, and matches tokens by their keys."""

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
        output, weights = attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            call.sizes if call.settings.proportional_attention else None,
            scaling=getattr(self, names.scaling),
            dropout=getattr(self, names.dropout) if self.training else 0.0,
            bias=call.bias if call.settings.proportional_attention else None,
            **kwargs,
        )
        output = output.reshape(*output.shape[:2], -1)
        plan = None
        if call.rows is not None:
            plan = fused_plan(key, call.r, call.settings.protected)
            if plan is None:
                metric = key.detach().mean(dim=2)  # (batch, tokens, head_dim)
                plan = match_tokens(metric, call.r, call.settings.protected, call.rows)
        return getattr(self, names.output)(output), weights, plan

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, heads * head_dim)` as `(batch, tokens, heads, head_dim)`."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim)


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
