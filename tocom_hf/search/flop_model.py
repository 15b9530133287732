# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The FLOPs of any recipe and schedule from those of a few, because a search asks for thousands."""

from collections.abc import Callable, Sequence

import numpy as np

from tocom_hf.merging.recipes import MergeRecipe
from tocom_hf.merging.schedule import clamp_r


class FlopModel:
    """Floating-point operations of a forward pass as a function of recipe and schedule.

    They are a sum over layers of terms in the tokens that enter a layer, their square (attention), the tokens that
    leave it (MLP), and, where tokens merge, in the pairs that are compared, for each `match_by`, and in the tokens that
    the class token looks at. Their factors follow exactly from counted examples.

    Args:
        count: Counts the operations of a recipe and a schedule.
        match_by: All that recipes may match by.
        reads_attention: Whether recipes may have an `attention_penalty`.
        tokens: Number of tokens that enter the first layer.
        protected: Number of them that never merge.
        num_layers: Number of layers.
    """

    def __init__(
        self,
        count: Callable[[MergeRecipe, Sequence[int]], int],
        match_by: Sequence[str],
        reads_attention: bool,
        tokens: int,
        protected: int,
        num_layers: int,
    ):
        self.tokens = tokens
        self.protected = protected
        self.column = {name: 4 + number for number, name in enumerate(dict.fromkeys(match_by))}
        most = max(1, (tokens - protected) // 2)
        few, many = max(1, most // (2 * num_layers)), max(2, most // num_layers)
        schedules = [
            [0] * num_layers, [few] * num_layers, [many] * num_layers, [most] + [0] * (num_layers - 1),
            [0] * (num_layers - 1) + [most], [many, 0] * (num_layers // 2) + [0] * (num_layers % 2),
            [few] + [0] * (num_layers - 1), [0] * (num_layers - 1) + [few],
        ]  # fmt: skip
        first, *others = (MergeRecipe(match_by=name) for name in self.column)
        examples = [(first, schedule) for schedule in schedules]
        examples += [(recipe, schedules[2]) for recipe in others]
        if reads_attention:
            examples.append((MergeRecipe(first.match_by, attention_penalty=1.0), schedules[2]))
        terms = np.array([self._terms(*example) for example in examples])
        counted = np.array([count(*example) for example in examples], dtype=float)
        self.scale = np.abs(terms).max(axis=0).clip(min=1)
        self.factors, *_ = np.linalg.lstsq(terms / self.scale, counted, rcond=None)

    def __call__(self, recipe: MergeRecipe, schedule: Sequence[int]) -> float:
        """The operations of a recipe and a schedule, whatever schedules the recipe has."""
        return float((self._terms(recipe, schedule) / self.scale) @ self.factors)

    def _terms(self, recipe: MergeRecipe, schedule: Sequence[int]) -> np.ndarray:
        tokens = self.tokens
        terms = np.zeros(5 + len(self.column))
        terms[0] = 1
        for layer, wanted in enumerate(schedule):
            r = clamp_r(wanted, tokens, self.protected)
            terms[1:4] += [tokens, tokens**2, tokens - r]
            if r > 0:
                rule = recipe.rule(layer)
                free = tokens - self.protected
                terms[self.column[rule.match_by]] += (free // 2) * (free - free // 2)
                terms[-1] += tokens * (rule.attention_penalty != 0)
            tokens -= r
        return terms
