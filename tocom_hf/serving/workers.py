# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Several processes that serve one address, and a parent that starts another where one ends.

Every process has a model, a queue and a policy of its own, and the system hands each new connection to one of them.
They share nothing but the address and the figures of `/metrics`.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tocom_hf.errors import ArgumentError, WorkersError


METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Of the environment: where `prometheus_client` keeps the figures of several processes."""

_METRICS_PREFIX = "tocom-metrics-"

# between two starts in the place of a process that never came to serve
_PAUSE_SECONDS = 10.0


def require_shared_ports() -> None:
    """Raise where the system does not spread the connections to one port over processes.

    Raises:
        ArgumentError: on other systems than Linux: there the process that came last gets all of them, or none may come.
    """
    if sys.platform != "linux":
        raise ArgumentError(f"Several workers need Linux to spread connections over them, and this is {sys.platform}.")


@contextlib.contextmanager
def shared_metrics() -> Iterator[Callable[[int], None]]:
    """Let processes that are started within the `with` block show the sum of their figures: see `Metrics`.

    They keep them in files, in memory where the system has files there, because that is how `prometheus_client` does it
    where a variable of the environment says so. Yields what is to be told the id of each process that has ended.
    """
    from prometheus_client import multiprocess

    before = os.environ.get(METRICS_FOLDER)
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix=_METRICS_PREFIX, dir=memory if os.access(memory, os.W_OK) else None)
    os.environ[METRICS_FOLDER] = folder
    try:
        yield lambda pid: multiprocess.mark_process_dead(pid, folder)
    finally:
        if before is None:
            del os.environ[METRICS_FOLDER]
        else:
            os.environ[METRICS_FOLDER] = before
        shutil.rmtree(folder, ignore_errors=True)


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or raises, in a process of its own. Its memory is free again afterwards.

    Args:
        function: Of a module, so that the process can import it.
        arguments: Pickled for the process, as the answer is for this one.

    Raises:
        WorkersError: if the process ends without an answer.
    """
    context = multiprocessing.get_context("spawn")
    answer, tell = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, arguments, tell))
    process.start()
    tell.close()
    try:
        result, error = answer.recv()
    except EOFError:
        process.join()
        raise WorkersError(f"The process for {function.__name__} ended with the code {process.exitcode}.") from None
    finally:
        process.terminate()
        process.join()
    if error is not None:
        raise error
    return result


class Workers:
    """Processes that do the same until they are told to stop.

    Args:
        target: What each of them does: `target(*arguments, started)`. It calls `started()` once it serves, and ends on
            SIGTERM with the code 0. It is imported by the processes, so it must be a function of a module.
        arguments: Pickled for the processes.
        count: How many there are.
        stop_seconds: How long they may take to end. Then they are killed.
    """

    def __init__(self, target: Callable[..., None], arguments: tuple, count: int, stop_seconds: float):
        self.target, self.arguments = target, arguments
        self.count, self.stop_seconds = count, stop_seconds
        self._workers: list[_Worker] = []
        self._due: list[float] = []

    def run(self, started: Callable[[], None], ended: Callable[[int, int], None]) -> int:
        """Keep so many processes running until SIGTERM or SIGINT, and then stop them. For the main thread.

        Args:
            started: Is called when all of them serve for the first time.
            ended: Is told the process id and the exit code of each that ends by itself.

        Returns:
            0 where all have ended in time and with the code 0 when they were told to, else 1.

        Raises:
            WorkersError: if one ends before all of them serve for the first time.
            OSError: if one cannot be started by then.
        """
        with _told_by_signals() as told:
            try:
                while len(self._workers) < self.count:
                    self._workers.append(self._start())
                self._wait_for_all(told, ended)
                if not told:
                    started()
                while not told:
                    self._watch(told, ended)
            finally:
                clean = self._stop()
        return 0 if clean else 1

    def _wait_for_all(self, told: "_Told", ended: Callable[[int, int], None]) -> None:
        while not told and not all(worker.serves for worker in self._workers):
            for worker in self._news(told, None):
                ended(worker.pid, worker.code)
                raise WorkersError(f"Worker {worker.pid} ended with the code {worker.code} before all of them served.")

    def _watch(self, told: "_Told", ended: Callable[[int, int], None]) -> None:
        """Wait for one to end, or for the time when another may be started."""
        pause = max(0.0, min(self._due) - time.monotonic()) if self._due else None
        for worker in self._news(told, pause):
            ended(worker.pid, worker.code)
            self._workers.remove(worker)
            self._due.append(time.monotonic() + (0 if worker.serves else _PAUSE_SECONDS))
        if told:
            return
        now = time.monotonic()
        for due in [due for due in self._due if due <= now]:
            self._due.remove(due)
            try:
                self._workers.append(self._start())
            except OSError:  # no memory, or too many processes or files: the others serve on
                self._due.append(now + _PAUSE_SECONDS)

    def _news(self, told: "_Told", timeout: float | None) -> list["_Worker"]:
        """Wait for something to happen. Returns those that have ended."""
        waiting = [worker for worker in self._workers if not worker.serves]
        ready = wait(
            [told.alarm, *(worker.process.sentinel for worker in self._workers), *(worker.news for worker in waiting)],
            timeout,
        )
        told.drain()
        for worker in waiting:
            if worker.news in ready:
                worker.hear()
        return [worker for worker in self._workers if worker.process.sentinel in ready]

    def _start(self) -> "_Worker":
        return _Worker(self.target, self.arguments)

    def _stop(self) -> bool:
        """Whether all ended in time, with the code 0."""
        end, clean = time.monotonic() + self.stop_seconds, True
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            # one that had not come to serve knows no clean end
            clean = clean and (worker.process.exitcode == 0 or not worker.serves)
        return clean


