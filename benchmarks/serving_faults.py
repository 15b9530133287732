# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What becomes of requests when something goes wrong under load: one row for each fault.

    python benchmarks/serving_faults.py                            # some six minutes, over loopback only
    python benchmarks/serving_faults.py --faults killed --seconds 5 --resume

The rows of Ray need the extra `ray`; without it they are left out.

`tocom serve` answers single images, which come at random times (Poisson) whether or not earlier ones were answered.
Each answer is compared with what the model itself says about that image at the degree that the answer names: another
label, or a score that is off by more than 0.01, is wrong. Only images enter whose label is clear at every degree.
"""

import argparse
import asyncio
import importlib.util
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from http_load import CHECKPOINT, Connection, Load, Outcome, Service, closed_loop, make_request, serving
from ray_service import RayService, ray_serving
from serving_references import make_examples, write_second_checkpoint
from sessions import Results, versions


ONE_PROCESS, TWO_WORKERS = "tocom serve, one process", "tocom serve, two workers"
ON_RAY = "Ray Serve, two replicas"
COLUMNS = {
    "service": "service", "fault": "fault", "load": "requests/s offered", "sent": "sent", "answered": "answered",
    "refused": "refused", "lost": "lost", "wrong": "wrong", "p50_ms": "p50 ms", "p95_ms": "p95 ms",
    "p99_ms": "p99 ms", "recovery_s": "time to recover, s", "notes": "what happened",
}  # fmt: skip
NOTES = [
    "*Sent* are requests with a good image, or as the fault wants them. *Answered*: with labels. *Refused*: by status; "
    "*lost*: neither, to the end of the row. *Wrong*: answered with something else than the model's own answer at the "
    "degree that the answer names.",
    "Percentiles are over answered requests, from the moment that each was due, tries again included.",
    "*Time to recover*: from the fault to the last request that was due after it and was refused, lost, or answered "
    "later than the objective; 0 where there was none.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seconds", type=float, default=20, help="Length of a row.")
    parser.add_argument("--latency_ms", type=float, default=500, help="The objective.")
    parser.add_argument("--max_batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="Of torch; the load generator needs a core too.")
    parser.add_argument("--port", type=int, default=8127)
    parser.add_argument("--resume", action="store_true", help="Add to the rows of --output; leave out what is there.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "serving_faults")
    return parser.parse_args()


class Bench:
    """What all faults share: the dense load, the images, and a service of their own for each."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.checkpoints = [CHECKPOINT, write_second_checkpoint(folder / "second")]
        self.examples = make_examples(self.checkpoints)
        self.dense = 0.0

    def service(self, *options: object, **settings: object) -> Service:
        args = self.args
        given = [
            "--latency_ms", args.latency_ms, "--max_batch_size", args.max_batch_size, "--threads", args.threads,
            "--calibration", self.folder / "calibration.json", *options,
        ]  # fmt: skip
        return Service(args.port, given, **settings)  # type: ignore[arg-type]

    def measure_dense(self) -> None:
        """Requests a second that the service answers at degree 0."""
        requests = [example.request for example in self.examples]
        service = self.service("--degrees", 0, "--max_queue", 10**6)
        with serving(service):
            asyncio.run(closed_loop(service.port, requests, self.args.max_batch_size, 200))
            seconds, _ = asyncio.run(closed_loop(service.port, requests, self.args.max_batch_size, 1000))
        self.dense = 1000 / seconds
        print(f"dense: {self.dense:.0f} requests/s", flush=True)

    async def warm_up(self) -> None:
        """The first requests of a service take longer than all others."""
        await closed_loop(self.args.port, [example.request for example in self.examples], 8, 100)

    def ray_service(self) -> RayService:
        args = self.args
        return RayService(
            args.port, replicas=2, latency_ms=args.latency_ms, max_batch_size=args.max_batch_size, threads=args.threads
        )

    def row(
        self, fault: str, load: str, outcomes: list[Outcome], since: float, notes: str, service: str = ONE_PROCESS
    ) -> dict:
        """A row of the table, from what became of requests; `since` is when the fault began."""
        objective = self.args.latency_ms / 1e3
        answered = [1e3 * (outcome.done - outcome.due) for outcome in outcomes if outcome.status == 200]
        refused = Counter(outcome.status for outcome in outcomes if outcome.status not in (0, 200))
        bad = [
            outcome.done for outcome in outcomes
            if outcome.due >= since and (outcome.status != 200 or outcome.done - outcome.due > objective)
        ]  # fmt: skip
        cuts = statistics.quantiles(answered, n=100)
        return {
            "service": service, "fault": fault, "load": load, "sent": len(outcomes), "answered": len(answered),
            "refused": ", ".join(f"{count} with {status}" for status, count in sorted(refused.items())) or "0",
            "lost": sum(outcome.status == 0 for outcome in outcomes),
            "wrong": sum(outcome.verdict is not None and outcome.verdict[1] for outcome in outcomes),
            "p50_ms": round(cuts[49]), "p95_ms": round(cuts[94]), "p99_ms": round(cuts[98]),
            "recovery_s": round(max(bad, default=since) - since, 2), "notes": notes,
        }  # fmt: skip


