# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Limits of connections, below the requests that an application sees: how many there are, and how long one may take
over the head of a request. Uvicorn bounds neither."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from tocom_hf.serving.limits import Limits


# for the request of a client that gets nothing but a refusal
_EXCESS_SECONDS = 1.0


def limited_protocol(limits: Limits, count: Callable[[int], None]) -> type[asyncio.Protocol]:
    """Uvicorn's protocol for HTTP/1.1, with limits.

    Args:
        limits: Its `max_connections` and `receive_seconds` are used.
        count: Is told the status of each answer that is given here.
    """
    protocol: Any = AutoHTTPProtocol
    late = _answer(408, "Request Timeout", f"No request has arrived within {limits.receive_seconds:g} s.", "")
    excess = _answer(
        503,
        "Service Unavailable",
        f"{limits.max_connections} connections are open already, which is the limit. Try again later.",
        "Retry-After: 1\r\n",
    )

    class LimitedProtocol(protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._is_excess = len(self.connections) > limits.max_connections
            self._deadline = self.loop.call_later(
                _EXCESS_SECONDS if self._is_excess else limits.receive_seconds, self._end_if_idle
            )

        def data_received(self, data: bytes) -> None:
            if self._is_excess:
                self._refuse(503, excess)
                return
            super().data_received(data)
            if not self._is_idle():
                self._disarm()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(limits.receive_seconds, self._end_if_idle)

        def connection_lost(self, error: Exception | None) -> None:
            self._disarm()
            super().connection_lost(error)

        def _is_idle(self) -> bool:
            """Whether no request is being answered: the head of the next one is not there."""
            return self.cycle is None or self.cycle.response_complete

        def _end_if_idle(self) -> None:
            self._deadline = None
            if self._is_idle():
                self._refuse(408, late)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self, status: int, answer: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()
                count(status)

    return LimitedProtocol


def _answer(status: int, phrase: str, message: str, headers: str) -> bytes:
    content = json.dumps({"error": message}).encode()
    head = (
        f"HTTP/1.1 {status} {phrase}\r\n{headers}Content-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
