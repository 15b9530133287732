# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the processes of `Workers` do in tests. Each leaves a file with its process id as its name."""

import os
import signal
import threading
import time
from pathlib import Path

from tocom_hf import ArgumentError


def serve(folder, started):
    """Serve until SIGTERM."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    Path(folder, str(os.getpid())).touch()
    started()
    told.wait()


def serve_for_ever(folder, started):
    """What a hanging model does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, str(os.getpid())).touch()
    started()
    threading.Event().wait()


def fail_second(folder, started):
    """The first serves, and the second ends with the code 3 before it does."""
    try:
        Path(folder, "first").touch(exist_ok=False)
    except FileExistsError:
        os._exit(3)
    serve(folder, started)


def serve_first_two(folder, started):
    """Two serve, and all that come later end before they do."""
    for name in ("first", "second"):
        try:
            Path(folder, name).touch(exist_ok=False)
        except FileExistsError:
            continue
        serve(folder, started)
        return
    Path(folder, f"failed-{os.getpid()}").touch()
    os._exit(4)


def double(number):
    if number is None:
        raise ArgumentError("This is no number.")
    return 2 * number


def leave(code):
    os._exit(code)


def sleep(folder):
    """As a call that takes long."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)
