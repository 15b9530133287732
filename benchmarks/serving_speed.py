# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Requests a second of `tocom serve` in two commits of this repository, in turn on one machine.

    python benchmarks/serving_speed.py --before bcc3cbe
    python benchmarks/serving_speed.py --before bcc3cbe --workers 2 --resume
    python benchmarks/serving_speed.py --before bcc3cbe --images_per_request 16 --resume

Both services hold the embedded model at one degree and stay up; in each round every one of them answers as many
requests, while the other is idle. `--clients` of them are open at any time: whoever is answered asks again.
"""

import argparse
import asyncio
import base64
import io
import json
import statistics
import tempfile
from pathlib import Path

from http_load import ROOT, Service, closed_loop, make_request, package_of, serving
from sessions import Results, versions

from tocom_hf.data.images import load_images


BEFORE, AFTER = "before", "after"
COLUMNS = {
    "images_per_request": "images a request", "clients": "clients", "r": "r", "workers": "workers, after",
    "before": "before, requests/s",
    "after": "after, requests/s", "ratio": "after over before", "cpu_before_ms": "before, CPU ms a request",
    "cpu_after_ms": "after, CPU ms a request", "p50_before_ms": "before, p50 ms", "p50_after_ms": "after, p50 ms",
    "p95_before_ms": "before, p95 ms", "p95_after_ms": "after, p95 ms", "objective_ms": "objective, ms",
    "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "Requests/s are medians over the rounds; *after over before* is the median of the ratios of each round.",
    "Before lacks the packages that its extra `serve` did not bring yet: httptools.",
    "The percentiles are of all requests of all rounds. CPU is the processor time of the service, all its threads and "
    "workers, over all requests.",
    "The service before has one process, which is all that it could.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="A commit to compare the working tree with.")
    parser.add_argument(
        "--before_lacks", nargs="*", default=["httptools"],
        help="Packages that the extra `serve` of that commit does not bring, so that its users lack them.",
    )  # fmt: skip
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="Of the service after.")
    parser.add_argument("--images_per_request", type=int, default=1)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max_batch_size", type=int, default=32)
    parser.add_argument("--requests", type=int, default=400, help="In a round.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--latency_ms", type=float, default=200, help="The objective.")
    parser.add_argument("--threads", type=int, default=1, help="Of torch; the load generator needs a core too.")
    parser.add_argument("--port", type=int, default=8125, help="And the next one.")
    parser.add_argument("--resume", action="store_true", help="Add to the rows of --output; leave out what is there.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "serving_speed")
    return parser.parse_args()


def make_requests(images_per_request: int) -> list[bytes]:
    """Requests with the test images of Fashion-MNIST, as PNG files."""
    dataset = load_images(str(ROOT / "examples/fashion_mnist/test.parquet"), split="test", label_column="label")
    files = []
    for row in dataset:
        buffer = io.BytesIO()
        row["image"].save(buffer, "PNG")
        files.append(buffer.getvalue())
    if images_per_request == 1:
        return [make_request(data, "image/png") for data in files]
    requests = []
    for start in range(0, len(files) - images_per_request + 1, images_per_request):
        encoded = [base64.b64encode(data).decode() for data in files[start : start + images_per_request]]
        requests.append(make_request(json.dumps({"images": encoded}).encode(), "application/json"))
    return requests


def key_of(args: argparse.Namespace) -> dict[str, int]:
    """What one row is of."""
    return {name: getattr(args, name) for name in ("images_per_request", "clients", "r", "workers")}


def measure(services: dict[str, Service], args: argparse.Namespace) -> dict:
    """One row of the table."""
    requests = make_requests(args.images_per_request)
    rates: dict[str, list[float]] = {name: [] for name in services}
    seconds: dict[str, list[float]] = {name: [] for name in services}
    cpu = dict.fromkeys(services, 0.0)
    for service in services.values():
        asyncio.run(closed_loop(service.port, requests, args.clients, args.requests))
    for _ in range(args.rounds):
        for name, service in services.items():
            before = service.cpu_seconds()
            total, each = asyncio.run(closed_loop(service.port, requests, args.clients, args.requests))
            cpu[name] += service.cpu_seconds() - before
            rates[name].append(args.requests / total)
            seconds[name] += each
    cuts = {name: statistics.quantiles(each, n=20) for name, each in seconds.items()}
    row: dict = {**key_of(args)}
    for name in services:
        row[name] = round(statistics.median(rates[name]), 1)
        row[f"cpu_{name}_ms"] = round(1e3 * cpu[name] / (args.rounds * args.requests), 3)
        row[f"p50_{name}_ms"] = round(1e3 * cuts[name][9], 1)
        row[f"p95_{name}_ms"] = round(1e3 * cuts[name][18], 1)
    row["ratio"] = round(statistics.median(b / a for a, b in zip(rates[BEFORE], rates[AFTER], strict=True)), 3)
    return {**row, "objective_ms": args.latency_ms, "rounds": args.rounds}


def main() -> None:
    args = parse_args()
    packages = versions("torch", "fastapi", "starlette", "uvicorn", "httptools", "uvloop", "pillow")
    results = Results(
        args.output, f"tocom serve in {args.before} and after", COLUMNS, NOTES, packages, resume=args.resume
    )
    if results.has(**key_of(args)):
        return
    with package_of(args.before, args.before_lacks) as before, tempfile.TemporaryDirectory() as folder:
        options = [
            "--degrees", args.r, "--max_batch_size", args.max_batch_size, "--latency_ms", args.latency_ms,
            "--threads", args.threads, "--max_queue", 4 * args.clients * args.images_per_request,
            "--calibration", Path(folder, "calibration.json"),
        ]  # fmt: skip
        services = {
            BEFORE: Service(args.port, options, package=before),
            AFTER: Service(args.port + 1, [*options, "--workers", args.workers], package=ROOT),
        }
        # in turn: the second one finds the calibration of the first
        with serving(services[BEFORE]), serving(services[AFTER]):
            results.add([measure(services, args)])


if __name__ == "__main__":
    main()