class _Told:
    """Whether a signal has told this process to stop, and a file that can be read from when any signal has come.

    A handler alone would run too late: Python runs it when what waits has returned, and a signal that comes just before
    that begins to wait does not end it.
    """

    def __init__(self) -> None:
        self.alarm, self.ring = os.pipe()
        os.set_blocking(self.alarm, False)
        os.set_blocking(self.ring, False)
        self._by: int | None = None

    def __bool__(self) -> bool:
        return self._by is not None

    def handle(self, number: int, frame: object) -> None:
        self._by = number

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.alarm, 4096)

    def close(self) -> None:
        os.close(self.alarm)
        os.close(self.ring)


@contextlib.contextmanager
def _told_by_signals() -> Iterator[_Told]:
    """Let SIGTERM and SIGINT tell it within the `with` block."""
    told = _Told()
    before = signal.set_wakeup_fd(told.ring, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, told.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        told.close()


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, target: Callable[..., None], arguments: tuple):
        self.news, tell = multiprocessing.Pipe(duplex=False)
        self.serves = False
        self.process = multiprocessing.get_context("spawn").Process(target=_work, args=(target, arguments, tell))
        self.process.start()
        tell.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def code(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def hear(self) -> None:
        """It has said that it serves, or ended without."""
        with contextlib.suppress(EOFError):
            self.news.recv()
            self.serves = True


def _work(target: Callable[..., None], arguments: tuple, tell: Connection) -> None:
    """What a process runs."""
    _follow_the_parent()

    def started(*_: Any) -> None:
        tell.send(None)
        tell.close()

    target(*arguments, started)
    # it has ended as it should, whoever tells it once more
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _answer(function: Callable[..., Any], arguments: tuple, tell: Connection) -> None:
    """What the process of `call_apart` runs."""
    _follow_the_parent()
    answer: tuple[Any, Exception | None]
    try:
        answer = (function(*arguments), None)
    except Exception as error:
        answer = (None, error)
    tell.send(answer)


def _follow_the_parent() -> None:
    """Leave Ctrl+C, which reaches all processes of a terminal, to the parent, and end when that is gone."""
    # blocked, because a server sets a handler of its own
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Where the parent was killed, nobody else would stop this process, start it anew, or tidy up."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    folder = os.environ.get(METRICS_FOLDER, "")
    if Path(folder).name.startswith(_METRICS_PREFIX):  # and not one that the user named
        shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
