# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The two deployments of the service on Ray Serve: gateways that speak HTTP, and replicas of the classifier.

They are apart so that a replica may die without a request being lost: the gateway still holds the request, and hands it
to another replica. Classifying changes nothing, so that once more is as good as once.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.metrics import Counter, Gauge, Histogram

from tocom_hf.errors import TocomError, UnsupportedInputError
from tocom_hf.serving.engine import Engine, Job, batches_of
from tocom_hf.serving.requests import decode_all, read_body
from tocom_hf.serving.settings import ModelSettings, parse


# it goes to the log of the replica
logger = logging.getLogger("ray.serve")
LATENCY_BUCKETS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0]
Answer = dict[str, Any]
"""What a replica answers a gateway: a status of HTTP, and a content for JSON."""


class ReplicaMetrics:
    """What a replica counts. Ray adds the labels `application`, `deployment` and `replica`."""

    def __init__(self) -> None:
        self.images = Counter("tocom_images", "Classified images by degree", tag_keys=("degree",))
        self.seconds = Histogram(
            "tocom_batch_seconds", "Time of a batch by degree", boundaries=LATENCY_BUCKETS, tag_keys=("degree",)
        )
        self.switches = Counter("tocom_switches", "Changes of the degree")
        self.degree = Gauge("tocom_degree", "Degree of the last batch")
        self.queued = Gauge("tocom_queued_images", "Images that wait")
        self.failed_updates = Counter("tocom_failed_updates", "Updates that could not be loaded")
        self.last_degree: int | None = None

    def ran(self, degree: int, images: int, seconds: float) -> None:
        """Count a batch."""
        labels = {"degree": str(degree)}
        self.images.inc(images, tags=labels)
        self.seconds.observe(seconds, tags=labels)
        self.degree.set(degree)
        if self.last_degree not in (None, degree):
            self.switches.inc()
        self.last_degree = degree


class Classifier:
    """A replica: one model, its queue, and the policy that follows this queue.

    Args:
        settings: The fields of `ModelSettings`. Ray's `user_config` replaces some of them, also while it serves.
    """

    # a device in an error state fails every batch, and a call that hangs never returns: Ray then starts another replica
    failures_until_unhealthy, seconds_until_unhealthy = 3, 60.0

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = parse(ModelSettings, settings)
        self._engine: Engine | None = None
        # in the order of arrival; the values mean nothing
        self._waiting: dict[Job, None] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._folder = tempfile.TemporaryDirectory(prefix="tocom-replica-")
        self._loading = asyncio.Lock()
        self._update: asyncio.Task | None = None
        self._failed_update: str | None = None
        self._running_since: float | None = None
        self._failures = 0
        self._metrics = ReplicaMetrics()

    async def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """Serve what the settings and `user_config` name.

        Ray calls this before a replica serves, and when `user_config` has changed. A replica that serves returns at
        once, because Ray sends it no requests while it waits, and would stop it for an error: it loads what is new
        beside what serves, and what cannot be loaded is left, logged and counted.

        Raises:
            TocomError: if it cannot be loaded, and nothing serves so far.
        """
        if self._engine is None:
            await self._load(user_config)
        else:
            self._update = asyncio.create_task(self._load_or_stay(user_config))

    def check_health(self) -> None:
        """Raise if batches fail one after the other, or one has hung."""
        if self._failures >= self.failures_until_unhealthy:
            raise RuntimeError(f"The last {self._failures} batches failed.")
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        if running > self.seconds_until_unhealthy:
            raise RuntimeError(f"A batch has been running for {running:.0f} s.")

    def describe(self) -> dict[str, Any]:
        """What this replica serves, and whether an update is under way or has failed."""
        assert self._engine is not None
        return {
            "target_r": self._engine.policy.degree,
            "model_name_or_path": self._engine.settings.model_name_or_path,
            "plugins": self._engine.settings.plugins,
            "degrees": self._engine.policy.degrees,
            "updating": self._update is not None and not self._update.done(),
            "failed_update": self._failed_update,
        }

    async def predict(self, body: bytes, content_type: str) -> Answer:
        """Answer the body of a request."""
        engine = self._engine
        assert engine is not None
        try:
            self._require_room(engine, 1)
            # large images take a while: other requests go on meanwhile
            limit, num_channels = engine.settings.max_batch_size, engine.backend.num_channels
            images = await asyncio.to_thread(decode_all, body, content_type, limit, num_channels)
            job = Job(engine, await asyncio.to_thread(engine.prepare, images))
            self._require_room(engine, len(job))
        except HTTPException as error:
            return refusal(error.status_code, error.detail)
        except UnsupportedInputError as error:
            return refusal(400, str(error))
        self._waiting[job] = None
        try:
            return await self._take_turn(job)
        finally:
            self._waiting.pop(job, None)  # the client may have gone before it ran

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0)
    async def _take_turn(self, jobs: list[Job]) -> list[Answer]:
        """Run batches until these jobs are answered. Ray lets one call at a time do this, in the order of arrival.

        Ray gathers the jobs of a call when the first of them comes, and no longer than `batch_wait_timeout_s`, also
        while an earlier call still runs. What has come by the time that the model is free is known only here.
        """
        while any(job.answer is None and job in self._waiting for job in jobs):
            await self._run_batch(next(batches_of(self._waiting)))
        return [job.answer or refusal(500, "The request was given up.") for job in jobs]

    async def _run_batch(self, batch: list[Job]) -> None:
        """Answer jobs of one engine and one size, at the degree that its policy picks now."""
        engine = batch[0].engine
        degree = engine.policy.choose(self._images_waiting)
        for job in batch:
            del self._waiting[job]
        self._metrics.queued.set(self._images_waiting)
        start = self._running_since = time.perf_counter()
        inputs = [job.pixel_values for job in batch]
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._thread, engine.run, inputs, degree)
        except Exception as error:
            refused = isinstance(error, UnsupportedInputError)
            self._failures += not refused
            for job in batch:
                job.answer = refusal(400 if refused else 500, f"{type(error).__name__}: {error}")
            return
        finally:
            self._running_since = None
        seconds, self._failures = time.perf_counter() - start, 0
        engine.policy.observe(degree, len(rows), seconds)
        self._metrics.ran(degree, len(rows), seconds)
        for job in batch:
            own, rows = rows[: len(job)], rows[len(job) :]
            content = {
                "predictions": own,
                "target_r": degree,
                "waited_ms": round(1e3 * (start - job.arrived), 2),
                "computed_ms": round(1e3 * seconds, 2),
            }
            job.answer = {"status": 200, "content": content}

    @property
    def _images_waiting(self) -> int:
        return sum(map(len, self._waiting))

    def _require_room(self, engine: Engine, count: int) -> None:
        """Refuse with 503 unless `count` more images may wait. An empty queue takes any request."""
        queued = self._images_waiting
        if queued and queued + count > engine.room():
            raise HTTPException(503, f"{queued} images wait already, {engine.room()} are the limit. Try again later.")

    async def _load(self, user_config: Mapping[str, Any] | None) -> None:
        async with self._loading:
            settings = self._settings.changed_by(user_config)
            if self._engine is not None and self._engine.settings == settings:
                return
            engine = await asyncio.to_thread(Engine, settings, Path(self._folder.name, "calibration.json"))
            # Requests that come from now on are prepared for the new one. Those that wait or run keep theirs.
            self._engine = engine
            self._take_turn.set_max_batch_size(settings.max_batch_size)
            self._take_turn.set_batch_wait_timeout_s(settings.batch_wait_ms / 1e3)

    async def _load_or_stay(self, user_config: Mapping[str, Any] | None) -> None:
        try:
            await self._load(user_config)
            self._failed_update = None
        except Exception as error:
            self._failed_update = f"{type(error).__name__}: {error}"
            self._metrics.failed_updates.inc()
            logger.error(f"The update {user_config} cannot be loaded, and what serves goes on. {self._failed_update}")


