# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""One loaded model with its own policy, and the requests that wait for it. Knows nothing of Ray.

An engine never changes what it serves. Another plugin set, checkpoint or objective is another engine, and a request
stays with the engine that prepared its images, so that no answer is half of one and half of the other.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tocom_hf.errors import UnsupportedInputError
from tocom_hf.serving.backends import load_backend
from tocom_hf.serving.policy import DegreePolicy
from tocom_hf.serving.settings import ModelSettings


class Engine:
    """A model, its settings and its policy.

    Args:
        settings: What to serve.
        cache_file: Where to keep the measured speed of the degrees, for the next engine of the same shape.

    Raises:
        TocomError: if the model cannot be loaded, or cannot run at the wanted degrees.
    """

    def __init__(self, settings: ModelSettings, cache_file: Path):
        self.settings = settings
        self.backend = load_backend(settings)
        seconds = self.backend.measure(settings.max_batch_size, settings.calibration_seconds, cache_file)
        self.policy = DegreePolicy(seconds, settings.max_batch_size, settings.latency_ms / 1e3)

    def room(self) -> int:
        """Images that may wait."""
        return self.policy.capacity() if self.settings.max_queue is None else self.settings.max_queue

    def prepare(self, images: list[Image.Image]) -> np.ndarray:
        """The input for the images of a request, float32 `(images, channels, height, width)`.

        Raises:
            UnsupportedInputError: if they cannot be prepared: of several sizes, for a processor that does not resize.
        """
        try:
            return self.backend.prepare(images)
        except ValueError as error:
            raise UnsupportedInputError(f"The images cannot be prepared for the model: {error}") from error

    def run(self, inputs: Sequence[np.ndarray], degree: int) -> list[list[dict[str, Any]]]:
        """The labels and scores of the images of a batch, at a degree.

        Args:
            inputs: Of each request, float32 `(images, channels, height, width)`, all of one size.
            degree: One of the backend's.

        Raises:
            UnsupportedInputError: if the model does not take inputs of this size.
        """
        predictions = self.backend.classify(np.concatenate(inputs), degree, self.settings.top_k)
        return [[{"label": row.label, "score": round(row.score, 4)} for row in ranks] for ranks in predictions]


@dataclass(eq=False)
class Job:
    """The images of one request, prepared for an engine, and its answer once there is one."""

    engine: Engine
    pixel_values: np.ndarray
    arrived: float = field(default_factory=time.perf_counter)
    answer: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.pixel_values)


def batches_of(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Neighbours that may run as one batch: of one engine and one size, and no more images than a batch takes.

    A single job is never split, so the first of a batch may be larger than the limit alone.
    """
    for _, alike in itertools.groupby(jobs, lambda job: (id(job.engine), job.pixel_values.shape[1:])):
        batch: list[Job] = []
        for job in alike:
            if batch and sum(map(len, batch)) + len(job) > job.engine.settings.max_batch_size:
                yield batch
                batch = []
            batch.append(job)
        yield batch