async def metric(port: int, name: str) -> float:
    """The sum of a figure of `/metrics` over its labels."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    values = [line.split()[-1] for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(map(float, values))


def degrees_of(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.degree for outcome in outcomes if outcome.degree is not None)
    total = sum(counts.values())
    return ", ".join(f"{degree}: {count / total:.0%}" for degree, count in sorted(counts.items()))


async def bad_image(bench: Bench) -> dict:
    """One request in a thousand holds a damaged image."""
    service = bench.service()
    with serving(service):
        await bench.warm_up()
        rate = 0.5 * bench.dense
        damaged = make_request(bench.examples[0].data[:-30], "image/png")
        load, thousand = Load(service.port, bench.examples), 1000 / rate
        begun = asyncio.create_task(load.run(rate, thousand))
        await asyncio.sleep(thousand / 2)
        since = time.perf_counter()
        answer = await Connection(service.port).ask(damaged)
        await begun
        load.outcomes.append(Outcome(since - 1e-9, time.perf_counter(), answer.status))
        notes = f"the damaged one: {answer.status}, {answer.content()['error']}"
        return bench.row("a damaged image among a thousand", f"{rate:.0f}", load.outcomes, since, notes)


async def slow_clients(bench: Bench) -> dict:
    """Twenty clients send a byte a second of their bodies."""
    service = bench.service("--receive_seconds", 5)
    with serving(service):
        await bench.warm_up()
        rate = 0.5 * bench.dense
        load = Load(service.port, bench.examples)
        begun = asyncio.create_task(load.run(rate, bench.args.seconds))
        await asyncio.sleep(bench.args.seconds / 4)
        since = time.perf_counter()
        heads = await asyncio.gather(*(_drip(service.port, bench.examples[0].request, 15) for _ in range(20)))
        await begun
        found = Counter(head[9:12].decode() or "nothing" for head in heads)
        notes = "the twenty, not counted here: " + ", ".join(
            f"{count} with {status}" for status, count in found.items()
        )
        return bench.row("20 clients that send a byte a second", f"{rate:.0f}", load.outcomes, since, notes)


async def _drip(port: int, request: bytes, seconds: float) -> bytes:
    """Send a request, its body a byte a second, and return the head of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head, _, body = request.partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    answer = asyncio.create_task(reader.read())
    end = time.perf_counter() + seconds
    for byte in body:
        if time.perf_counter() > end or (await asyncio.wait([answer], timeout=1))[0]:
            break
        writer.write(bytes([byte]))
    writer.close()
    return await answer if answer.done() else b""


