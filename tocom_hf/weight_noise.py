# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Random changes of the frozen weights during distillation, which stand for the fine-tuning that plugins will meet.

Plugins are distilled on the pre-trained weights and used with fine-tuned ones. Where every step changes the weights a
little, for teacher and student alike, the plugins learn to fit the neighbourhood of the backbone instead of the
backbone alone. The changes have low rank, as fine-tuning has (LoRA, arXiv 2106.09685).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


_RANK = 4


class WeightNoise:
    """Changes the linear layers of a backbone for the length of a step.

    In a step every weight `W` becomes `W + share * |W| * N / |N|`, where `N` is a random matrix of rank 4, `|.|` the
    Frobenius norm, and `share` is uniform in `[0, amount]`, the same for all layers. It is a function of the seed and
    the step alone, so all processes change the weights alike, and a run that resumes goes on with the next change.

    Args:
        layers: The transformer layers, on their device.
        amount: Largest relative norm of a change. Full fine-tuning of small data sets moves weights by 0.1 to 0.3.
        seed: Decides the changes.
    """

    def __init__(self, layers: nn.Module, amount: float, seed: int):
        self.amount, self.seed = amount, seed
        self.weights = [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Change the weights within a `with` block. Afterwards they are bit for bit what they were."""
        if not self.amount:
            yield
            return
        before = [weight.detach().clone() for weight in self.weights]
        try:
            self._change(torch.Generator().manual_seed(self.seed * 1_000_003 + step))
            yield
        finally:
            with torch.no_grad():
                for weight, old in zip(self.weights, before, strict=True):
                    weight.copy_(old)

    @torch.no_grad()
    def _change(self, generator: torch.Generator) -> None:
        share = self.amount * torch.rand((), generator=generator)
        for weight in self.weights:
            left, right = (torch.randn(size, _RANK, generator=generator) for size in weight.shape)
            noise = left.to(weight.device) @ right.to(weight.device).T
            weight.add_(noise * (share.to(weight.device) * weight.norm() / noise.norm()))
