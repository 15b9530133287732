# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The load-following service under more load than the dense model can carry: latency, degrees, accuracy.

    python benchmarks/serving.py

Starts `examples/serve.py` twice over loopback, first fixed at degree 0, then free to choose. The dense service's
capacity is what it answers while its queue is never empty. Then requests arrive at random times (Poisson) at multiples
of that, whether or not earlier ones were answered (open loop), and latency counts from the moment a request was due.
Load is bounded: a run has a fixed number of requests, and at most `--max_in_flight` are open. Writes a table.
"""

import argparse
import asyncio
import base64
import contextlib
import datetime
import io
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import AutoConfig

from tocom_hf.data.images import load_images
from tocom_hf.devices import describe_device


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "fashion_mnist" / "checkpoint"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0], help="Multiples of capacity.")
    parser.add_argument("--seconds", type=float, default=20, help="Length of a run.")
    parser.add_argument("--latency_ms", type=float, default=500, help="The objective.")
    parser.add_argument("--max_batch_size", type=int, default=64)
    parser.add_argument("--images_per_request", type=int, default=16)
    parser.add_argument("--max_in_flight", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="Of the service; the load generator needs a core too.")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "serving.md")
    return parser.parse_args()


@dataclass
class Answer:
    """What came of one request; `degree` is `None` where it was refused."""

    seconds: float
    degree: int | None
    right: int


@dataclass
class Payload:
    """The body of a request and the names of the right labels."""

    body: bytes
    labels: list[str]


def make_payloads(images_per_request: int) -> list[Payload]:
    dataset = load_images(str(ROOT / "examples/fashion_mnist/test.parquet"), split="test", label_column="label")
    names = AutoConfig.from_pretrained(CHECKPOINT).id2label
    payloads = []
    for start in range(0, len(dataset), images_per_request):
        rows = dataset[start : start + images_per_request]
        encoded = []
        for image in rows["image"]:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            encoded.append(base64.b64encode(buffer.getvalue()).decode())
        payloads.append(Payload(json.dumps({"images": encoded}).encode(), [names[label] for label in rows["label"]]))
    return payloads


@contextlib.contextmanager
def service(args: argparse.Namespace, calibration: Path, *options: str) -> Iterator[str]:
    """Run the service in a process of its own within the `with` block. Yields its address."""
    command = [
        sys.executable, ROOT / "examples" / "serve.py", "--threads", args.threads, "--port", args.port,
        "--latency_ms", args.latency_ms, "--max_batch_size", args.max_batch_size, "--calibration", calibration,
        *options,
    ]  # fmt: skip
    address = f"http://127.0.0.1:{args.port}"
    process = subprocess.Popen([str(part) for part in command])
    try:
        for _ in range(300):
            time.sleep(0.2)
            if process.poll() is not None:
                sys.exit("The service did not start.")
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{address}/healthz").raise_for_status()
                break
        yield address
    finally:
        process.terminate()
        process.wait(30)


async def send(client: httpx.AsyncClient, payload: Payload, due: float) -> Answer:
    headers = {"Content-Type": "application/json"}
    response = await client.post("/predict", content=payload.body, headers=headers)
    if response.status_code == 503:
        return Answer(time.perf_counter() - due, None, 0)
    content = response.raise_for_status().json()
    right = sum(ranks[0]["label"] == label for ranks, label in zip(content["predictions"], payload.labels, strict=True))
    return Answer(time.perf_counter() - due, content["target_r"], right)


async def closed_loop(client: httpx.AsyncClient, payloads: list[Payload], clients: int, seconds: float) -> float:
    """Images per second that the service answers while `clients` ask again as soon as they are answered."""
    supply, end = itertools.cycle(payloads), time.perf_counter() + seconds
    start, images = time.perf_counter(), 0

    async def ask() -> None:
        nonlocal images
        while time.perf_counter() < end:
            payload = next(supply)
            answer = await send(client, payload, time.perf_counter())
            images += len(payload.labels) if answer.degree is not None else 0

    await asyncio.gather(*(ask() for _ in range(clients)))
    return images / (time.perf_counter() - start)


async def open_loop(
    client: httpx.AsyncClient, payloads: list[Payload], rate: float, count: int, max_in_flight: int
) -> list[Answer]:
    """Send `count` requests at `rate` a second on average, at random times."""
    chance, supply, tasks = random.Random(0), itertools.cycle(payloads), []
    slots, due = asyncio.Semaphore(max_in_flight), time.perf_counter()

    async def ask(payload: Payload, due: float) -> Answer:
        async with slots:
            return await send(client, payload, due)

    for _ in range(count):
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(next(supply), due)))
    return await asyncio.gather(*tasks)


def summarise(name: str, load: float, rate: float, answers: list[Answer], args: argparse.Namespace) -> str:
    answered = [answer for answer in answers if answer.degree is not None]
    refused = 1 - len(answered) / len(answers)
    cuts = statistics.quantiles([1e3 * answer.seconds for answer in answered], n=100)
    degrees = Counter(answer.degree for answer in answered)
    shares = ", ".join(f"{degree}: {count / len(answered):.0%}" for degree, count in sorted(degrees.items()))
    accuracy = sum(answer.right for answer in answered) / (len(answered) * args.images_per_request)
    cells = [
        name, f"{load:g}", f"{rate * args.images_per_request:.0f}", f"{refused:.1%}", f"{cuts[49]:.0f}",
        f"{cuts[94]:.0f}", f"{cuts[98]:.0f}", shares, f"{accuracy:.1%}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = ["service", "load over dense capacity", "images/s offered", "refused", "p50 ms", "p95 ms", "p99 ms",
          "share of requests by degree", "accuracy"]  # fmt: skip


def write_table(rows: list[str], capacity: float, args: argparse.Namespace) -> None:
    lines = [
        f"# Load-following service, {datetime.date.today().isoformat()}",
        "",
        f"{describe_device(torch.device('cpu'))} for the service, and a core for the load generator; torch "
        f"{torch.__version__}. Objective {args.latency_ms:g} ms, batches of up to {args.max_batch_size}, "
        f"{args.images_per_request} images a request, {args.seconds:g} s a run. The dense service answers "
        f"{capacity:.0f} images/s. `python {' '.join(sys.argv)}`",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *rows,
    ]
    args.output.write_text("\n".join(lines) + "\n")


async def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)  # for the description of the device
    if 800 % args.images_per_request:
        sys.exit("--images_per_request must divide the 800 images.")
    payloads, rows, capacity = make_payloads(args.images_per_request), [], 0.0
    limits = httpx.Limits(max_connections=args.max_in_flight, max_keepalive_connections=args.max_in_flight)
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("dense", ("--degrees", "0")), ("adaptive", ())):
            calibration = Path(folder, f"{name}.json")
            with service(args, calibration, *options) as address:
                async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:
                    clients = 2 * args.max_batch_size // args.images_per_request
                    await closed_loop(client, payloads, clients, 2)  # warm-up
                    if name == "dense":
                        capacity = await closed_loop(client, payloads, clients, args.seconds / 2)
                        print(f"dense capacity: {capacity:.0f} images/s", flush=True)
                    for load in args.loads:
                        rate = load * capacity / args.images_per_request
                        answers = await open_loop(client, payloads, rate, int(rate * args.seconds), args.max_in_flight)
                        rows.append(summarise(name, load, rate, answers, args))
                        print(rows[-1], flush=True)
                        await asyncio.sleep(1)  # the queue empties and the degree comes back
    write_table(rows, capacity, args)


if __name__ == "__main__":
    asyncio.run(main())
