# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""From degrees to weights: the signed chain of plugins between two degrees, summed up (ToCom, section 3.2)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch

from tocom_hf.devices import float64_device
from tocom_hf.errors import DegreeError
from tocom_hf.merging.schedule import require_degree


class Factors(NamedTuple):
    """The two factors of a low-rank weight change: `lora_A` `(rank, in)`, `lora_B` `(out, rank)`, both float32."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor


Adapter = Mapping[str, Factors]
"""One plugin `P_i_i+1`: its factors by the path of the linear layer in the backbone."""


def chain(source_r: int, target_r: int) -> tuple[range, int]:
    """The plugins between two degrees and the sign that they are applied with.

    Args:
        source_r: The degree m that the weights were trained at.
        target_r: The degree n that the model shall run at.

    Returns:
        The indices i of the plugins `P_i_i+1`, `min(m, n) <= i < max(m, n)`; and the sign: +1 for n > m, -1 for n < m,
        0 for n = m.
    """
    if target_r > source_r:
        return range(source_r, target_r), 1
    if target_r < source_r:
        return range(target_r, source_r), -1
    return range(0), 0


@dataclass(frozen=True)
class Composite:
    """A signed chain of plugins summed up into one LoRA: `sign * scale * sum_i B_i A_i` (ToCom, eq. 4 and 5).

    The sum is exact: the factors are concatenated, not added, so no cross terms `B_i A_j` arise.

    Attributes:
        source_r, target_r: The two degrees.
        scale: The factor s in front of the sum.
        factors: By layer path; the sign is in `lora_B`, the scale is not. Empty where the degrees are equal.
    """

    source_r: int
    target_r: int
    scale: float
    factors: Adapter

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values())).lora_A.shape[0] if self.factors else 0

    def apply(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of one linear layer with the plugins folded in, a new tensor.

        Args:
            path: The layer's path in the backbone.
            weight: `(out, in)`, the weight at `source_r`, of any floating dtype and on any device.

        Returns:
            `weight + scale * lora_B @ lora_A` in the dtype and on the device of `weight`, summed in float64 and rounded
            once, so that the result depends neither on the device nor on torch's matmul precision settings.
        """
        device = float64_device(weight.device)
        factors = self.factors[path]
        lora_A = factors.lora_A.to(device).double()  # (rank, in)
        lora_B = factors.lora_B.to(device).double()  # (out, rank)
        total = torch.addmm(weight.to(device).double(), lora_B, lora_A, alpha=self.scale)  # (out, in)
        return total.to(weight.dtype).to(weight.device)


def sum_chain(adapters: Iterable[Adapter], *, source_r: int, target_r: int, scale: float) -> Composite:
    """Sum up the chain of plugins from one degree to another.

    Args:
        adapters: The plugins of `chain(source_r, target_r)`, in its order.
        source_r: The degree m of the weights.
        target_r: The degree n to run at.
        scale: The factor s.

    Returns:
        The composite, of rank `|n - m|` times the rank of one plugin as PEFT counts it.
    """
    _, sign = chain(source_r, target_r)
    adapters = list(adapters)
    paths = adapters[0].keys() if adapters else ()
    factors = {}
    for path in paths:
        lora_A = torch.cat([adapter[path].lora_A for adapter in adapters], dim=0)  # (|n - m| * rank, in)
        lora_B = torch.cat([adapter[path].lora_B for adapter in adapters], dim=1)  # (out, |n - m| * rank)
        factors[path] = Factors(lora_A, sign * lora_B)
    return Composite(source_r, target_r, scale, factors)


def require_in_range(degree: object, name: str, min_r: int, max_r: int) -> int:
    """Return `degree` as an int if `min_r <= degree <= max_r`, else raise `DegreeError` that names it."""
    value = require_degree(degree, name)
    if not min_r <= value <= max_r:
        raise DegreeError(
            f"{name}={value} is outside the plugin set, which covers r = {min_r}..{max_r}. "
            "Choose a degree in that range, or distil a set with a larger max_r."
        )
    return value


def require_scale(scale: object) -> float:
    """Return `scale` as a float if it is a finite number, else raise `DegreeError`."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise DegreeError(f"scale must be a finite number, got {scale!r}.")
    return float(scale)
