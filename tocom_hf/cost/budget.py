# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A wanted cost, as an argument of `TocomModel.from_pretrained`, and the smallest degree that meets it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from tocom_hf.errors import BudgetError


# the field of `DegreeCost`, whether more of it is better, and its unit
_BUDGETS = {
    "target_speedup": ("speedup", True, "x"),
    "target_latency_ms": ("latency_ms", False, " ms"),
    "target_gflops": ("gflops", False, " GFLOPs"),
}


@dataclass(frozen=True)
class Budget:
    """One wanted cost: its name as an argument, and its value."""

    name: str
    value: float

    @classmethod
    def of(
        cls, target_speedup: float | None, target_latency_ms: float | None, target_gflops: float | None
    ) -> "Budget | None":
        """The one that is given, or `None`.

        Raises:
            BudgetError: if several are, or if it is not a positive number.
        """
        values = dict(zip(_BUDGETS, (target_speedup, target_latency_ms, target_gflops), strict=True))
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) > 1:
            raise BudgetError(f"Give one budget, not {' and '.join(given)}: they may contradict each other.")
        for name, value in given.items():  # one at most
            if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value > 0):
                raise BudgetError(f"{name} must be a positive number, got {value!r}.")
            return cls(name, float(value))
        return None

    @property
    def field(self) -> str:
        """The field of `DegreeCost` that it limits."""
        return _BUDGETS[self.name][0]

    def choose(self, figures: Mapping[int, float], circumstances: str) -> int:
        """The smallest degree whose figure is within the budget; `figures` holds one for each degree."""
        _, more_is_better, unit = _BUDGETS[self.name]
        meets = self.value.__le__ if more_is_better else self.value.__ge__
        within = [degree for degree, figure in figures.items() if meets(figure)]
        if within:
            return min(within)
        if not figures:
            raise BudgetError("None of the degrees in question was measured. Calibrate with degrees=...")
        best = (max if more_is_better else min)(figures, key=figures.__getitem__)
        raise BudgetError(
            f"{self.name}={self.value:g} cannot be reached: the best figure is {figures[best]:.4g}{unit} at "
            f"target_r={best} ({circumstances}; degrees {min(figures)} to {max(figures)}). Ask for less, use a plugin "
            "set with a larger max_r, or pass calibration=calibrate(model, image_size, batch_size, device) for the "
            "conditions that the model will run under."
        )
