# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which tokens merged: a record of where every token of a forward call went."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.patching import get_settings
from tocom_hf.merging.state import TokenState, running_call
from tocom_hf.merging.tokens import output_positions


@dataclass
class TokenTrace:
    """Where the tokens of the last forward call went.

    Attributes:
        protected: Tokens at the front that never merge; the others are patches in the order of the grid.
        positions: For every layer, the position after it of each token that entered the first layer: int64
            `(batch, input tokens)`. Tokens with the same position were merged.
    """

    protected: int = 0
    positions: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def trace_tokens(model: PreTrainedModel, *, backbone: str | None = None) -> Iterator[TokenTrace]:
    """Record which input tokens went into which output token, for each forward call within the `with` block.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import apply_tome, trace_tokens
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> with trace_tokens(apply_tome(model, r=3)) as trace:
    ...     output = model(torch.rand(1, 3, 64, 64))
    >>> trace.positions[-1].shape  # where each of the 17 input tokens is after the last layer
    torch.Size([1, 17])
    >>> trace.positions[-1].unique().numel()
    11

    ```

    Args:
        model: A model that `apply_tome` patched.
        backbone: Which part to follow, where several merge; as in `apply_tome`.

    Yields:
        The trace of the last call; empty before the first.

    Raises:
        UnsupportedModelError: if the model is not patched.
        ArgumentError: if `backbone` names no part that could merge.
    """
    with traced(find_backbone(model, backbone)) as trace:
        yield trace


@contextlib.contextmanager
def traced(backbone: Backbone) -> Iterator[TokenTrace]:
    """What `trace_tokens` does, for those who have found the backbone."""
    settings = get_settings(backbone)
    if settings is None:
        raise UnsupportedModelError("The model does not merge tokens, so there is nothing to trace. Call apply_tome.")
    trace = TokenTrace(settings.protected)
    entering: list[torch.Tensor] = []

    def before(layer: nn.Module, args: tuple) -> None:
        entering[:] = [args[0]]

    def after(module: nn.Module, args: tuple, output: object) -> None:
        plans = cast(TokenState, running_call()).plans
        batch, tokens, _ = entering[0].shape
        positions = torch.arange(tokens, device=entering[0].device).expand(batch, -1)  # (batch, tokens)
        trace.positions = []
        for index in range(len(backbone.layers)):
            plan = plans.get(index)
            if plan is not None:
                positions = output_positions(plan).gather(1, positions)
            trace.positions.append(positions)

    first = backbone.layers[0].register_forward_pre_hook(before)
    # in front of the hook that ends the call
    last = backbone.module.register_forward_hook(after, prepend=True)
    try:
        yield trace
    finally:
        first.remove()
        last.remove()
