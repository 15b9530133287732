# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What one forward call knows about its tokens, and how its layers come by it.

A backbone that merges begins a call before its forward runs and ends it afterwards. Calls lie on a stack of the thread,
because a model may run others while it runs; layers find their own on top of it.
"""

import threading
from dataclasses import dataclass, field

import torch
from torch import nn

from tocom_hf.merging.recipes import TOME_RECIPE, MergeRecipe
from tocom_hf.merging.tokens import MergePlan


@dataclass(frozen=True)
class MergeSettings:
    """How a patched model merges; immutable, so a forward call sees one setting from start to end."""

    schedule: tuple[int, ...]
    protected: int
    proportional_attention: bool = True
    restore: bool = False
    class_tokens_only: bool = False
    recipe: MergeRecipe = TOME_RECIPE


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
        coordinates: Where the tokens are after each layer, float32 `(batch, tokens, values)`, in a model with rotary
            positions: what its strategy in `positions` makes of it.
        reached: Whether a layer has received this state.
    """

    settings: MergeSettings
    sizes: dict[int, torch.Tensor] = field(default_factory=dict)
    plans: dict[int, MergePlan] = field(default_factory=dict)
    rows: torch.Tensor | None = None
    biases: dict[int, torch.Tensor] = field(default_factory=dict)
    coordinates: dict[int, torch.Tensor] = field(default_factory=dict)
    reached: bool = False


class _Calls(threading.local):
    def __init__(self) -> None:
        self.running: list[tuple[int, TokenState]] = []


_CALLS = _Calls()


def begin_call(backbone: nn.Module, settings: MergeSettings) -> TokenState:
    """Begin a forward call of a backbone in this thread; `end_call` ends it."""
    state = TokenState(settings)
    _CALLS.running.append((id(backbone), state))
    return state


def end_call(backbone: nn.Module) -> TokenState | None:
    """End the call of a backbone in this thread; `None` where an error kept it from beginning."""
    if not _CALLS.running or _CALLS.running[-1][0] != id(backbone):
        return None
    return _CALLS.running.pop()[1]


def running_call() -> TokenState | None:
    """The call that runs in this thread: of those within each other the innermost, `None` where none runs."""
    return _CALLS.running[-1][1] if _CALLS.running else None
