# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a degree costs: the one record of it, and the one stopwatch."""

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers.utils import logging

from tocom_hf.cost.flops import Example
from tocom_hf.devices import synchronize
from tocom_hf.merging.patching import merging_at


@dataclass(frozen=True)
class DegreeCost:
    """What one degree costs. One row of a `Calibration`.

    Attributes:
        target_r: Tokens merged per layer.
        tokens: Tokens after each layer; the first entry is what enters the first layer.
        gflops: 10^9 floating-point operations per image as `torch.utils.flop_counter` counts them: a multiply-add is
            two. Papers that count multiply-adds report half.
        latency_ms: Milliseconds for one batch, the median over rounds; NaN where no time was measured.
        images_per_second: Batch size over latency.
        speedup: Over degree 0, the median of the ratios within each round.
        rounds: How often it was timed.

    Example:

    ```python
    >>> from tocom_hf import DegreeCost
    >>> cost = DegreeCost(8, (50, 42, 34), gflops=1.5, latency_ms=20.0, images_per_second=400.0, speedup=1.6)
    >>> cost.tokens[-1]
    34

    ```
    """

    target_r: int
    tokens: tuple[int, ...]
    gflops: float
    latency_ms: float = math.nan
    images_per_second: float = math.nan
    speedup: float = math.nan
    rounds: int = 0

    @property
    def timed(self) -> bool:
        """Whether time was measured, not only operations counted."""
        return not math.isnan(self.images_per_second)


def measure_costs(
    example: Example, degrees: Iterable[int], *, rounds: int = 1, seconds: float = 0.0, progress: bool = False
) -> list[DegreeCost]:
    """Count and time a forward pass at several degrees, with the weights as they are: compensation costs nothing.

    Args:
        example: The batch to run; the model must be in evaluation mode.
        degrees: What to measure. Degree 0, which speed-ups are relative to, is timed in any case.
        rounds, seconds, progress: As in `time_degrees`; no time is measured where `rounds` is 0.

    Returns:
        One record for each degree.
    """
    degrees = list(degrees)
    times: dict[int, list[float]] = {}
    if rounds:
        times = time_degrees(example, sorted({0, *degrees}), rounds=rounds, seconds=seconds, progress=progress)
    costs = []
    for degree in degrees:
        counted = example.count_at(degree)
        gflops = counted.flops / 1e9
        if not times:
            costs.append(DegreeCost(degree, counted.tokens, gflops))
            continue
        median = statistics.median(times[degree])
        ratios = [dense / own for dense, own in zip(times[0], times[degree], strict=True)]
        costs.append(
            DegreeCost(
                degree,
                counted.tokens,
                gflops,
                latency_ms=1e3 * median,
                images_per_second=len(example.batch) / median,
                speedup=statistics.median(ratios),
                rounds=len(ratios),
            )
        )
    return costs


@torch.no_grad()
def time_degrees(
    example: Example, degrees: Sequence[int], *, rounds: int = 1, seconds: float = 0.0, progress: bool = False
) -> dict[int, list[float]]:
    """Seconds of one forward pass at several degrees.

    The degrees take turns, so that a change of the machine's speed hits all alike.

    Args:
        example: The batch to run.
        degrees: The degrees.
        rounds: Measure each of them at least so often, after one round to warm up.
        seconds: And go on for at least so long.
        progress: Whether to show a progress bar.

    Returns:
        A list for each degree, with one entry for each round.
    """
    times: dict[int, list[float]] = {degree: [] for degree in degrees}
    for degree in degrees:
        _time_once(example, degree)
    bar = logging.tqdm(
        total=100,
        desc=f"measuring {len(degrees)} degrees",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
        disable=not progress,
    )
    with bar:
        start = time.perf_counter()
        done = 0
        shown = 0
        elapsed = 0.0
        while done < rounds or elapsed < seconds:
            for degree in degrees:
                times[degree].append(_time_once(example, degree))
            done += 1
            elapsed = time.perf_counter() - start
            share = min(done / rounds, elapsed / seconds if seconds > 0 else 1.0, 1.0)
            percent = math.floor(100 * share)
            bar.update(percent - shown)
            shown = percent
    return times


def _time_once(example: Example, degree: int) -> float:
    """Seconds of one forward pass."""
    device = example.batch.device
    with merging_at(example.backbone, degree):
        synchronize(device)
        start = time.perf_counter()
        example.run()
        synchronize(device)
        return time.perf_counter() - start
