# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The FLOPs of any schedule from those of a few, because a search asks for thousands."""

from collections.abc import Callable, Sequence

import numpy as np

from tocom_hf.merging.schedule import clamp_r


class FlopModel:
    """Floating-point operations of a forward pass as a function of the schedule.

    They are a sum over layers of terms in the tokens that enter a layer, their square (attention), the tokens that
    leave it (MLP), and the pairs that are compared where tokens merge. Their factors follow exactly from counted
    examples.

    Args:
        count: Counts the operations of a schedule.
        tokens: Number of tokens that enter the first layer.
        protected: Number of them that never merge.
        num_layers: Number of layers.
    """

    def __init__(self, count: Callable[[Sequence[int]], int], tokens: int, protected: int, num_layers: int):
        self.tokens = tokens
        self.protected = protected
        most = max(1, (tokens - protected) // 2)
        few, many = max(1, most // (2 * num_layers)), max(2, most // num_layers)
        examples = [
            [0] * num_layers, [few] * num_layers, [many] * num_layers, [most] + [0] * (num_layers - 1),
            [0] * (num_layers - 1) + [most], [many, 0] * (num_layers // 2) + [0] * (num_layers % 2),
            [few] + [0] * (num_layers - 1), [0] * (num_layers - 1) + [few],
        ]  # fmt: skip
        terms = np.array([self._terms(example) for example in examples])
        counted = np.array([count(example) for example in examples], dtype=float)
        self.scale = np.abs(terms).max(axis=0).clip(min=1)
        self.factors, *_ = np.linalg.lstsq(terms / self.scale, counted, rcond=None)

    def __call__(self, schedule: Sequence[int]) -> float:
        """The operations of a schedule."""
        return float((self._terms(schedule) / self.scale) @ self.factors)

    def _terms(self, schedule: Sequence[int]) -> np.ndarray:
        tokens = self.tokens
        terms = np.array([1.0, 0, 0, 0, 0])
        for wanted in schedule:
            r = clamp_r(wanted, tokens, self.protected)
            free = tokens - self.protected
            pairs = (free // 2) * (free - free // 2) if r > 0 else 0
            terms += [0, tokens, tokens**2, tokens - r, pairs]
            tokens -= r
        return terms
