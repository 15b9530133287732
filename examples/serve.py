# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Serve an image classifier that merges more tokens when the load rises, to hold a latency objective.

    pip install '.[serve]'
    python examples/serve.py --latency_ms 200
    curl --data-binary @image.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict
    curl http://127.0.0.1:8000/metrics

One model stays in memory. Requests that arrive while it is busy form the next batch, and `DegreePolicy` picks the
degree of every batch from the length of the queue. A change of degree rewrites the weights that plugins fold into in
place, between two batches.
"""

import argparse
import asyncio
import base64
import binascii
import io
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from degree_policy import DegreePolicy
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps, UnidentifiedImageError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from transformers import AutoImageProcessor

from tocom_hf import TocomModel, calibrate
from tocom_hf.data.images import to_rgb


EXAMPLES = Path(__file__).parent
MAX_BYTES, MAX_PIXELS = 16 * 2**20, 64 * 10**6
# not all that Pillow reads: some it hands to other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(EXAMPLES / "fashion_mnist" / "checkpoint"))
    parser.add_argument(
        "--plugins",
        default=str(EXAMPLES.parent / "hub_cards" / "tocom-vit-fashion-mnist"),
        help='Hub id or folder; "" for those that a checkpoint saved by TocomModel brings.',
    )
    parser.add_argument("--source_r", type=int, help="Default: what the checkpoint records.")
    parser.add_argument("--degrees", type=int, nargs="+", help="Degrees to choose from; default: the set's.")
    parser.add_argument("--latency_ms", type=float, default=200, help="Objective for the time to an answer.")
    parser.add_argument("--max_batch_size", type=int, default=32)
    parser.add_argument("--max_queue", type=int, help="Images that may wait; default: what the objective allows.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="Threads of torch on a CPU.")
    parser.add_argument("--calibration", type=Path, help="File to keep the measured speed of every degree in.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


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


@dataclass
class Job:
    """The images of one request, float32 `(n, 3, height, width)`, and where their answer goes."""

    pixel_values: torch.Tensor
    answer: asyncio.Future
    arrived: float = field(default_factory=time.perf_counter)


class OverloadedError(Exception):
    """The queue is full: more requests could not be answered in time."""


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
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def classify(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Wait in the queue and return the answer.

        Raises:
            OverloadedError: if the queue is full.
        """
        self.require_room(len(pixel_values))
        job = Job(pixel_values, asyncio.get_running_loop().create_future())
        self.jobs.append(job)
        self._count(len(pixel_values))
        self._arrival.set()
        return await job.answer

    def require_room(self, count: int) -> None:
        """Raise `OverloadedError` unless `count` more images may wait. An empty queue takes any request."""
        room = self.policy.capacity() if self.max_queue is None else self.max_queue
        if self.queued and self.queued + count > room:
            raise OverloadedError(f"{self.queued} images wait already, {room} are the limit. Try again later.")

    async def run(self) -> None:
        """Serve batches until cancelled."""
        try:
            while True:
                await self._arrival.wait()
                self._arrival.clear()
                while self.jobs:
                    await self._serve_batch()
        finally:
            for job in self.jobs:
                job.answer.cancel()
            self._thread.shutdown()

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
            scores = await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, pixel_values, degree)
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


def decode(data: bytes) -> Image.Image:
    """An RGB image from the bytes of a file; status 400 if they are none, 413 if it is too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise HTTPException(413, f"The image has {image.size} pixels; {MAX_PIXELS} in all are the limit.")
        return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise HTTPException(400, f"The body is not an image of a known format ({', '.join(FORMATS)}).") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"The body is not an image that can be read: {error}") from error


async def read_body(request: Request) -> bytes:
    """The body of a request; status 400 if it is empty, 413 if it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"The body has more than {MAX_BYTES} bytes.")
    if not body:
        raise HTTPException(400, "The body is empty. Send the bytes of an image.")
    return bytes(body)


def decode_all(body: bytes, content_type: str, limit: int) -> list[Image.Image]:
    """The image that is the body; or those in a JSON body `{"images": [<base64>, ...]}`, no more than `limit`."""
    if not content_type.startswith("application/json"):
        return [decode(body)]
    try:
        encoded = json.loads(body)["images"]
        files = [base64.b64decode(text, validate=True) for text in encoded]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise HTTPException(400, f'Expected {{"images": [<base64>, ...]}}: {error!r}') from error
    if not files:
        raise HTTPException(400, "There are no images in the list.")
    if len(files) > limit:  # before they are decoded: a small file may hold a large image
        raise HTTPException(413, f"{len(files)} images in a request; {limit} are the limit.")
    return [decode(file) for file in files]


def create_app(
    model: TocomModel, processor: Any, policy: DegreePolicy, max_queue: int | None = None, top_k: int = 5
) -> FastAPI:
    """The service. Its `state.batcher` and `state.metrics` are there to be looked at."""
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

    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]

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
            images = await asyncio.to_thread(decode_all, body, content_type, policy.max_batch_size)
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


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = TocomModel.from_pretrained(args.model_name_or_path, plugins=args.plugins or None, source_r=args.source_r)
    if model.plugins is None:
        raise SystemExit("The model has no plugins, so it runs at one degree only. Pass --plugins.")
    degrees = args.degrees or list(range(model.plugins.config.min_r, model.plugins.config.max_r + 1))
    for degree in degrees:  # before a request asks for one that there is not
        model.plugins.compose(model.source_r, degree)
    model.to(args.device)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    calibration = calibrate(
        model, batch_size=args.max_batch_size, degrees=degrees, seconds=3, cache_file=args.calibration
    )
    print(calibration)
    batch_seconds = {degree: calibration[degree].latency_ms / 1e3 for degree in degrees}
    policy = DegreePolicy(batch_seconds, args.max_batch_size, args.latency_ms / 1e3)
    app = create_app(model, processor, policy, args.max_queue)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
