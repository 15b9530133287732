# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What can be said of a drawn figure without knowing what it shows."""

import numpy as np
from PIL import Image


def assert_drawn(path, least_width, least_height, least_colours=50):
    """The file is a whole PNG of at least this size in pixels, on which something in several colours is drawn."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    height, width, _ = pixels.shape
    assert width >= least_width
    assert height >= least_height
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours) >= least_colours
    assert counts.max() < 0.97 * counts.sum()  # the background is not all there is
