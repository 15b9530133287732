# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Runs the service over HTTP until it is told to stop, and then answers what waits."""

import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from tocom_hf.errors import ArgumentError
from tocom_hf.serving.connections import limited_protocol
from tocom_hf.serving.limits import Limits


# files of the process that are no connections
_OTHER_FILES = 64


def bind(host: str, port: int, reuse_port: bool = False) -> socket.socket:
    """A socket with an address, on which nobody is served yet, and which nobody else can have.

    Args:
        host: Name or address; one with a colon is of IPv6.
        port: 0 for one that is free.
        reuse_port: Whether other processes of the same user may serve it too, if they ask for the same. The system
            hands each new connection to one of them.

    Raises:
        ArgumentError: if the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            if not hasattr(socket, "SO_REUSEPORT"):
                raise OSError(f"{sys.platform} lets no two processes serve one port")
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        # it let the address be had where connections of an earlier service linger; now it would let others have it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ArgumentError(f"The service cannot listen on {host}, port {port}: {reason}. Choose another.") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """What a client types."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def find_max_connections(wanted: int | None) -> int:
    """How many connections may be open at once.

    Args:
        wanted: `None` for what `Limits` say, or less where the process may not open so many files.

    Raises:
        ArgumentError: if more are wanted than the process may open files.
    """
    allowed = _max_open_files() - _OTHER_FILES
    if wanted is None:
        return int(max(1, min(Limits.max_connections, allowed)))
    if wanted > allowed:
        raise ArgumentError(
            f"{wanted} connections need as many open files, and this process may have {allowed:g} of them. Raise that "
            "(ulimit -n), or allow fewer connections."
        )
    return wanted


def _max_open_files() -> float:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return math.inf
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if allowed == resource.RLIM_INFINITY else allowed


def make_server(app: Starlette, listener: socket.socket, started: Callable[[str], None] = lambda address: None) -> Any:
    """A `uvicorn.Server` with the application's limits: `run(sockets=[listener])` serves until `should_exit` is set.

    Args:
        app: From `create_app`.
        listener: From `bind`.
        started: Is told the address when requests are answered.
    """
    limits, metrics = app.state.limits, app.state.metrics
    address = address_of(listener)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await super().startup(sockets)
            started(address)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.stop()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http=limited_protocol(limits, lambda status: metrics.requests.labels(status).inc()),
        ws="none",
        log_level="warning",
        access_log=False,
        # the service ends its requests by itself before
        timeout_graceful_shutdown=math.ceil(limits.answer_seconds) + 2,
    )
    return Server(config)


def serve_until_stopped(
    app: Starlette, listener: socket.socket, started: Callable[[str], None] = lambda address: None
) -> None:
    """Serve until SIGTERM or SIGINT. What waits then is answered, within `Limits.answer_seconds`; new connections are
    refused. Takes the arguments of `make_server`, and must be called in the main thread.

    Where the model is still busy after that time, the process ends at once with the code 1: the interpreter would wait
    for the thread.
    """
    server = make_server(app, listener, started)

    def stop(*_: object) -> None:
        server.should_exit = True

    # When uvicorn has stopped it raises the signal once more, for whoever handled it before.
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if app.state.batcher.running:
        sys.stderr.write("The model is still busy. The process ends without it.\n")
        sys.stderr.flush()
        os._exit(1)