async def switches(bench: Bench) -> dict:
    """The load goes up and down every second, so that the degree changes while batches run and requests wait."""
    service = bench.service()
    with serving(service):
        await bench.warm_up()
        load, since = Load(service.port, bench.examples), time.perf_counter()
        for number in range(int(bench.args.seconds)):
            await load.run((1.5 if number % 2 else 0.2) * bench.dense, 1)
        changes = int(await metric(service.port, "tocom_switches_total"))
        notes = f"{changes} changes of the degree; {degrees_of(load.outcomes)}"
        rates = f"{0.2 * bench.dense:.0f} and {1.5 * bench.dense:.0f}, in turn"
        return bench.row("the degree changes while batches run", rates, load.outcomes, since, notes)


def overload(times: int) -> Callable[[Bench], Awaitable[dict]]:
    async def run(bench: Bench) -> dict:
        service = bench.service()
        with serving(service):
            await bench.warm_up()
            load, part = Load(service.port, bench.examples), bench.args.seconds / 4
            await load.run(0.5 * bench.dense, part)
            await load.run(times * bench.dense, 2 * part)
            since = time.perf_counter()
            await load.run(0.5 * bench.dense, part)
            notes = (
                f"half of the dense load before and after; recovery counts from its end; {degrees_of(load.outcomes)}"
            )
            return bench.row(f"{times} times the dense load", f"{times * bench.dense:.0f}", load.outcomes, since, notes)

    return run


async def killed(bench: Bench) -> dict:
    """The process is killed (SIGKILL), and started again at once, as a supervisor does. Clients try again."""
    service = bench.service()
    with serving(service):
        await bench.warm_up()
        rate = 0.5 * bench.dense
        load = Load(service.port, bench.examples, retry_seconds=180)
        begun = asyncio.create_task(load.run(rate, bench.args.seconds))
        await asyncio.sleep(bench.args.seconds / 2)
        since = time.perf_counter()
        service.stop(signal.SIGKILL)
        service.start(wait=False)
        await asyncio.to_thread(service.wait)
        ready = time.perf_counter() - since
        await begun
        notes = f"it served again after {ready:.1f} s: Python, torch and the model were loaded anew"
        row = bench.row("the process is killed and started again", f"{rate:.0f}", load.outcomes, since, notes)
        service.stop()
        return row


async def worker_killed(bench: Bench) -> dict:
    """One of two workers is killed (SIGKILL), and the command starts another by itself."""
    service = bench.service("--workers", 2)
    with serving(service):
        await bench.warm_up()
        rate = 0.5 * bench.dense
        load = Load(service.port, bench.examples, retry_seconds=10)
        begun = asyncio.create_task(load.run(rate, bench.args.seconds))
        await asyncio.sleep(bench.args.seconds / 4)
        first, since = service.workers()[0], time.perf_counter()
        os.kill(first, signal.SIGKILL)
        await begun
        notes = "whom it was answering tries again, over connections to the other one"
        row = bench.row("a worker is killed", f"{rate:.0f}", load.outcomes, since, notes, TWO_WORKERS)
        service.stop()
        return row


async def swapped(bench: Bench) -> dict:
    """A second process with another checkpoint takes over, and the first is told to stop (SIGTERM)."""
    first = bench.service("--reuse_port")
    with serving(first):
        await bench.warm_up()
        rate = 0.5 * bench.dense
        load = Load(first.port, bench.examples, retry_seconds=10)
        begun = asyncio.create_task(load.run(rate, bench.args.seconds))
        await asyncio.sleep(1)
        second = bench.service("--reuse_port", checkpoint=bench.checkpoints[1])
        since = time.perf_counter()
        with serving_line(second):
            await asyncio.to_thread(second.wait_for_line)
            code = await asyncio.to_thread(first.stop)
            await begun
            await load.run(rate, 1)
            versions = Counter(outcome.verdict[0] for outcome in load.outcomes if outcome.verdict is not None)
            notes = (
                f"answered by the first checkpoint: {versions[0]}, by the second: {versions[1]}; the first process "
                f"ended with {code}; clients try again"
            )
            return bench.row("another checkpoint takes over", f"{rate:.0f}", load.outcomes, since, notes)


