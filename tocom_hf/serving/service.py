# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The HTTP service: images come in, labels go out, at the degree that the policy picks for every batch.

One model stays in memory. Requests that arrive while it is busy form the next batch, and `DegreePolicy` picks the
degree of every batch from the length of the queue. A change of degree rewrites the weights that plugins fold into in
place, between two batches.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tocom_hf.data.colour import find_num_channels, model_channels
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.serving.batching import Batcher, Metrics, OverloadedError
from tocom_hf.serving.policy import DegreePolicy
from tocom_hf.serving.requests import decode_all, read_body


def create_app(
    model: TocomModel, processor: Any, policy: DegreePolicy, max_queue: int | None = None, top_k: int = 5
) -> FastAPI:
    """The service. Its `state.batcher` and `state.metrics` are there to be looked at.

    Raises:
        ArgumentError: if the processor makes other images than the model takes.
    """
    num_channels = find_num_channels(processor, model_channels(model.config))
    metrics = Metrics()
    batcher = Batcher(model, policy, max_queue, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        app.state.worker = worker
        yield
        worker.cancel()
        await asyncio.wait([worker])

    app = FastAPI(title="tocom_hf", lifespan=lifespan)
    app.state.batcher, app.state.metrics = batcher, metrics

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        try:
            return processor(images, return_tensors="pt")["pixel_values"]
        except ValueError as error:  # a processor that does not resize, and images of several sizes
            raise HTTPException(400, f"The images cannot be prepared for the model: {error}") from error

    config: Any = model.config
    labels = [config.id2label[index] for index in range(config.num_labels)]

    def top(scores: list[float]) -> list[dict[str, Any]]:
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
        return [{"label": labels[index], "score": round(scores[index], 4)} for index in order]

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        metrics.requests.labels(error.status_code).inc()
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        metrics.requests.labels(500).inc()
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        start = time.perf_counter()
        body = await read_body(request)
        try:
            batcher.require_room(1)
            # large images take a while: other requests go on meanwhile
            content_type = request.headers.get("content-type", "")
            images = await asyncio.to_thread(decode_all, body, content_type, policy.max_batch_size, num_channels)
            pixel_values = await asyncio.to_thread(preprocess, images)
            answer = await batcher.classify(pixel_values)
        except OverloadedError as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
        except ValueError as error:  # a size that the model does not take
            raise HTTPException(400, f"The model refuses the images: {error}") from error
        metrics.requests.labels(200).inc()
        metrics.latency.observe(time.perf_counter() - start)
        return JSONResponse(
            {
                "predictions": [top(scores) for scores in answer["scores"]],
                "target_r": answer["target_r"],
                "waited_ms": round(1e3 * answer["waited"], 2),
                "computed_ms": round(1e3 * answer["computed"], 2),
            }
        )

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def health() -> Response:
        alive = not app.state.worker.done()
        content = {"status": "ok" if alive else "the worker has stopped", "target_r": model.target_r}
        return JSONResponse(content, 200 if alive else 503)

    return app
