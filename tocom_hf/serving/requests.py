# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a client may send: the bytes of one image, or a list of images in JSON, within limits."""

import base64
import binascii
import io
import json

from fastapi import HTTPException, Request
from PIL import Image, ImageOps, UnidentifiedImageError

from tocom_hf.data.colour import to_channels


MAX_BYTES, MAX_PIXELS = 16 * 2**20, 64 * 10**6
# not all that Pillow reads: some it hands to other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def decode(data: bytes, num_channels: int = 3) -> Image.Image:
    """An image in RGB, or with one channel in grey, from the bytes of a file; status 400 if they are none, 413 if it is
    too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise HTTPException(413, f"The image has {image.size} pixels; {MAX_PIXELS} in all are the limit.")
        return to_channels(ImageOps.exif_transpose(image), num_channels)
    except HTTPException:
        raise
    except UnidentifiedImageError as error:
        raise HTTPException(400, f"The body is not an image of a known format ({', '.join(FORMATS)}).") from error
    except Exception as error:  # Pillow has no type of its own: of damaged files come nearly all that there are
        reason = str(error) or type(error).__name__
        raise HTTPException(400, f"The body is not an image that can be read: {reason}") from error


async def read_body(request: Request) -> bytes:
    """The body of a request; status 400 if it is empty, 413 if it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"The body has more than {MAX_BYTES} bytes.")
    if not body:
        raise HTTPException(400, "The body is empty. Send the bytes of an image.")
    return bytes(body)


def decode_all(body: bytes, content_type: str, limit: int, num_channels: int) -> list[Image.Image]:
    """The image that is the body; or those in a JSON body `{"images": [<base64>, ...]}`, no more than `limit`."""
    if not content_type.startswith("application/json"):
        return [decode(body, num_channels)]
    try:
        encoded = json.loads(body)["images"]
        files = [base64.b64decode(text, validate=True) for text in encoded]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise HTTPException(400, f'Expected {{"images": [<base64>, ...]}}: {error!r}') from error
    if not files:
        raise HTTPException(400, "There are no images in the list.")
    if len(files) > limit:  # before they are decoded: a small file may hold a large image
        raise HTTPException(413, f"{len(files)} images in a request; {limit} are the limit.")
    return [decode(file, num_channels) for file in files]
