# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a distillation tells about itself on the way, and at the end."""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


_BUCKETS = 4  # of |m - n|
_RECENT = 200  # steps that the figures on the way are means of


@dataclass
class Figures:
    """Counts and losses of a run so far. A checkpoint holds them too.

    Attributes:
        skipped: Steps that changed nothing, because their loss was not finite.
        damaged: How often a damaged image was passed over, on all processes.
        loss_sum, loss_count: Of the steps that did.
        recent: Distance |m - n| and loss of the last of them.
    """

    skipped: int = 0
    damaged: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, distance: int, loss: float) -> None:
        """Count a step, of degrees so far apart."""
        self.recent.append((distance, loss))
        self.loss_sum += loss
        self.loss_count += 1

    @property
    def mean_loss(self) -> float:
        """Over all steps; 0 before the first."""
        return self.loss_sum / max(self.loss_count, 1)

    @property
    def recent_loss(self) -> float:
        """Over the last steps; 0 before the first."""
        return _mean_or_zero(loss for _, loss in self.recent)

    def by_distance(self, max_r: int) -> dict[str, float]:
        """Mean losses of the last steps by the distance of the degrees of teacher and student.

        Args:
            max_r: The largest distance.

        Returns:
            Means by ranges of distances, such as "1-2"; without ranges that no step had.
        """
        buckets = defaultdict(list)
        for distance, loss in self.recent:
            buckets[(distance - 1) * _BUCKETS // max_r].append(loss)
        means = {}
        for bucket in sorted(buckets):
            inside = [d for d in range(1, max_r + 1) if (d - 1) * _BUCKETS // max_r == bucket]
            means["-".join(map(str, dict.fromkeys((inside[0], inside[-1]))))] = _mean_or_zero(buckets[bucket])
        return means

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary that JSON can hold."""
        return {
            "skipped": self.skipped,
            "damaged": self.damaged,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "recent": list(self.recent),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Figures":
        """What `to_dict` returned; other keys are left alone."""
        figures = cls(
            skipped=content["skipped"],
            damaged=content.get("damaged", 0),  # older checkpoints lack it
            loss_sum=content["loss_sum"],
            loss_count=content["loss_count"],
        )
        figures.recent.extend((distance, loss) for distance, loss in content["recent"])
        return figures


def _mean_or_zero(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(len(values), 1)
