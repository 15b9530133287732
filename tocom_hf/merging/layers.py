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
from tocom_hf.merging.tokens import (
    MergePlan,
    extend_heads,
    follow_tokens,
    match_tokens,
    merge_tokens,
    plan_merge,
    proportional_bias,
    restore_tokens,
)


@dataclass(frozen=True)
class MergeSettings:
    """How a patched model merges; immutable, so a forward call sees one setting from start to end."""

    schedule: tuple[int, ...]
    protected: int
    proportional_attention: bool = True
    restore: bool = False
    class_tokens_only: bool = False


@dataclass(frozen=True)
class LayerPart:
    """What a patched layer knows about itself."""

    index: int
    architecture: Architecture


@dataclass
class TokenState:
    """What one forward call knows about its tokens: entry `i` is written by layer `i` and read by layer `i + 1`.

    Attributes:
        settings: The settings that the call started with.
        sizes: Token sizes after each layer, float32 `(batch, tokens)`.
        plans: Merge plans of the layers. A layer that is recomputed (gradient checkpointing) merges by the plan that it
            made the first time.
    """

    settings: MergeSettings
    sizes: dict[int, torch.Tensor] = field(default_factory=dict)
    plans: dict[int, MergePlan] = field(default_factory=dict)


class AttentionCall(NamedTuple):
    """What a layer tells its attention about one forward call.

    Attributes:
        settings: The settings of the call.
        sizes: Sizes of the tokens that enter, or `None` where all are 1.
        r: How many tokens to merge.
        plan: The plan to merge by where the layer is recomputed, else `None`.
        queries: How many tokens to compute, from the front; `None` for all.
    """

    settings: MergeSettings
    sizes: torch.Tensor | None
    r: int
    plan: MergePlan | None
    queries: int | None


class Merging(nn.Module):
    """What the merging subclasses share: they are made at run time, so pickling goes by the stock class."""

    stock_class: type[nn.Module]

    def __reduce_ex__(self, protocol):
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        mixin = MergingLayer if isinstance(self, MergingLayer) else MergingAttention
        return _new_instance, (self.stock_class, mixin), *state


class MergingLayer(Merging):
    """Mixin for a pre-norm transformer layer: merges between attention and MLP (ToMe, section 3)."""

    tome_part: LayerPart

    def forward(self, hidden_states, attention_mask=None, tome: TokenState | None = None, **kwargs):
        if tome is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        # A mask that arrives here is one of ones, which transformers makes while a model is exported.
        index, row = self.tome_part.index, self.tome_part.architecture
        settings, sizes = tome.settings, tome.sizes.get(index - 1)
        r = clamp_r(settings.schedule[index], hidden_states.shape[1], settings.protected)
        last = index == len(settings.schedule) - 1
        queries = settings.protected if last and settings.class_tokens_only else None
        if queries is not None:
            r = 0  # class tokens do not merge, and no others leave this layer
        if sizes is None and r == 0 and queries is None:
            return super().forward(hidden_states, attention_mask, **kwargs)

        normed = getattr(self, row.norm_before)(hidden_states)
        call = AttentionCall(settings, sizes, r, tome.plans.get(index), queries)
        branch, _, merge = getattr(self, row.attention)(normed, tome=call, **kwargs)
        if merge is not None:
            tome.plans[index], sizes = merge.plan, merge.sizes
            hidden_states = merge_tokens(hidden_states, merge)
        elif queries is not None:
            hidden_states = hidden_states[:, :queries]
        tome.sizes[index] = cast(torch.Tensor, sizes)
        hidden_states = _residual(self, row.scale_attention, row.drop, branch) + hidden_states
        branch = getattr(self, row.mlp)(getattr(self, row.norm_after)(hidden_states))
        hidden_states = _residual(self, row.scale_mlp, row.drop, branch) + hidden_states
        if settings.restore and last:
            positions = follow_tokens(tome.plans[i] for i in sorted(tome.plans))
            hidden_states = restore_tokens(hidden_states, cast(torch.Tensor, positions))
        return hidden_states


class MergingAttention(Merging):
    """Mixin for self-attention: adds the proportional bias, matches tokens by their keys, and merges its output.

    The output is merged before the output projection. That is affine, so it gives the same as merging behind it, for
    fewer tokens.
    """

    tome_part: Architecture
    config: PreTrainedConfig

    def forward(self, hidden_states, attention_mask=None, *, tome: AttentionCall | None = None, **kwargs):
        if tome is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        row, settings = self.tome_part, tome.settings
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        querying = hidden_states if tome.queries is None else hidden_states[:, : tome.queries]
        query = getattr(self, row.query)(querying).view(*querying.shape[:-1], -1, self.head_dim).transpose(1, 2)
        key = getattr(self, row.key)(hidden_states).view(shape)
        value = getattr(self, row.value)(hidden_states).view(shape).transpose(1, 2)
        metric = key.detach()
        key, scaling, bias = key.transpose(1, 2), getattr(self, row.scaling), None
        sizes = tome.sizes if settings.proportional_attention else None
        implementation = self.config._attn_implementation
        if sizes is not None:
            if implementation == "flex_attention":  # takes no bias that broadcasts, and crashes on CPUs with any other
                raise UnsupportedModelError(
                    "Proportional attention does not work with flex_attention. Call "
                    'model.set_attn_implementation("sdpa"), or "eager" or a flash kernel.'
                )
            if "flash" in implementation:  # these kernels take no bias
                query, key, value = extend_heads(query, key, value, sizes, scaling)
            else:
                bias = proportional_bias(sizes, key.dtype)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, sys.modules[self.stock_class.__module__].eager_attention_forward
        )
        dropout = getattr(self, row.dropout) if self.training else 0.0
        output, weights = attention(self, query, key, value, bias, dropout=dropout, scaling=scaling, **kwargs)
        output, merge = output[..., : self.head_dim].reshape(*querying.shape[:-1], -1), None
        if tome.r > 0:
            plan = tome.plan or match_tokens(metric.mean(dim=2), tome.r, settings.protected)
            merge = plan_merge(plan, tome.sizes)
            output = merge_tokens(output, merge)
        return getattr(self, row.output)(output), weights, merge


def _residual(layer: nn.Module, scale: str | None, drop: str | None, branch: torch.Tensor) -> torch.Tensor:
    """What a layer does to a branch before it joins the residual stream: layer scale, then dropout or drop path."""
    if scale:
        branch = getattr(layer, scale)(branch)
    return getattr(layer, drop)(branch) if drop else branch


def _new_instance(stock_class: type[nn.Module], mixin: type[Merging]) -> nn.Module:
    cls = merging_class(stock_class, mixin)
    return cls.__new__(cls)


_CLASSES: dict[type[nn.Module], type[Merging]] = {}


def merging_class(stock_class: type[nn.Module], mixin: type[Merging]) -> type[Merging]:
    """The merging subclass of a transformers class, made once per process.

    It keeps the name of the stock class: FSDP wrapping policies, `_no_split_modules` and saved configurations go by it.

    Raises:
        UnsupportedModelError: if the class is not one of transformers' own.
    """
    if stock_class.__module__.partition(".")[0] != "transformers":
        raise UnsupportedModelError(
            f"{stock_class.__module__}.{stock_class.__qualname__} is not a class of transformers, so token merging "
            "cannot know what its forward does. Supported are the stock layers of the listed architectures."
        )
    if stock_class not in _CLASSES:
        members = {name: getattr(stock_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        merging_class = type(stock_class.__name__, (mixin, stock_class), {**members, "stock_class": stock_class})
        _CLASSES.setdefault(stock_class, merging_class)
    return _CLASSES[stock_class]