def refusal(status: int, message: str) -> Answer:
    """What a replica answers where it does not classify."""
    return {"status": status, "content": {"error": message}}


class Gateway:
    """Reads requests, hands them to a replica, and once more to another one where a replica dies with them.

    Args:
        classifier: The handle of the replicas.
    """

    attempts, seconds_between = 6, 0.1

    def __init__(self, classifier: Any):
        self._classifier = classifier
        self._requests = Counter("tocom_requests", "Answered requests by status code", tag_keys=("status",))
        self._seconds = Histogram(
            "tocom_request_seconds", "Time to an answer with status 200", boundaries=LATENCY_BUCKETS
        )
        self._repeated = Counter("tocom_repeated_requests", "Requests whose replica died, and that another one got")

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray sends requests to. It asks for it once, when the gateway has started."""
        http = FastAPI(title="tocom_hf")
        http.add_api_route("/predict", self.predict, methods=["POST"])
        http.add_api_route("/healthz", self.health, methods=["GET"])
        return http

    async def predict(self, request: Request) -> Response:
        start = time.perf_counter()
        try:
            body = await read_body(request)
            answer = await self._ask(body, request.headers.get("content-type", ""))
        except HTTPException as error:
            answer = refusal(error.status_code, error.detail)
        status = answer["status"]
        self._requests.inc(tags={"status": str(status)})
        if status == 200:
            self._seconds.observe(time.perf_counter() - start)
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse(answer["content"], status, headers=headers)

    async def health(self) -> Response:
        try:
            described = await asyncio.wait_for(self._classifier.describe.remote(), 5)
        except Exception as error:
            return JSONResponse({"status": f"no replica answers: {type(error).__name__}"}, 503)
        return JSONResponse({"status": "ok", **described})

    async def _ask(self, body: bytes, content_type: str) -> Answer:
        for attempt in range(self.attempts):
            if attempt:
                self._repeated.inc()
                await asyncio.sleep(self.seconds_between * attempt)
            try:
                return await self._classifier.predict.remote(body, content_type)
            except RayActorError:
                continue
            except (BackPressureError, DeploymentUnavailableError) as error:
                return refusal(503, f"No replica takes the request: {error}")
            except TocomError as error:
                return refusal(500, f"{type(error).__name__}: {error}")
        return refusal(503, f"{self.attempts} replicas died with this request. Try again later.")
