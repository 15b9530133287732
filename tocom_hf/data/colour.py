# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images of any mode as RGB. It needs Pillow and numpy alone, so that a service need not install data sets."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, 8 bits each; of 16 bits the upper 8, where `Image.convert` would cut them off at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
