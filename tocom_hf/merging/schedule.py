# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Merging degrees: what a user may ask for as `r`, spelt out as one number for every layer (ToMe, appendix D)."""

import math
import operator

from tocom_hf.errors import DegreeError


Schedule = int | list[int] | tuple[int, float]
"""A merging degree: the same for all layers, one for each, or `(r, inflection)`."""


def resolve_schedule(r: Schedule, num_layers: int) -> tuple[int, ...]:
    """Spell a merging degree out as one non-negative integer per layer (ToMe, section 4.1 and appendix D).

    Args:
        r: An int (the same in every layer), a list with one int per layer, or a tuple `(r, inflection)` with
            inflection in [-1, 1]: the degree then changes linearly over the layers around the mean `r`, from `2 r` to 0
            at -1 (merge early) and from 0 to `2 r` at 1 (merge late).
        num_layers: Number of transformer layers.

    Returns:
        A tuple of `num_layers` ints. They may exceed what a layer can merge: that is clamped when the layer runs.

    Raises:
        DegreeError: for a negative or non-integer degree, a wrong length, or an inflection outside [-1, 1].
    """
    inflection = 0.0
    if isinstance(r, list):
        if len(r) != num_layers:
            raise DegreeError(f"A list r needs one degree per layer: expected {num_layers}, got {len(r)}.")
        return tuple(require_degree(value, f"r[{layer}]") for layer, value in enumerate(r))
    degree: object = r
    if isinstance(r, tuple):
        if len(r) != 2 or isinstance(r[1], bool) or not isinstance(r[1], int | float) or not -1 <= r[1] <= 1:
            raise DegreeError(
                f"A tuple r must be (r, inflection) with inflection in [-1, 1], got {r!r}. "
                "Pass a list to set the degree of every layer."
            )
        degree, inflection = r[0], float(r[1])
    mean = require_degree(degree, "r")
    first = int(mean * (1.0 - inflection))
    step = 2 * (mean - first) / max(num_layers - 1, 1)
    return tuple(math.floor(first + step * layer + 1e-9) for layer in range(num_layers))


def require_degree(value: object, name: str) -> int:
    """Return `value` as an int if it is a non-negative integer, else raise `DegreeError` that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        degree = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        message = f"{name} must be a non-negative integer, got {value!r} ({type(value).__name__})."
        raise DegreeError(message) from None
    if degree < 0:
        raise DegreeError(f"{name} must be a non-negative integer, got {degree}.")
    return degree


def clamp_r(r: int, tokens: int, protected: int) -> int:
    """How many of `tokens` one layer can merge at most when asked for `r`: half of those that are not protected."""
    return max(0, min(r, (tokens - protected) // 2))


def tokens_per_layer(r: Schedule, num_layers: int, tokens: int, protected: int) -> list[int]:
    """Token counts after each layer, starting from `tokens` at the input: `num_layers` ints."""
    counts = []
    for degree in resolve_schedule(r, num_layers):
        tokens -= clamp_r(degree, tokens, protected)
        counts.append(tokens)
    return counts
