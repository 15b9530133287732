# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The image processor of a timm checkpoint as one of transformers' own, which tells its sizes and can be saved."""

import math
from typing import Any

from PIL import Image


_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def as_image_processor(processor: Any) -> Any:
    """A processor of transformers that gives the same pixels as that of a timm checkpoint.

    Where an odd number of rows or columns is cut off, the crop of transformers may begin one pixel earlier: it rounds
    down, timm's to the nearest even number.

    Args:
        processor: An image processor. One that is not of timm comes back as it is, and so does one of timm that does
            more than resize, crop at the centre and normalise.

    Returns:
        A `BitImageProcessorPil`, or `processor`.
    """
    if type(processor).__name__ != "TimmWrapperImageProcessor":
        return processor
    from transformers import BitImageProcessorPil

    settings = processor.data_config
    channels, height, width = settings["input_size"]
    known = settings["interpolation"] in _FILTERS and settings.get("crop_mode") in ("center", "squash")
    if not known or height != width or channels != 3:
        return processor
    resized = math.floor(height / settings["crop_pct"])
    squashes = settings["crop_mode"] == "squash"
    return BitImageProcessorPil(
        size={"height": resized, "width": resized} if squashes else {"shortest_edge": resized},
        crop_size={"height": height, "width": width},
        resample=_FILTERS[settings["interpolation"]],
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )
