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
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from tocom_hf.deployed.scores import best_classes, kind_of_scores
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.serving.policy import DegreePolicy
from tocom_hf.serving.preparing import Preparation


LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


# Clients that were answered together ask again at about the same time. Without a wait, the first of them would get a
# batch of its own, which takes a small model nearly as long as a full one, and all others would wait for that. So the
# next batch begins when as many images are there as the last one had, or after this share of the time that it took, and
# no later than after some time in which a large model could not have done much.
_WAVE_SHARE, _WAVE_SECONDS = 0.5, 0.02


class Metrics:
    """What `/metrics` shows, in a registry of its own.

    Args:
        shared: Show the figures of all processes that were started within `shared_metrics`, of which this is one.
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.registry = CollectorRegistry()
        where: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("tocom_requests", "Answered requests by status code", ["status"], **where)
        self.answered = self.requests.labels(200)
        self.latency = Histogram(
            "tocom_request_seconds", "Time to an answer with status 200", buckets=LATENCY_BUCKETS, **where
        )
        self.images = Counter("tocom_images", "Classified images by degree", ["target_r"], **where)
        self.batches = Histogram("tocom_batch_images", "Images in a batch", buckets=[2**i for i in range(9)], **where)
        self.switches = Counter("tocom_switches", "Changes of the degree", **where)
        self.queued = Gauge("tocom_queued_images", "Images that wait", multiprocess_mode="livesum", **where)
        self.degree = Gauge("tocom_target_r", "Degree of the last batch", multiprocess_mode="livemostrecent", **where)

    def show(self) -> bytes:
        """All figures in the text format of Prometheus."""
        if not self.shared:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


@dataclass
class Answer:
    """What the model says about the images of one request.

    Attributes:
        best: For each image the classes with the highest scores, and these: `(index, score)`, the best first.
        target_r: The degree that they were computed at.
        waited: Seconds in the queue.
        computed: Seconds that the batch took.
    """

    best: list[list[tuple[int, float]]]
    target_r: int
    waited: float
    computed: float


@dataclass(eq=False)
class Job:
    """The images of one request, `(n, channels, height, width)`, prepared, and where their answer goes."""

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
        preparation: Has prepared the images, and finishes a batch of them.
        top_k: Classes in an answer.
    """

    def __init__(
        self,
        model: TocomModel,
        policy: DegreePolicy,
        max_queue: int | None,
        metrics: Metrics,
        preparation: Preparation,
        top_k: int,
    ):
        self.model, self.policy, self.preparation, self.top_k = model, policy, preparation, top_k
        self.max_queue, self.metrics = max_queue, metrics
        self.jobs: deque[Job] = deque()
        self.queued = 0
        self.preparing = 0
        self.running = False
        self._arrival, self._wanted = asyncio.Event(), 1
        self._wave, self._wave_end = 1, 0.0
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

    async def classify(self, pixel_values: torch.Tensor) -> Answer:
        """Wait in the queue and return the answer. Whoever is cancelled meanwhile leaves the queue."""
        job = Job(pixel_values, asyncio.get_running_loop().create_future())
        self.jobs.append(job)
        self._count(len(pixel_values))
        if self.queued >= self._wanted:
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
                await self._wait_for(1, None)
                await self._wait_for(self._wave, self._wave_end)
                if self.jobs:  # clients may have gone meanwhile
                    await self._serve_batch()
        finally:
            for job in self.jobs:
                job.answer.cancel()
            self._thread.shutdown(wait=False)

    async def _wait_for(self, images: int, until: float | None) -> None:
        """Wait until so many images are there, or the clock of the event loop has come to a time."""
        self._wanted = images
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while self.queued < images:
                    self._arrival.clear()
                    await self._arrival.wait()
        self._wanted = 1

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
            best = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, pixel_values, degree)
        except Exception as error:
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        seconds = time.perf_counter() - start
        patience = min(_WAVE_SHARE * seconds, _WAVE_SECONDS)
        self._wave, self._wave_end = size, asyncio.get_running_loop().time() + patience
        self.policy.observe(degree, size, seconds)
        self.metrics.batches.observe(size)
        self.metrics.images.labels(degree).inc(size)
        self.metrics.degree.set(degree)
        for job in jobs:
            own, best = best[: len(job.pixel_values)], best[len(job.pixel_values) :]
            if not job.answer.done():  # the client may have gone
                job.answer.set_result(Answer(own, degree, start - job.arrived, seconds))

    def _run(self, pixel_values: torch.Tensor, degree: int) -> list[list[tuple[int, float]]]:
        self.running = True
        try:
            return self._forward(pixel_values, degree)
        finally:
            self.running = False

    @torch.inference_mode()
    def _forward(self, pixel_values: torch.Tensor, degree: int) -> list[list[tuple[int, float]]]:
        if degree != self.model.target_r:
            self.model.set_target_r(degree)
            self.metrics.switches.inc()
        pixel_values = self.preparation.finish(pixel_values, self.model.device, self.model.dtype)
        logits = self.model(pixel_values=pixel_values).logits.float().cpu().numpy()
        kind = kind_of_scores(self.model.config.problem_type, logits.shape[1])
        return best_classes(logits, kind, self.top_k)

    def _count(self, change: int) -> None:
        self.queued += change
        self.metrics.queued.set(self.queued)
