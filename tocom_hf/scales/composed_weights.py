# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Weights that are composed with a factor for each plugin, and the gradient of these factors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class ComposedWeight(NamedTuple):
    """A weight and what it is composed of.

    Attributes:
        weight: `(out, in)`, the frozen weight plus `(lora_B * factors) @ lora_A`. Autograd sees a constant.
        lora_A: float32 `(columns, in)`, the `lora_A` of all plugins in use.
        lora_B: float32 `(out, columns)`, their `lora_B`.
        factors: float32 `(columns,)`, which have a gradient.
    """

    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    factors: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, frozen: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, factors: torch.Tensor) -> Self:
        """Compose a weight, and round it once to the dtype of the frozen one."""
        weight = torch.add(frozen, (lora_B * factors) @ lora_A).to(frozen.dtype)
        return cls(weight, lora_A, lora_B, factors)


class FactorGradients(TorchFunctionMode):
    """Inside, linear layers with composed weights hand their gradient on to the factors.

    Autograd by itself would first make the gradient of each composed weight, which is as much work as the layer. The
    factors need only what the layer's input and the gradient of its output have in the few directions of the plugins.

    Args:
        composed: The weights, by name.

    Attributes:
        unused: The names of those that no linear layer has used so far. Their factors get no gradient.
    """

    def __init__(self, composed: Mapping[str, ComposedWeight]):
        super().__init__()
        self.composed = {id(entry.weight): (name, entry) for name, entry in composed.items()}
        self.unused = set(composed)

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            func = self._linear
        return func(*args, **(kwargs or {}))

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`torch.nn.functional.linear`."""
        found = self.composed.get(id(weight))
        if found is None:
            return F.linear(input, weight, bias)
        name, entry = found
        self.unused.discard(name)
        return _ComposedLinear.apply(input, weight, bias, entry.factors, entry.lora_A, entry.lora_B)


class _ComposedLinear(torch.autograd.Function):
    """A linear layer whose gradient goes to its input and to the factors that its weight was composed with."""

    @staticmethod
    def forward(ctx, input, weight, bias, factors, lora_A, lora_B):
        ctx.save_for_backward(input, weight, lora_A, lora_B)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        input, weight, lora_A, lora_B = ctx.saved_tensors
        to_input = gradient @ weight if ctx.needs_input_grad[0] else None
        down = input @ lora_A.T.to(input.dtype)  # (..., columns)
        up = gradient @ lora_B.to(gradient.dtype)  # (..., columns)
        to_factors = (down * up).flatten(0, -2).sum(dim=0, dtype=torch.float32)  # (columns,)
        return to_input, None, None, to_factors, None, None
