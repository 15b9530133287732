# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Image files that cannot be read, and how the user is told which one and why. It needs Pillow and numpy alone."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from tocom_hf.data.colour import to_channels
from tocom_hf.errors import DatasetError, UnreadableImageError


def decode_image(
    read: Callable[[], Image.Image], name: Callable[[], str], num_channels: int, *, local: bool = True
) -> Image.Image:
    """Decode an image into the channels that a model takes.

    Args:
        read: Opens, decodes and turns the image upright, and does nothing else.
        name: Says what the user knows the image by, when that is needed.
        num_channels: As in `to_channels`.
        local: Whether the image is on this machine. Of one that is not, a failure may be the network's.

    Raises:
        UnreadableImageError: if the file is damaged, or larger than Pillow decodes.
        DatasetError: if the file cannot be opened, memory runs out, or its pixels have no known range.
    """
    try:
        image = read()
    except Exception as error:  # Pillow has no type of its own: of damaged files come nearly all that there are
        # Pillow's text shows the address of an object
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is of no image format that Pillow knows" if unknown else str(error) or type(error).__name__
        # what has a number comes from the operating system, which may have another answer next time
        lasting = local and not isinstance(error, MemoryError) and getattr(error, "errno", None) is None
        kind = UnreadableImageError if lasting else DatasetError
        raise kind(f"The image {name()} cannot be read: {reason}. Repair it or take it out of the data.") from error
    try:
        return to_channels(image, num_channels)
    except DatasetError as error:
        raise DatasetError(f"The image {name()} cannot be used: {error}") from error


def decode_file(path: Path, num_channels: int) -> Image.Image:
    """Decode an image file, turned upright, into the channels that a model takes.

    Raises:
        DatasetError: if it cannot be read.
    """
    return decode_image(lambda: ImageOps.exif_transpose(Image.open(path)), lambda: str(path), num_channels)