@contextmanager
def serving_line(service: Service) -> Iterator[None]:
    """Start a service of which others already serve the port, and end it at last."""
    try:
        service.start(wait=False)
        yield
    finally:
        service.stop(signal.SIGKILL)


async def full_disk(bench: Bench) -> dict:
    """No file can grow, and what the service prints meets a full device."""
    kept = bench.folder / "never-written.json"
    service = bench.service("--calibration", kept, no_space=True)
    with serving(service):
        await bench.warm_up()
        rate, since = 0.5 * bench.dense, time.perf_counter()
        load = Load(service.port, bench.examples)
        await load.run(rate, bench.args.seconds / 2)
        scraped = int(await metric(service.port, "tocom_requests_total"))
        notes = (
            f"the calibration {'was kept' if kept.exists() else 'could not be kept'}; /metrics, which are held in "
            f"memory, count {scraped} requests"
        )
        return bench.row("no space for a file, nor for what is printed", f"{rate:.0f}", load.outcomes, since, notes)


async def ray_killed(bench: Bench) -> dict:
    """The process of one of two replicas is killed (SIGKILL). Nobody but Ray does anything about it."""
    service = bench.ray_service()
    with ray_serving(service):
        await bench.warm_up()
        rate = 0.25 * bench.dense
        load = Load(service.port, bench.examples, retry_seconds=60)
        begun = asyncio.create_task(load.run(rate, bench.args.seconds))
        await asyncio.sleep(bench.args.seconds / 4)
        since = time.perf_counter()
        await asyncio.to_thread(service.kill_a_replica)
        await begun
        await asyncio.to_thread(service.wait)
        notes = "a client that was being answered by it tries again"
        return bench.row("a replica is killed", f"{rate:.0f}", load.outcomes, since, notes, ON_RAY)


async def ray_swapped(bench: Bench) -> dict:
    """Another checkpoint is deployed: Ray starts new replicas in the place of the old ones, one after the other."""
    service = bench.ray_service()
    with ray_serving(service):
        await bench.warm_up()
        rate = 0.25 * bench.dense
        load = Load(service.port, bench.examples, retry_seconds=60)
        stopped = asyncio.Event()

        async def ask() -> None:
            while not stopped.is_set():
                await load.run(rate, 1)

        begun = asyncio.create_task(ask())
        await asyncio.sleep(bench.args.seconds / 4)
        since = time.perf_counter()
        await asyncio.to_thread(service.deploy, model_name_or_path=str(bench.checkpoints[1]))
        seconds = time.perf_counter() - since
        stopped.set()
        await begun
        versions = Counter(outcome.verdict[0] for outcome in load.outcomes if outcome.verdict is not None)
        notes = (
            f"the update took {seconds:.0f} s; answered by the first checkpoint: {versions[0]}, by the second: "
            f"{versions[1]}"
        )
        return bench.row("another checkpoint is deployed", f"{rate:.0f}", load.outcomes, since, notes, ON_RAY)


FAULTS: dict[str, Callable[[Bench], Awaitable[dict]]] = {
    "bad_image": bad_image,
    "slow_clients": slow_clients,
    "switches": switches,
    "overload_2": overload(2),
    "overload_4": overload(4),
    "killed": killed,
    "worker_killed": worker_killed,
    "swapped": swapped,
    "full_disk": full_disk,
    "ray_killed": ray_killed,
    "ray_swapped": ray_swapped,
}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    packages = versions("torch", "starlette", "uvicorn", "httptools", "uvloop", "pillow", "ray")
    results = Results(args.output, "Faults under load", COLUMNS, NOTES, packages, resume=args.resume)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        bench.measure_dense()
        for name in args.faults:
            if name.startswith("ray_") and importlib.util.find_spec("ray") is None:
                print(f"{name} is left out: Ray is not installed")
                continue
            results.add([asyncio.run(FAULTS[name](bench))])


if __name__ == "__main__":
    main()
