# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Locks of a model that threads share; a copy of the model gets its own."""

import contextlib
import threading
from collections.abc import Iterator


class ReadersWriterLock:
    """Lets any number of threads read at once, and a writer only while nobody reads.

    A writer that waits keeps new readers out, so that a stream of readers cannot starve it. A thread that reads already
    may read again. Copies and pickles of a lock are new, free locks: they belong to another model.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._readers = 0
        self._writers_waiting = 0
        self._writing = False
        self._held = threading.local()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock together with other readers."""
        depth = getattr(self._held, "depth", 0)
        if depth == 0:
            with self._condition:
                while self._writing or self._writers_waiting:
                    self._condition.wait()
                self._readers += 1
        self._held.depth = depth + 1
        try:
            yield
        finally:
            self._held.depth = depth
            if depth == 0:
                with self._condition:
                    self._readers -= 1
                    if self._readers == 0:
                        self._condition.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock alone.

        Raises:
            RuntimeError: if this thread is reading, and would wait for itself.
        """
        if getattr(self._held, "depth", 0):
            raise RuntimeError("The weights of a model cannot be switched or moved from within its own forward call.")
        with self._condition:
            self._writers_waiting += 1
            try:
                while self._writing or self._readers:
                    self._condition.wait()
            except BaseException:
                self._condition.notify_all()
                raise
            else:
                self._writing = True
            finally:
                self._writers_waiting -= 1
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()

    def __reduce__(self) -> tuple:
        return ReadersWriterLock, ()


class SwitchLock:
    """A lock of one thread at a time, which may take it again. Copies and pickles of it are new, free locks."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return SwitchLock, ()
