# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The image processor that is exported with a model: found, and compared with what runs without transformers."""

from pathlib import Path
from typing import Any

import numpy as np

from tocom_hf.deployed.manifest import PROCESSOR
from tocom_hf.errors import ArgumentError
from tocom_hf.exporting.subject import Subject


def processor_config(processor: Any, subject: Subject) -> dict[str, Any] | None:
    """The configuration of the image processor to export, after a check that it can be reproduced.

    Args:
        processor: An image processor, `None` for the one in the folder that the model was loaded from, or `False` for
            none.
        subject: What is exported.

    Returns:
        The content of `preprocessor_config.json`, or `None` where there is no processor.

    Raises:
        ArgumentError: if it does what cannot be done without transformers, or makes inputs of another size.
    """
    takes_images = subject.backbone.architecture.inputs == "images"
    if processor is None and takes_images:
        processor = _beside(subject)
    if processor is None or processor is False:
        return None
    if not takes_images:
        raise ArgumentError(f"The model takes {subject.input_name}, not images. Export it with processor=False.")
    processor = getattr(processor, "image_processor", processor)  # of a processor for images and text
    if not hasattr(processor, "to_dict"):
        raise ArgumentError(f"processor must be an image processor of transformers, got {type(processor).__name__}.")
    from PIL import Image

    from tocom_hf.deployed.preprocessing import Preprocessing

    config = _plain(processor.to_dict())
    channels, height, width = subject.example.batch.shape[1:]
    preprocessing = Preprocessing.from_config(config, channels)
    pixels = np.random.default_rng(0).integers(0, 256, (height + 37, width + 61, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = preprocessing(image)
    if found.shape != (channels, height, width):
        raise ArgumentError(
            f"The image processor makes inputs of {found.shape[1]} x {found.shape[2]} pixels, but the model is "
            f"exported for {height} x {width}. Give a processor for that size, or export with processor=False."
        )
    _compare(processor, image, found, channels)
    return config


def _beside(subject: Subject) -> Any:
    folder = Path(str(subject.model.config._name_or_path or ""))
    if not (folder.is_dir() and (folder / PROCESSOR).is_file()):
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of a file that it does not understand
        raise ArgumentError(
            f"The image processor in {folder} cannot be loaded: {error!r:.300}. Pass processor=..., or processor=False "
            "to export without one."
        ) from error


def _compare(processor: Any, image: Any, found: np.ndarray, channels: int) -> None:
    """Refuse a processor that makes something else of an image. torchvision's resizing differs by rounding."""
    tolerance = 1e-5 if getattr(processor, "backend", "pil") == "pil" else 0.2
    expected = processor(image if channels == 3 else image.convert("L"), return_tensors="np")["pixel_values"][0]
    if expected.shape != found.shape or not np.allclose(expected, found, rtol=0, atol=tolerance):
        raise ArgumentError(
            f"{type(processor).__name__} does more with an image than its configuration says, so it cannot be "
            "exported. Export with processor=False to give finished pixel_values."
        )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with values that JSON has, and without the path that it was loaded from."""
    plain = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            value = {name: entry for name, entry in value.items() if entry is not None}
        plain[key] = int(value) if key == "resample" and value is not None else value
    plain.pop("_name_or_path", None)
    return plain
