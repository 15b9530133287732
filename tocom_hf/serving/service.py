# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The HTTP service: images come in, labels go out, at the degree that the policy picks for every batch.

One model stays in memory. Requests that arrive while it is busy form the next batch, and `DegreePolicy` picks the
degree of every batch from the length of the queue. A change of degree rewrites the weights that plugins fold into in
place, between two batches.

No client may cost the others much: see `Limits`. What cannot be served in time is refused before its body is read.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import HTTPException
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tocom_hf.data.colour import find_num_channels, model_channels
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.serving.batching import Batcher, Metrics, OverloadedError
from tocom_hf.serving.limits import Deadline, Limits
from tocom_hf.serving.policy import DegreePolicy
from tocom_hf.serving.preparing import Preparation
from tocom_hf.serving.requests import (
    CLIENT_GONE,
    QUICK_BYTES,
    QUICK_PIXELS,
    decode,
    is_quick,
    open_images,
    read_body,
    split_body,
)


def create_app(
    model: TocomModel,
    processor: Any,
    policy: DegreePolicy,
    max_queue: int | None = None,
    top_k: int = 5,
    limits: Limits | None = None,
    metrics: Metrics | None = None,
) -> Starlette:
    """The service. Its `state.batcher` and `state.metrics` are there to be looked at; `state.stop()` lets it refuse new
    requests, and those whose bodies have not arrived.

    Raises:
        ArgumentError: if the processor makes other images than the model takes.
    """
    config: Any = model.config
    limits = limits or Limits()
    num_channels = find_num_channels(processor, model_channels(config))
    preparation = Preparation(processor, num_channels)
    metrics = metrics or Metrics()
    batcher = Batcher(model, policy, max_queue, metrics, preparation, min(top_k, config.num_labels))
    front = _Front(batcher, limits)
    labels = [config.id2label[index] for index in range(config.num_labels)]
    max_images = limits.max_images or policy.max_batch_size

    async def split(request: Request, body: bytes) -> list[bytes]:
        content_type = request.headers.get("content-type", "")
        if len(body) <= QUICK_BYTES or not content_type.startswith("application/json"):
            return split_body(body, content_type, max_images)
        return await asyncio.to_thread(split_body, body, content_type, max_images)

    async def prepare(files: list[bytes]) -> torch.Tensor:
        if not all(map(is_quick, files)):
            # large images take a while: other requests go on meanwhile
            return await asyncio.to_thread(lambda: finish(open_images(files, limits.max_pixels)))
        images = open_images(files, limits.max_pixels)
        if preparation.stand_in is None or sum(image.width * image.height for image in images) > QUICK_PIXELS:
            return await asyncio.to_thread(finish, images)
        return finish(images)

    def finish(images: list[Image.Image]) -> torch.Tensor:
        try:
            return preparation.prepare(decode(image, num_channels) for image in images)
        except ValueError as error:  # a processor that does not resize, and images of several sizes
            raise HTTPException(400, f"The images cannot be prepared for the model: {error}") from error

    async def predict(request: Request) -> Response:
        start = time.perf_counter()
        try:
            body = await front.receive(request)
            async with front.until_gone(request):
                files = await split(request, body)
                with batcher.room_for(len(files)):
                    pixel_values = await prepare(files)
                answer = await batcher.classify(pixel_values)
        except OverloadedError as error:
            raise unavailable(str(error), error.retry_after) from error
        except ValueError as error:  # a size that the model does not take
            raise HTTPException(400, f"The model refuses the images: {error}") from error
        metrics.answered.inc()
        metrics.latency.observe(time.perf_counter() - start)
        return JSONResponse(
            {
                "predictions": [
                    [{"label": labels[index], "score": round(score, 4)} for index, score in best]
                    for best in answer.best
                ],
                "target_r": answer.target_r,
                "waited_ms": round(1e3 * answer.waited, 2),
                "computed_ms": round(1e3 * answer.computed, 2),
            }
        )

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.show(), media_type=CONTENT_TYPE_LATEST)

    async def health(request: Request) -> Response:
        alive = not app.state.worker.done()
        status = "stopping" if front.stopping else "ok" if alive else "the worker has stopped"
        content = {"status": status, "target_r": model.target_r}
        return JSONResponse(content, 200 if status == "ok" else 503)

    async def refuse(request: Request, error: Any) -> Response:
        metrics.requests.labels(error.status_code).inc()
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    async def fail(request: Request, error: Exception) -> Response:
        metrics.requests.labels(500).inc()
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        app.state.worker = worker
        yield
        worker.cancel()
        await asyncio.wait([worker])

    app = Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/metrics", show_metrics),
            Route("/healthz", health),
        ],
        exception_handlers={AnyHTTPException: refuse, Exception: fail},
        lifespan=lifespan,
    )
    app.state.batcher, app.state.metrics, app.state.limits = batcher, metrics, limits
    app.state.stop = front.stop
    return app


def unavailable(message: str, retry_after: int) -> HTTPException:
    """Status 503, and when to ask again."""
    return HTTPException(503, message, headers={"Retry-After": str(retry_after)})


class _Front:
    """What stands before the queue: whoever is slow, gone or too late comes no further."""

    def __init__(self, batcher: Batcher, limits: Limits):
        self.batcher, self.limits = batcher, limits
        self.stopping = False
        self._receiving: set[Deadline] = set()

    def stop(self) -> None:
        """Refuse new requests, and those whose bodies have not arrived. What has is answered."""
        self.stopping = True
        for deadline in self._receiving:
            deadline.end(self._stopping())

    async def receive(self, request: Request) -> bytes:
        """The body of a request, which is refused before it is read where it could not be served."""
        if self.stopping:
            raise self._stopping()
        self.batcher.require_room(1)
        seconds = self.limits.receive_seconds
        late = f"The body has not arrived within {seconds:g} s."
        deadline = Deadline(seconds, HTTPException(408, late, headers={"Connection": "close"}))
        self._receiving.add(deadline)
        try:
            async with deadline:
                return await read_body(request, self.limits.max_bytes)
        finally:
            self._receiving.discard(deadline)

    @asynccontextmanager
    async def until_gone(self, request: Request) -> AsyncIterator[None]:
        """Bound the time for an answer, and end the block when the client has gone: nobody would read the answer."""
        seconds = self.limits.answer_seconds
        late = f"There is no answer within {seconds:g} s. Try again later."
        async with Deadline(seconds, unavailable(late, self.batcher.retry_after())) as deadline:
            watch = asyncio.create_task(self._watch(request, deadline))
            try:
                yield
            finally:
                watch.cancel()

    async def _watch(self, request: Request, deadline: Deadline) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        deadline.end(HTTPException(CLIENT_GONE, "The client has gone before its answer was there."))

    def _stopping(self) -> HTTPException:
        return unavailable("The service is stopping. Try again later.", self.batcher.retry_after())
