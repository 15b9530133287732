# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images to what the model takes: by the model's processor, or faster where that gives the same pixels."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from tocom_hf.deployed.preprocessing import Preprocessing
from tocom_hf.errors import ArgumentError


# sizes that are enlarged, reduced, cropped and padded by whatever a processor does
_TRIED_SIZES = ((9, 7), (301, 67), (224, 224), (61, 190))


class Preparation:
    """Prepares the images of a request, and then those of a batch.

    A processor of transformers takes longer over a small image than the model does. Where `Preprocessing` stands in for
    it, a request is resized and cropped to 8 bits a channel, and the batch is normalised at once, on the model's
    device. Whether it does is tried out at the start: no pixel of some images may differ by more than one level of
    grey. Other processors do their work themselves.

    Args:
        processor: The model's image processor.
        num_channels: The channels that the model takes.
    """

    def __init__(self, processor: Any, num_channels: int):
        self.processor = processor
        self.stand_in = find_stand_in(processor, num_channels)
        if self.stand_in is not None:
            scale, shift = self.stand_in.scale_and_shift()
            self._scale, self._shift = (torch.from_numpy(values)[:, None, None] for values in (scale, shift))

    def prepare(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """The images of one request: `(n, channels, height, width)`, uint8 where the processor is stood in for, else
        what it makes. Images that are made one after the other are not all held at once where it is.

        Raises:
            ValueError: if they have several sizes, which the processor does not change.
        """
        if self.stand_in is None:
            return self.processor([*images], return_tensors="pt")["pixel_values"]
        pixels = [self.stand_in.pixels(image) for image in images]
        if len({image.shape for image in pixels}) > 1:
            raise ValueError(f"they have several sizes: {', '.join(str(image.shape[1:]) for image in pixels)}")
        return torch.from_numpy(np.stack(pixels))

    def finish(self, pixels: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """What the model takes, from what `prepare` made, of one request or several."""
        pixels = pixels.to(device)
        if self.stand_in is None:
            return pixels.to(dtype)
        scale, shift = self._scale.to(device), self._shift.to(device)
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(scale).add_(shift).to(dtype)


def find_stand_in(processor: Any, num_channels: int) -> Preprocessing | None:
    """What does the work of a processor without transformers; `None` where nothing does."""
    try:
        stand_in = Preprocessing.from_config(processor.to_dict(), num_channels)
    except ArgumentError:
        return None
    scale, shift = (values[:, None, None] for values in stand_in.scale_and_shift())
    chance = np.random.default_rng(0)
    for height, width in _TRIED_SIZES:
        noise = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise).convert("RGB" if num_channels == 3 else "L")
        try:
            expected = np.asarray(processor([image], return_tensors="np")["pixel_values"][0])
        except ValueError:
            return None
        found = stand_in.pixels(image) * scale + shift
        if found.shape != expected.shape or (np.abs(found - expected) > 1.01 * scale).any():
            return None
    return stand_in
