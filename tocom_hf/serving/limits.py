# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What one client may take of the service, so that it costs the others nothing."""

import asyncio
from dataclasses import dataclass
from types import TracebackType

from fastapi import HTTPException

from tocom_hf.errors import ArgumentError


# Pillow refuses more than twice its MAX_IMAGE_PIXELS, whatever a service allows.
_PILLOW_MAX_PIXELS = 2 * (2**30 // 4 // 3)


@dataclass(frozen=True)
class Limits:
    """Bounds of the service.

    Attributes:
        max_bytes: Bytes of a body. Bodies that arrive are held in memory, so that the service may hold
            `max_connections * max_bytes` of them.
        max_pixels: Pixels of the images of one request together, before they are resized.
        max_images: Images in a request; a full batch where it is `None`.
        max_connections: Connections that are open at once.
        receive_seconds: Within these the head of a request must arrive, and within as many its body.
        answer_seconds: Within these a request must be answered, from when its body is there. When the service is told
            to stop, it goes on for as long to answer what waits.

    Raises:
        ArgumentError: if one of them is out of range.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = 64 * 10**6
    max_images: int | None = None
    max_connections: int = 512
    receive_seconds: float = 10.0
    answer_seconds: float = 20.0

    def __post_init__(self) -> None:
        counts = {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels, "max_connections": self.max_connections}
        if self.max_images is not None:
            counts["max_images"] = self.max_images
        for name, count in counts.items():
            if count < 1:
                raise ArgumentError(f"{name} must be at least 1, got {count}.")
        if self.max_pixels > _PILLOW_MAX_PIXELS:
            raise ArgumentError(
                f"max_pixels must be at most {_PILLOW_MAX_PIXELS}, got {self.max_pixels}: Pillow opens no larger image."
            )
        for name in ("receive_seconds", "answer_seconds"):
            seconds = getattr(self, name)
            if not 0 < seconds < float("inf"):
                raise ArgumentError(f"{name} must be positive and finite, got {seconds:g}.")


class Deadline:
    """The time that a step of a request may take: `async with Deadline(10, HTTPException(408, "...")):`.

    Args:
        seconds: How long the block may take.
        refusal: What the block raises when its time is over.
    """

    def __init__(self, seconds: float, refusal: HTTPException):
        self.refusal = refusal
        self._timeout = asyncio.timeout(seconds)

    def end(self, refusal: HTTPException) -> None:
        """End the block now, from another task, with another refusal. Does nothing to one that is ending already."""
        if not self._timeout.expired():
            self.refusal = refusal
            self._timeout.reschedule(0)

    async def __aenter__(self) -> "Deadline":
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise self.refusal from None
