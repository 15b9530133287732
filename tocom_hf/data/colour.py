# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images of any mode in the channels that a model takes. It needs Pillow and numpy alone, so that a service need not
install data sets."""

from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from tocom_hf.errors import ArgumentError, DatasetError


_MODES = {1: "L", 3: "RGB"}
_BITS_PER_SAMPLE = 258  # the number of a TIFF tag


def to_channels(image: Image.Image, num_channels: int) -> Image.Image:
    """An image in 8 bits a channel, of 16 bits the upper 8, where `Image.convert` would cut them off at 255.

    Transparency is dropped, as image processors do.

    Args:
        image: Of any mode.
        num_channels: 3 for RGB, 1 for grey.

    Raises:
        DatasetError: if the values of its pixels have no known range: of 32 bits, whole or floating point.
    """
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "whole numbers"
        raise DatasetError(
            f"Pillow reads its pixels as {kind} of 32 bits (mode {image.mode}), and where black and white are among "
            "these is not known. Convert it to 8 or 16 bits (PNG) first, or pass samples with finished pixel_values."
        )
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        unused_bits = 4 if tags.get(_BITS_PER_SAMPLE) == (12,) else 8
        image = Image.fromarray((np.asarray(image) >> unused_bits).astype(np.uint8))
    elif image.mode == "La":
        image = image.convert("LA")
    # by way of RGB, because not every mode turns into grey
    image = image.convert("RGB")
    return image if num_channels == 3 else image.convert(_MODES[num_channels])


def model_channels(config: Any) -> int:
    """The channels of the images that a model takes.

    Args:
        config: Of the model; of CLIP and its like that of the vision part counts.
    """
    vision = getattr(config, "vision_config", None) or config
    return getattr(vision, "num_channels", 3)


def find_num_channels(processor: Any, num_channels: int | None = None) -> int:
    """The channels of the images to give to an image processor.

    Args:
        processor: The model's image processor, which tells by its mean and by what it converts.
        num_channels: What the model takes, if that is known.

    Raises:
        ArgumentError: if the processor is made for another number, or images cannot be made in so many.
    """
    told = {}
    mean = getattr(processor, "image_mean", None)
    if getattr(processor, "do_normalize", False) and isinstance(mean, Collection):
        told["image_mean"] = len(mean)
    if getattr(processor, "do_convert_rgb", False):
        told["do_convert_rgb"] = 3
    if num_channels is None:
        num_channels = next(iter(told.values()), 3)
    for setting, channels in told.items():
        if channels != num_channels:
            raise ArgumentError(
                f"The model takes images of {num_channels} {'channel' if num_channels == 1 else 'channels'}, but the "
                f"setting {setting} of its image processor is for {channels}. Correct its preprocessor_config.json: "
                "image_mean and image_std need a value for each channel, and do_convert_rgb is for 3."
            )
    if num_channels not in _MODES:
        raise ArgumentError(
            f"Image files become images of 1 channel (grey) or 3 (RGB), but the model takes {num_channels}. "
            "Pass samples with finished pixel_values."
        )
    return num_channels
