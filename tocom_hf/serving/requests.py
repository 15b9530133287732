# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a client may send: the bytes of one image, or a list of images in JSON, within limits."""

import base64
import binascii
import contextlib
import io
import json
from collections.abc import Iterator

from fastapi import HTTPException
from PIL import Image, ImageOps, UnidentifiedImageError
from starlette.requests import ClientDisconnect, Request

from tocom_hf.data.colour import to_channels
from tocom_hf.serving.limits import Limits


# What a thread would take longer to be handed than to decode. Compressed text and colour profiles are left out, and
# progressive JPEG: a small file of these can take long.
QUICK_BYTES, QUICK_PIXELS = 64 * 2**10, 2**15
_QUICK_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_SLOW_PARTS = (b"zTXt", b"iTXt", b"iCCP", b"\xff\xc2")
# nginx's status for a client that has gone: nobody reads it, but /metrics counts it
CLIENT_GONE = 499
# not all that Pillow reads: some it hands to other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


async def read_body(request: Request, max_bytes: int = Limits.max_bytes) -> bytes:
    """The body of a request; status 400 if it is empty, 413 if it is too large, 499 if the client has gone."""
    too_large = HTTPException(413, f"The body has more than {max_bytes} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(CLIENT_GONE, "The client has gone before its request was there.") from None
    if not body:
        raise HTTPException(400, "The body is empty. Send the bytes of an image.")
    return bytes(body)


def split_body(body: bytes, content_type: str, max_images: int) -> list[bytes]:
    """The files in a body, none of them decoded: the body itself, or those in `{"images": [<base64>, ...]}`; status 400
    if it is something else, 413 if they are too many."""
    if not content_type.startswith("application/json"):
        return [body]
    try:
        content = json.loads(body)
        encoded = content["images"]
        if not isinstance(encoded, list):
            raise TypeError(f"images is {type(encoded).__name__}")
        if len(encoded) > max_images:  # before they are decoded: a small file may hold a large image
            raise HTTPException(413, f"{len(encoded)} images in a request; {max_images} are the limit.")
        files = [base64.b64decode(text, validate=True) for text in encoded]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise HTTPException(400, f'Expected {{"images": [<base64>, ...]}}: {error!r}') from error
    if not files:
        raise HTTPException(400, "There are no images in the list.")
    return files


def open_images(files: list[bytes], max_pixels: int = Limits.max_pixels) -> list[Image.Image]:
    """The images in files, none of them decoded; status 400 if one is none, 413 if together they are too large."""
    images: list[Image.Image] = []
    pixels = 0
    for data in files:
        with _readable():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels += image.width * image.height
        if pixels > max_pixels:
            raise HTTPException(
                413, f"The image has {image.size} pixels; {max_pixels} in all images of a request are the limit."
            )
        images.append(image)
    return images


def is_quick(data: bytes) -> bool:
    """Whether a file is opened in no time, so that it may be without a thread of its own."""
    return len(data) <= QUICK_BYTES and data.startswith(_QUICK_STARTS) and not any(part in data for part in _SLOW_PARTS)


def decode(image: Image.Image, num_channels: int = 3) -> Image.Image:
    """An opened image in RGB, or with one channel in grey, as its camera was held; status 400 if it is damaged."""
    with _readable():
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == ("RGB" if num_channels == 3 else "L"):
            return image
        return to_channels(image, num_channels)


def decode_all(body: bytes, content_type: str, limit: int, num_channels: int) -> list[Image.Image]:
    """All images of a body, one step after the other: `split_body`, `open_images`, `decode`."""
    return [decode(image, num_channels) for image in open_images(split_body(body, content_type, limit))]


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What Pillow raises for a file becomes status 400."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise HTTPException(400, f"The body is not an image of a known format ({', '.join(FORMATS)}).") from error
    except Exception as error:  # Pillow has no type of its own: of damaged files come nearly all that there are
        reason = str(error) or type(error).__name__
        raise HTTPException(400, f"The body is not an image that can be read: {reason}") from error
