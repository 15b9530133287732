# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Transformer layers and attention blocks that merge tokens: subclasses of transformers' own, made at run time.

They keep nothing that a forward call computes. Every call hands them its own `TokenState`.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.architectures import Architecture, find_part
from tocom_hf.merging.attention import attend
from tocom_hf.merging.kernels import fused_merge, fused_plan
from tocom_hf.merging.masks import refuse_hidden_keys
from tocom_hf.merging.positions import Positions
from tocom_hf.merging.recipes import TOME_RULE, MergeRule, log_class_attention, matching_metric
from tocom_hf.merging.schedule import clamp_r
from tocom_hf.merging.state import TokenState, running_call
from tocom_hf.merging.subclassing import RuntimeSubclass, runtime_subclass
from tocom_hf.merging.timm_models import KNOWN_CLASSES, TIMM_MASKS, full_name
from tocom_hf.merging.tokens import (
    MergePlan,
    follow_tokens,
    match_tokens,
    merge_tokens,
    restore_tokens,
    token_rows,
)


class AttentionCall(NamedTuple):
    """What a layer tells its attention about one forward call.

    Attributes:
        tome: State of the call.
        sizes: Sizes of the tokens that enter, float32 `(batch, tokens)`, or `None` where all are 1.
        r: How many tokens to merge.
        rows: The numbers of the rows that the plan is made of; `None` where there is none to make, because no token
            merges or because the layer is recomputed.
        queries: How many tokens to compute, from the front; `None` for all.
        bias: The logarithms of the sizes, `(batch, 1, 1, tokens)`, where the last layer made them.
        coordinates: Where the tokens are, float32 `(batch, tokens, values)`, in a model with rotary positions; `None`
            where none has merged yet.
        rule: How the tokens that merge are chosen.
    """

    tome: TokenState
    sizes: torch.Tensor | None
    r: int
    rows: torch.Tensor | None
    queries: int | None
    bias: torch.Tensor | None = None
    coordinates: torch.Tensor | None = None
    rule: MergeRule = TOME_RULE


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Some models hand their layers no keyword arguments. Whatever runs the forward a second time (gradient
        # checkpointing) keeps what this call is given, while no call of the backbone is running then.
        if kwargs.get("tome") is None:
            kwargs["tome"] = running_call()
            if kwargs["tome"] is None and not torch.compiler.is_compiling() and _is_in_backward_pass():
                raise UnsupportedModelError(
                    f"{type(self).__name__} is computed a second time without what its first time has merged, as "
                    "wrappers of single layers do. Recompute with model.gradient_checkpointing_enable() instead."
                )
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states, *args, tome: TokenState | None = None, **kwargs):
        if tome is None:
            return super().forward(hidden_states, *args, **kwargs)
        tome.reached = True
        if self.tome_index == 0:
            # A mask that passes hides nothing: transformers makes such ones while a model is exported.
            refuse_hidden_keys(self.stock_class, args, kwargs)
        call = self._attention_call(tome, hidden_states)
        if call.sizes is None and call.r == 0 and call.queries is None:
            return super().forward(hidden_states, *args, **kwargs)

        kwargs.update(zip(self.tome_architecture.layer_arguments, args, strict=False))
        for mask in ("attention_mask", *TIMM_MASKS):
            kwargs.pop(mask, None)
        # what attention needed is let go of in there, so that the MLP does not find it in memory
        hidden_states, weights = self._attend_and_merge(hidden_states, call, kwargs)  # (batch, tokens - r, hidden)
        names = self.tome_architecture
        hidden_states = through(self, names.mlp_branch, hidden_states) + hidden_states
        if tome.settings.restore and self._is_last(tome):
            positions = follow_tokens(tome.plans[index] for index in sorted(tome.plans))  # (batch, input tokens)
            hidden_states = restore_tokens(
                hidden_states, cast(torch.Tensor, positions)
            )  # (batch, input tokens, hidden)
        return (hidden_states, weights) if names.returns_weights else hidden_states

    def _attend_and_merge(
        self, hidden_states: torch.Tensor, call: AttentionCall, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first half of the layer.

        Args:
            hidden_states: `(batch, tokens, hidden)`.
            call: What the layer does to them.
            kwargs: What the layer was called with besides, handed on to attention.

        Returns:
            `(batch, tokens - r, hidden)` or, in a last layer of class tokens only, `(batch, protected, hidden)`; and
            the attention weights where attention tells them.
        """
        names, tome = self.tome_architecture, call.tome
        normed = getattr(self, names.norm_before)(hidden_states)  # (batch, tokens, hidden)
        attention = find_part(self, names.attention)
        branch, weights, plan = attention(normed, call=call, **kwargs)  # (batch, queries, hidden)
        if call.queries is not None:
            hidden_states = hidden_states[:, : call.queries]  # (batch, protected, hidden)
        branch = through(self, names.attention_branch, branch)
        sizes = call.sizes  # (batch, tokens)
        if call.r > 0:
            plan = tome.plans.setdefault(self.tome_index, plan)
            if names.positions is not None:
                self._move(tome, call, normed, plan, kwargs)
            fused = fused_merge(hidden_states, branch, plan, sizes)
            if fused is None:
                hidden_states, sizes = merge_tokens(branch + hidden_states, sizes, plan)  # (batch, tokens - r, hidden)
            else:
                hidden_states, sizes, tome.biases[self.tome_index] = fused
        else:
            hidden_states = branch + hidden_states
            if call.coordinates is not None:
                tome.coordinates[self.tome_index] = call.coordinates
        tome.sizes[self.tome_index] = cast(torch.Tensor, sizes)
        return hidden_states, weights

    def _attention_call(self, tome: TokenState, hidden_states: torch.Tensor) -> AttentionCall:
        """What this layer does to the tokens of a call."""
        batch, tokens, _ = hidden_states.shape
        settings = tome.settings
        before = self.tome_index - 1
        call = AttentionCall(
            tome,
            sizes=tome.sizes.get(before),  # (batch, tokens)
            r=0,
            rows=None,
            queries=None,
            bias=tome.biases.get(before),  # (batch, 1, 1, tokens)
            coordinates=tome.coordinates.get(before),  # (batch, tokens, values)
        )
        if settings.class_tokens_only and self._is_last(tome):
            # class tokens do not merge, and no others leave this layer
            return call._replace(queries=settings.protected)
        r = clamp_r(settings.schedule[self.tome_index], tokens, settings.protected)
        if r > 0 and tome.rows is None:
            tome.rows = token_rows(batch, tokens, hidden_states.device)
        has_plan = r == 0 or self.tome_index in tome.plans
        return call._replace(r=r, rows=None if has_plan else tome.rows, rule=settings.recipe.rule(self.tome_index))

    def _move(
        self,
        tome: TokenState,
        call: AttentionCall,
        hidden_states: torch.Tensor,
        plan: MergePlan,
        kwargs: dict[str, Any],
    ) -> None:
        """Note where the tokens are behind this layer."""
        coordinates = call.coordinates
        if coordinates is None:
            names = self.tome_architecture
            attention = find_part(self, names.attention)
            coordinates = cast(Positions, names.positions).coordinates(attention, hidden_states, kwargs)
        tome.coordinates[self.tome_index], _ = merge_tokens(coordinates, call.sizes, plan)

    def _is_last(self, tome: TokenState) -> bool:
        return self.tome_index == len(tome.settings.schedule) - 1


class MergingAttention(Merging):
    """Mixin for self-attention: weighs keys by their sizes, and matches tokens by their keys."""

    config: PreTrainedConfig

    def forward(self, hidden_states, *args, call: AttentionCall | None = None, **kwargs):
        if call is None:
            return super().forward(hidden_states, *args, **kwargs)
        names = self.tome_architecture
        settings = call.tome.settings
        query, key, value = self._project(hidden_states, call.queries)
        if names.positions is not None:
            query, key = names.positions.rotate(self, query, key, call.coordinates, kwargs)
        output, weights = attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            call.sizes if settings.proportional_attention else None,
            scaling=getattr(self, names.scaling),
            dropout=_dropout_of(getattr(self, names.dropout)) if self.training else 0.0,
            bias=call.bias if settings.proportional_attention else None,
            eager_adds_mask=names.eager_adds_mask,
            **kwargs,
        )
        output = output.reshape(*output.shape[:2], -1)
        if names.output is not None:
            output = getattr(self, names.output)(output)
        plan = None if call.rows is None else self._plan(call, hidden_states, query, key, value)
        return output, weights, plan

    def _plan(
        self,
        call: AttentionCall,
        hidden_states: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> MergePlan:
        """Which tokens merge. Takes what `matching_metric` and `log_class_attention` take."""
        settings, rule = call.tome.settings, call.rule
        if rule == TOME_RULE:
            plan = fused_plan(key, call.r, settings.protected)
            if plan is not None:
                return plan
        penalties = None
        if rule.attention_penalty != 0:
            sizes = call.sizes if settings.proportional_attention else None
            scaling = getattr(self, self.tome_architecture.scaling)
            penalties = rule.attention_penalty * log_class_attention(query, key, sizes, scaling)  # (batch, tokens)
        return match_tokens(
            matching_metric(rule.match_by, hidden_states, key, value),  # (batch, tokens, channels)
            call.r,
            settings.protected,
            call.rows,
            sizes=call.sizes,
            size_penalty=rule.size_penalty,
            penalties=penalties,
        )

    def _project(self, hidden_states: torch.Tensor, queries: int | None) -> list[torch.Tensor]:
        """Query, key and value: `(batch, queries, heads, head_dim)` and twice `(batch, tokens, heads, head_dim)`."""
        names = self.tome_architecture
        if names.qkv is None:
            querying = hidden_states if queries is None else hidden_states[:, :queries]
            projected = [
                getattr(self, names.query)(querying),
                getattr(self, names.key)(hidden_states),
                getattr(self, names.value)(hidden_states),
            ]
        else:
            query, key, value = getattr(self, names.qkv)(hidden_states).chunk(3, dim=-1)
            projected = [query if queries is None else query[:, :queries], key, value]
        if names.num_heads is None:
            head_dim = getattr(self, names.head_dim)
        else:
            head_dim = projected[1].shape[-1] // getattr(self, names.num_heads)
        if not names.norms_heads:
            projected = self._normed(projected)
        projected = [part.view(*part.shape[:-1], -1, head_dim) for part in projected]
        return self._normed(projected) if names.norms_heads else projected

    def _normed(self, projected: list[torch.Tensor]) -> list[torch.Tensor]:
        """Query, key and value, the first two normed where the family norms them."""
        names = self.tome_architecture
        if names.query_norm is None or names.key_norm is None:
            return projected
        query, key, value = projected
        return [getattr(self, names.query_norm)(query), getattr(self, names.key_norm)(key), value]


def merging_class(stock_class: type[nn.Module], mixin: type[Merging]) -> type[Merging]:
    """The merging subclass of a class of transformers, or of a known one of timm.

    Raises:
        UnsupportedModelError: if the class is neither.
    """
    name = full_name(stock_class)
    if stock_class.__module__.partition(".")[0] != "transformers" and name not in KNOWN_CLASSES:
        raise UnsupportedModelError(
            f"{name} is not a class of transformers, so token merging cannot know what its forward does. Supported are "
            "the stock layers of the listed architectures."
        )
    return runtime_subclass(mixin, stock_class)


def through(layer: nn.Module, names: tuple[str, ...], hidden_states: torch.Tensor) -> torch.Tensor:
    """What parts of a layer make of hidden states one after the other; a parameter among them is a layer scale."""
    for name in names:
        part = find_part(layer, name)
        hidden_states = part(hidden_states) if callable(part) else part * hidden_states
    return hidden_states


def _is_in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1


def _dropout_of(dropout: nn.Dropout | float) -> float:
    """The probability that an attention block keeps as a number or as a module."""
    return dropout.p if isinstance(dropout, nn.Dropout) else dropout
