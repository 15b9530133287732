# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A queue in front of one model: requests that arrive while it is busy form the next batch."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.serving.policy import DegreePolicy


LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """What `/metrics` shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        where: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("tocom_requests", "Answered requests by status code", ["status"], **where)
        self.latency = Histogram(
            "tocom_request_seconds", "Time to an answer with status 200", buckets=LATENCY_BUCKETS, **where
        )
        self.images = Counter("tocom_images", "Classified images by degree", ["target_r"], **where)
        self.batches = Histogram("tocom_batch_images", "Images in a batch", buckets=[2**i for i in range(9)], **where)
        self.switches = Counter("tocom_switches", "Changes of the degree", **where)
        self.queued = Gauge("tocom_queued_images", "Images that wait", **where)
        self.degree = Gauge("tocom_target_r", "Degree of the last batch", **where)


@dataclass(eq=False)
class Job:
    """The images of one request, float32 `(n, channels, height, width)`, and where their answer goes."""

    pixel_values: torch.Tensor
    answer: asyncio.Future
    arrived: float = field(default_factory=time.perf_counter)


class OverloadedError(Exception):
    """The queue is full: more requests could not be answered in time.

    Attributes:
        retry_after: Whole seconds after which the queue has drained.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Batcher:
    """Runs the model in one thread, a batch at a time, on whatever has arrived meanwhile.

    Args:
        model: The model, on its device.
        policy: Picks the degree of every batch.
        max_queue: Images that may wait; by default what the policy says can be served in time.
        metrics: Where to count.
    """

    def __init__(self, model: TocomModel, policy: DegreePolicy, max_queue: int | None, metrics: Metrics):
        self.model, self.policy = model, policy
        self.max_queue, self.metrics = max_queue, metrics
        self.jobs: deque[Job] = deque()
        self.queued = 0
        self.preparing = 0
        self.running = False
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def require_room(self, count: int) -> None:
        """Raise `OverloadedError` unless `count` more images may wait. An empty queue takes any request."""
        room = self.policy.capacity() if self.max_queue is None else self.max_queue
        waiting = self.queued + self.preparing
        if waiting and waiting + count > room:
            raise OverloadedError(
                f"{waiting} images wait already, {room} are the limit. Try again later.", self.retry_after()
            )

    def retry_after(self) -> int:
        """Whole seconds after which what waits has been served, one at least."""
        return max(1, math.ceil(self.policy.drain_seconds(self.queued + self.preparing)))

    @contextlib.contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Hold places in the queue while images are prepared, so that nobody is refused after that work.

        Raises:
            OverloadedError: if the queue is full.
        """
        self.require_room(count)
        self.preparing += count
        try:
            yield
        finally:
            self.preparing -= count

    async def classify(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Wait in the queue and return the answer. Whoever is cancelled meanwhile leaves the queue."""
        job = Job(pixel_values, asyncio.get_running_loop().create_future())
        self.jobs.append(job)
        self._count(len(pixel_values))
        self._arrival.set()
        try:
            return await job.answer
        except asyncio.CancelledError:
            if job in self.jobs:
                self.jobs.remove(job)
                self._count(-len(pixel_values))
            raise

    async def run(self) -> None:
        """Serve batches until cancelled. A batch that runs then goes on in its thread: see `running`."""
        try:
            while True:
                await self._arrival.wait()
                self._arrival.clear()
                while self.jobs:
                    await self._serve_batch()
        finally:
            for job in self.jobs:
                job.answer.cancel()
            self._thread.shutdown(wait=False)

    async def _serve_batch(self) -> None:
        degree, jobs = self.policy.choose(self.queued), [self.jobs.popleft()]
        shape, size = jobs[0].pixel_values.shape[1:], len(jobs[0].pixel_values)
        while (
            self.jobs
            and self.jobs[0].pixel_values.shape[1:] == shape
            and size + len(self.jobs[0].pixel_values) <= self.policy.max_batch_size
        ):
            jobs.append(self.jobs.popleft())
            size += len(jobs[-1].pixel_values)
        self._count(-size)
        pixel_values = torch.cat([job.pixel_values for job in jobs])
        start = time.perf_counter()
        try:
            scores = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, pixel_values, degree)
        except Exception as error:
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        seconds = time.perf_counter() - start
        self.policy.observe(degree, size, seconds)
        self.metrics.batches.observe(size)
        self.metrics.images.labels(degree).inc(size)
        self.metrics.degree.set(degree)
        for job in jobs:
            own, scores = scores[: len(job.pixel_values)], scores[len(job.pixel_values) :]
            if not job.answer.done():  # the client may have gone
                waited = start - job.arrived
                job.answer.set_result({"scores": own, "target_r": degree, "waited": waited, "computed": seconds})

    def _run(self, pixel_values: torch.Tensor, degree: int) -> list[list[float]]:
        self.running = True
        try:
            return self._forward(pixel_values, degree)
        finally:
            self.running = False

    @torch.inference_mode()
    def _forward(self, pixel_values: torch.Tensor, degree: int) -> list[list[float]]:
        if degree != self.model.target_r:
            self.model.set_target_r(degree)
            self.metrics.switches.inc()
        logits = self.model(pixel_values=pixel_values.to(self.model.device, self.model.dtype)).logits
        return logits.float().softmax(-1).tolist()

    def _count(self, change: int) -> None:
        self.queued += change
        self.metrics.queued.set(self.queued)
