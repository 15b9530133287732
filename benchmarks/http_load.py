# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks of the service share: starting it, and asking it at a cost that does not drown what it does.

A general client of HTTP takes about as long over a request as the service itself. This one writes finished bytes and
reads no more of an answer than its length.
"""

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "fashion_mnist" / "checkpoint"
PLUGINS = ROOT / "hub_cards" / "tocom-vit-fashion-mnist"


def make_request(body: bytes, kind: str) -> bytes:
    """The bytes of a request for `/predict`."""
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@dataclass
class Answer:
    """What came of one request."""

    status: int
    headers: dict[str, str]
    body: bytes

    def content(self) -> dict:
        return json.loads(self.body)


class Connection:
    """One connection, over which requests go in turn. It is opened when it is needed.

    A service ends connections that nothing has come over for some seconds. As all clients do, this one opens another
    where it finds that out.

    Raises:
        ConnectionError: where the service refuses a connection, or ends one over which it has a request.
    """

    def __init__(self, port: int):
        self.port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> Answer:
        if self._reader is not None and self._reader.at_eof():
            self.close()
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self._reader is not None
        self._writer.write(request)
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            status = int(head[9:12])
            headers = {}
            for line in head.decode("latin-1").split("\r\n")[1:-2]:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = await self._reader.readexactly(int(headers["content-length"]))
        except asyncio.IncompleteReadError as error:
            self.close()
            raise ConnectionResetError("The service has ended the connection.") from error
        except ConnectionError:
            self.close()
            raise
        if headers.get("connection") == "close":
            self.close()
        return Answer(status, headers, body)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@dataclass
class Service:
    """`tocom serve` of the embedded model, in a process of its own.

    Attributes:
        port: Where it serves.
        options: Of the command, besides model, plugins and port.
        package: The folder whose `tocom_hf` it runs.
        checkpoint: What it serves.
        no_space: Whether no file of it can grow beyond 512 bytes, and what it prints meets a full device.
    """

    port: int
    options: list = field(default_factory=list)
    package: Path = ROOT
    checkpoint: Path = CHECKPOINT
    no_space: bool = False
    process: subprocess.Popen | None = None

    def start(self, wait: bool = True) -> None:
        command = [
            sys.executable, "-m", "tocom_hf.cli.main", "serve", "--model_name_or_path", self.checkpoint,
            "--plugins", PLUGINS, "--port", self.port, *self.options,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(self.package), "HF_HUB_OFFLINE": "1"}
        output = os.open("/dev/full", os.O_WRONLY) if self.no_space else subprocess.PIPE
        self.process = subprocess.Popen(
            [str(part) for part in command], env=environment, cwd=self.package, text=True, stdout=output,
            stderr=subprocess.DEVNULL if self.no_space else None,
            preexec_fn=_forbid_files if self.no_space else None,
        )  # fmt: skip
        if self.no_space:
            os.close(output)
        if wait:
            self.wait()

    def wait_for_line(self) -> None:
        """Until it says that it serves, for where another process answers on the same port, or a part of its own."""
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Serving on "):
                return
        raise SystemExit(f"The service did not start; it ended with the code {self.process.wait()}.")

    def wait(self, seconds: float = 120) -> None:
        """Until it answers, and until all of its workers do."""
        import urllib.request

        if "--workers" in self.options:
            self.wait_for_line()

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process is not None and self.process.poll() is not None:
                raise SystemExit(f"The service did not start; it ended with the code {self.process.returncode}.")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5).close()
                return
            time.sleep(0.05)
        raise SystemExit(f"The service did not answer within {seconds:g} s.")

    def cpu_seconds(self) -> float:
        """Processor time that it has taken, its workers' included."""
        assert self.process is not None
        ticks = 0
        for pid in [self.process.pid, *self.workers()]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def workers(self) -> list[int]:
        """The process ids of its workers; none where it serves in one process."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


# less than a calibration has, and enough for Python, which tries whether it may write temporary files
_MAX_FILE_BYTES = 512


def _forbid_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))


@contextlib.contextmanager
def serving(*services: Service) -> Iterator[None]:
    """Run services within the `with` block."""
    try:
        for service in services:
            service.start(wait=False)
        for service in services:
            service.wait()
        yield
    finally:
        for service in services:
            if service.process is not None and service.process.poll() is None:
                service.stop(signal.SIGKILL)


@contextlib.contextmanager
def package_of(commit: str, without: Sequence[str] = ()) -> Iterator[Path]:
    """A folder with the package of a commit, within the `with` block. What runs in it lacks the packages `without`."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "tocom_hf"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        for name in without:
            Path(folder, f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})\n")
        yield Path(folder)


