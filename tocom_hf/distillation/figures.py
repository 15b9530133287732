# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a distillation tells about itself on the way."""

from collections import defaultdict
from collections.abc import Iterable


_BUCKETS = 4  # of |m - n|


def losses_by_distance(losses: Iterable[tuple[int, float]], max_r: int) -> dict[str, float]:
    """Mean losses by the distance |m - n| of the degrees of teacher and student.

    Args:
        losses: Distance and loss of each step.
        max_r: The largest distance.

    Returns:
        Means by ranges of distances, such as "1-2"; without ranges that no step had.
    """
    buckets = defaultdict(list)
    for distance, loss in losses:
        buckets[(distance - 1) * _BUCKETS // max_r].append(loss)
    figures = {}
    for bucket in sorted(buckets):
        inside = [d for d in range(1, max_r + 1) if (d - 1) * _BUCKETS // max_r == bucket]
        figures["-".join(map(str, dict.fromkeys((inside[0], inside[-1]))))] = mean_or_zero(buckets[bucket])
    return figures


def mean_or_zero(values: Iterable[float]) -> float:
    """The mean; zero of no values."""
    values = list(values)
    return sum(values) / max(len(values), 1)
