# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which degree to run the next batch at, from the length of the queue."""

import math
from collections.abc import Mapping

from tocom_hf.errors import ArgumentError


class DegreePolicy:
    """Holds a latency objective by merging more tokens while the queue is long, and no more than that.

    The queue drains in `queued / max_batch_size` batches, whose time at each degree is known. If that takes more than a
    share of the objective (`headroom`), the policy goes at once to the smallest degree that drains it in time.
    It goes back one degree at a time, after `patience` batches in a row for each of which the lower degree would have
    needed no more than a share (`calm`) of that limit. The gap between the two limits and the patience are the
    hysteresis: a queue of steady length does not make the degree flap. The policy knows no clock, threads or model.

    Args:
        batch_seconds: Seconds for a full batch by degree, as `calibrate` measures them.
        max_batch_size: Images in a full batch.
        objective: Seconds within which answers are wanted.
        headroom: Share of the objective that the queue may take to drain. The rest is for the batch that is running
            when a request arrives, and for what happens outside the model.
        calm: Share of that limit within which the queue must drain for a lower degree.
        patience: Batches in a row for which that must hold.

    Raises:
        ArgumentError: if one of them is out of range.
    """

    def __init__(
        self,
        batch_seconds: Mapping[int, float],
        max_batch_size: int,
        objective: float,
        headroom: float = 0.5,
        calm: float = 0.5,
        patience: int = 8,
    ):
        if not batch_seconds or min(batch_seconds.values()) <= 0:
            raise ArgumentError("batch_seconds needs a positive time for at least one degree.")
        if max_batch_size < 1 or patience < 1 or not objective > 0 or not 0 < headroom <= 1 or not 0 < calm < 1:
            raise ArgumentError(
                "Expected max_batch_size >= 1, patience >= 1, objective > 0, headroom in (0, 1] and calm in (0, 1)."
            )
        self.max_batch_size, self.patience = max_batch_size, patience
        self.limit, self.calm_limit = headroom * objective, calm * headroom * objective
        # a degree that is slower than a smaller one is worth nothing
        self.batch_seconds: dict[int, float] = {}
        for degree in sorted(batch_seconds):
            if all(batch_seconds[degree] < faster for faster in self.batch_seconds.values()):
                self.batch_seconds[degree] = batch_seconds[degree]
        self.degrees = list(self.batch_seconds)
        self.degree = self.degrees[0]
        self.pace = 1.0
        self._calm_batches = 0

    def choose(self, queued: int) -> int:
        """The degree for the next batch.

        Args:
            queued: Images that wait, those of the next batch included.
        """
        wanted = self._smallest_within(self.limit, queued)
        if wanted > self.degree:
            self.degree, self._calm_batches = wanted, 0
        elif self._smallest_within(self.calm_limit, queued) < self.degree:
            self._calm_batches += 1
            if self._calm_batches == self.patience:
                self.degree, self._calm_batches = self.degrees[self.degrees.index(self.degree) - 1], 0
        else:
            self._calm_batches = 0
        return self.degree

    def observe(self, degree: int, images: int, seconds: float) -> None:
        """Learn from a batch how fast the service runs in comparison to `batch_seconds`: `pace` is the ratio, smoothed.

        Batches that are less than half full are ignored: what they cost per image says little about full ones.
        """
        if 2 * images >= self.max_batch_size:
            ratio = seconds / (self.batch_seconds[degree] * images / self.max_batch_size)
            self.pace += 0.1 * (ratio - self.pace)

    def capacity(self) -> int:
        """How many queued images the largest degree can serve within the objective's headroom; one batch at least."""
        fastest = self.batch_seconds[self.degrees[-1]] * self.pace
        return self.max_batch_size * max(1, math.floor(self.limit / fastest))

    def drain_seconds(self, queued: int) -> float:
        """How long the largest degree needs for a queue of that many images."""
        batches = math.ceil(queued / self.max_batch_size)
        return batches * self.batch_seconds[self.degrees[-1]] * self.pace

    def _smallest_within(self, limit: float, queued: int) -> int:
        batches = queued / self.max_batch_size
        for degree, seconds in self.batch_seconds.items():
            if batches * seconds * self.pace <= limit:
                return degree
        return self.degrees[-1]