async def closed_loop(
    port: int, requests: list[bytes], clients: int, count: int, *, may_refuse: bool = False
) -> tuple[float, list[float]]:
    """Send `count` requests, of which `clients` are open at any time.

    Args:
        port: Where the service is.
        requests: What to send, in turn.
        clients: How many ask. Whoever is answered asks again at once, whoever is refused after 20 ms.
        count: How many requests there are, those that are refused among them.
        may_refuse: Whether an answer of 503 is none; otherwise it ends the program, as all others but 200 do.

    Returns:
        The seconds that all of them took, and those of each that was answered.
    """
    seconds: list[float] = []
    numbers = iter(range(count))

    async def client() -> None:
        connection = Connection(port)
        for number in numbers:
            start = time.perf_counter()
            answer = await connection.ask(requests[number % len(requests)])
            if answer.status == 503 and may_refuse:
                await asyncio.sleep(0.02)
                continue
            if answer.status != 200:
                raise SystemExit(f"Status {answer.status}: {answer.body!r}")
            seconds.append(time.perf_counter() - start)
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, seconds


class Sendable(Protocol):
    """A request, and what it says of its answer."""

    request: bytes

    def check(self, content: dict) -> Any:
        """A verdict about the answer, whatever a benchmark makes of it."""


@dataclass
class Outcome:
    """What became of one request.

    Attributes:
        due, done: When it was due, and when it was over.
        status: 0 where the connection broke.
        degree: The degree that an answer names.
        verdict: What the `check` of what was sent says of an answer.
    """

    due: float
    done: float
    status: int
    degree: int | None = None
    verdict: Any = None


class Load:
    """Requests at random times, and what becomes of them.

    Args:
        port: Where the service is.
        examples: What to send, in turn.
        retry_seconds: How long a client tries again where the service breaks off, refuses the connection or answers
            503, first after a tenth of a second, then ever more seldom. It tries once where that is 0.
    """

    def __init__(self, port: int, examples: Sequence[Sendable], retry_seconds: float = 0.0):
        self.port, self.examples, self.retry_seconds = port, examples, retry_seconds
        self.outcomes: list[Outcome] = []
        self._chance, self._idle = random.Random(0), []
        self._slots = asyncio.Semaphore(256)
        self._number = 0

    async def run(self, rate: float, seconds: float) -> None:
        """Send at `rate` a second for so many seconds, and wait for all answers."""
        tasks, due = [], time.perf_counter()
        end = due + seconds
        while (due := due + self._chance.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            example = self.examples[self._number % len(self.examples)]
            self._number += 1
            tasks.append(asyncio.create_task(self._send(example, due)))
        await asyncio.gather(*tasks)

    async def _send(self, example: Sendable, due: float) -> None:
        async with self._slots:
            self.outcomes.append(await self._ask(example, due))

    async def _ask(self, example: Sendable, due: float) -> Outcome:
        pause = 0.1
        while True:
            connection = self._idle.pop() if self._idle else Connection(self.port)
            again = time.perf_counter() < due + self.retry_seconds
            try:
                answer = await asyncio.wait_for(connection.ask(example.request), 60)
            except (OSError, TimeoutError):
                connection.close()
                if not again:
                    return Outcome(due, time.perf_counter(), 0)
                await asyncio.sleep(pause * self._chance.uniform(0.5, 1.5))
                pause = min(2 * pause, 2.0)
                continue
            self._idle.append(connection)
            if answer.status == 503 and again:
                await asyncio.sleep(pause * self._chance.uniform(0.5, 1.5))
                pause = min(2 * pause, 2.0)
                continue
            outcome = Outcome(due, time.perf_counter(), answer.status)
            if answer.status == 200:
                content = answer.content()
                outcome.degree, outcome.verdict = content["target_r"], example.check(content)
            return outcome
