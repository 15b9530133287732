# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The service under more load than the dense model can carry: latency, refusals, degrees, accuracy.

    python benchmarks/serving.py --before bcc3cbe                       # and Ray, where the extra `ray` is installed
    python benchmarks/serving.py --services dense adaptive --loads 1 2

Serves the embedded model over loopback: fixed at degree 0 (`dense`), free to choose its degree (`adaptive`), the same
in an earlier commit (`before`), and on Ray Serve with one and two replicas. The dense service's capacity is what it
answers while its queue is never empty. Then requests arrive at random times (Poisson) at multiples of that, whether or
not earlier ones were answered (open loop), and latency counts from the moment a request was due. Writes a table.
"""

import argparse
import asyncio
import base64
import importlib.util
import io
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from http_load import CHECKPOINT, ROOT, Load, Outcome, Service, closed_loop, make_request, package_of, serving
from ray_service import RayService, ray_serving
from sessions import Results, versions
from transformers import AutoConfig

from tocom_hf.data.images import load_images


SERVICES = {
    "dense": "tocom serve, dense",
    "before": "tocom serve, before",
    "adaptive": "tocom serve",
    "ray_1": "Ray Serve, 1 replica",
    "ray_2": "Ray Serve, 2 replicas",
}
COLUMNS = {
    "service": "service", "load": "load over dense capacity", "offered": "images/s offered",
    "answered": "images/s answered", "refused": "refused", "p50_ms": "p50 ms", "p95_ms": "p95 ms", "p99_ms": "p99 ms",
    "degrees": "share of requests by degree", "accuracy": "accuracy",
}  # fmt: skip
NOTES = [
    "One run, the services in turn, one of them up at a time. The load generator shares the machine with them, and so "
    "do the processes of Ray.",
    "*Refused*: answered with 503. Percentiles are over answered requests, from the moment that each was due.",
    "Accuracy is that of the plugin set that the repository carries for this model, over all answered images.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", nargs="+", choices=SERVICES, default=list(SERVICES))
    parser.add_argument("--before", help="A commit, for the service `before`; without it that one is left out.")
    parser.add_argument(
        "--before_lacks", nargs="*", default=["httptools"],
        help="Packages that the extra `serve` of that commit does not bring, so that its users lack them.",
    )  # fmt: skip
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0], help="Multiples of capacity.")
    parser.add_argument("--seconds", type=float, default=15, help="Length of a run.")
    parser.add_argument("--latency_ms", type=float, default=500, help="The objective.")
    parser.add_argument("--max_batch_size", type=int, default=64)
    parser.add_argument("--images_per_request", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="Of torch; the load generator needs a core too.")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "serving")
    return parser.parse_args()


@dataclass
class Payload:
    """A request, and the names of the right labels."""

    request: bytes
    labels: list[str]

    def check(self, content: dict) -> int:
        """How many images are labelled rightly."""
        return sum(ranks[0]["label"] == label for ranks, label in zip(content["predictions"], self.labels, strict=True))


def make_payloads(images_per_request: int) -> list[Payload]:
    """Requests with the test images of Fashion-MNIST."""
    dataset = load_images(str(ROOT / "examples/fashion_mnist/test.parquet"), split="test", label_column="label")
    names = AutoConfig.from_pretrained(CHECKPOINT).id2label
    payloads = []
    for start in range(0, len(dataset) - images_per_request + 1, images_per_request):
        rows = dataset[start : start + images_per_request]
        encoded = []
        for image in rows["image"]:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            encoded.append(base64.b64encode(buffer.getvalue()).decode())
        body = json.dumps({"images": encoded}).encode()
        payloads.append(Payload(make_request(body, "application/json"), [names[label] for label in rows["label"]]))
    return payloads


@contextmanager
def running(name: str, args: argparse.Namespace, folder: Path) -> Iterator[None]:
    """The service of that name, within the `with` block."""
    if name.startswith("ray_"):
        replicas = int(name.removeprefix("ray_"))
        settings = {"latency_ms": args.latency_ms, "max_batch_size": args.max_batch_size, "threads": args.threads}
        with ray_serving(RayService(args.port, replicas, **settings)):
            yield
        return
    options = [
        "--threads", args.threads, "--latency_ms", args.latency_ms, "--max_batch_size", args.max_batch_size,
        "--calibration", folder / f"{name}.json", *(("--degrees", 0) if name == "dense" else ()),
    ]  # fmt: skip
    if name == "before":
        with package_of(args.before, args.before_lacks) as package, serving(Service(args.port, options, package)):
            yield
        return
    with serving(Service(args.port, options)):
        yield


def measure_capacity(payloads: list[Payload], args: argparse.Namespace) -> float:
    """Requests a second that the service answers while its queue is never empty."""
    requests = [payload.request for payload in payloads]
    clients = max(1, 2 * args.max_batch_size // args.images_per_request)
    asyncio.run(closed_loop(args.port, requests, clients, 100, may_refuse=True))
    seconds, answered = asyncio.run(closed_loop(args.port, requests, clients, 400, may_refuse=True))
    return len(answered) / seconds


def row_of(name: str, load: float, rate: float, outcomes: list[Outcome], args: argparse.Namespace) -> dict:
    """One row of the table."""
    answered = [outcome for outcome in outcomes if outcome.status == 200]
    refused = sum(outcome.status == 503 for outcome in outcomes)
    if len(answered) + refused < len(outcomes):
        raise SystemExit(f"Of {len(outcomes)} requests to {name}, {len(answered)} were answered and {refused} refused.")
    cuts = statistics.quantiles([1e3 * (outcome.done - outcome.due) for outcome in answered], n=100)
    degrees = sorted(Counter(outcome.degree for outcome in answered).items())
    images = args.images_per_request
    seconds = max(outcome.done for outcome in outcomes) - min(outcome.due for outcome in outcomes)
    right = sum(outcome.verdict for outcome in answered)
    return {
        "service": SERVICES[name], "load": f"{load:g}", "offered": round(rate * images),
        "answered": round(len(answered) * images / seconds), "refused": f"{refused / len(outcomes):.1%}",
        "p50_ms": round(cuts[49]), "p95_ms": round(cuts[94]), "p99_ms": round(cuts[98]),
        "degrees": ", ".join(f"{degree}: {count / len(answered):.0%}" for degree, count in degrees),
        "accuracy": f"{right / (len(answered) * images):.1%}",
    }  # fmt: skip


def wanted(args: argparse.Namespace) -> list[str]:
    """The services that can be measured here; the dense one first, whose capacity all others are loaded by."""
    names = ["dense", *(name for name in args.services if name != "dense")]
    if args.before is None:
        names = [name for name in names if name != "before"]
    if importlib.util.find_spec("ray") is None:
        names = [name for name in names if not name.startswith("ray_")]
    return names


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)  # for the description of the device
    payloads, capacity = make_payloads(args.images_per_request), 0.0
    title = (
        f"The service under load, objective {args.latency_ms:g} ms, {args.images_per_request} images a request, "
        f"{args.seconds:g} s a row"
    )
    packages = versions("torch", "starlette", "uvicorn", "httptools", "uvloop", "pillow", "ray")
    results = Results(args.output, title, COLUMNS, NOTES, packages, resume=False)
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted(args):
            with running(name, args, Path(folder)):
                own = measure_capacity(payloads, args)
                print(f"{SERVICES[name]}: {own * args.images_per_request:.0f} images/s in a closed loop", flush=True)
                capacity = capacity or own
                for load in args.loads:
                    generator = Load(args.port, payloads)
                    asyncio.run(generator.run(load * capacity, args.seconds))
                    results.add([row_of(name, load, load * capacity, generator.outcomes, args)])


if __name__ == "__main__":
    main()
