# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Being told to stop: a signal is remembered until the step is finished."""

import contextlib
import os
import signal
import threading
from typing import Any


class StopSignal(contextlib.AbstractContextManager):
    """Remembers SIGTERM and SIGINT, so that a step is finished and a checkpoint written. A second one stops at once."""

    def __init__(self):
        self.signum: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self.previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            signal.signal(signum, self.previous[signum])
            os.kill(os.getpid(), signum)
        self.signum = signum
