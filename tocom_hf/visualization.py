# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of merged tokens, painted over the image as in the ToMe paper (figure 4)."""

import numpy as np
import torch
from PIL import Image

from tocom_hf.errors import UnsupportedInputError


def paint_groups(
    image: Image.Image, positions: torch.Tensor, grid: tuple[int, int], *, size: int = 224, border: int = 1
) -> Image.Image:
    """Paint every group of merged patches in its mean colour, with a line where two groups meet.

    Args:
        image: The image that went into the model, before normalisation.
        positions: Output position of every patch, int64 `(patches,)`, without protected tokens: one image of
            `trace.positions[layer][:, trace.protected:]`.
        grid: Patches from top to bottom and from left to right.
        size: Height of the picture in pixels, rounded to whole patches.
        border: Width of the lines in pixels.

    Returns:
        An RGB picture.

    Raises:
        UnsupportedInputError: if `positions` is not one index for every patch of the grid.

    Example:

    ```python
    >>> import torch
    >>> from PIL import Image
    >>> from tocom_hf import paint_groups
    >>> paint_groups(Image.new("RGB", (28, 28), "red"), torch.tensor([0, 0, 1, 2]), grid=(2, 2), size=56).size
    (56, 56)

    ```
    """
    rows, columns = grid
    if positions.shape != (rows * columns,):
        raise UnsupportedInputError(
            f"positions has shape {tuple(positions.shape)}, but a grid of {rows} x {columns} patches needs "
            f"({rows * columns},): one image, without protected tokens."
        )
    cell = max(size // rows, 2 * border + 1)
    enlarged = image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    pixels = np.asarray(enlarged, float)  # (height, width, 3)
    patches = positions.cpu().numpy().reshape(rows, columns)
    groups = patches.repeat(cell, 0).repeat(cell, 1)  # (height, width)
    counts = np.maximum(np.bincount(groups.ravel()), 1)  # (groups,)
    sums = [np.bincount(groups.ravel(), pixels[..., channel].ravel()) for channel in range(3)]
    means = np.stack(sums, axis=-1) / counts[:, None]  # (groups, 3)
    painted = means[groups]  # (height, width, 3)
    edges = np.zeros(groups.shape, bool)
    for shift in range(1, border + 1):
        edges[shift:] |= groups[shift:] != groups[:-shift]
        edges[:, shift:] |= groups[:, shift:] != groups[:, :-shift]
    # a line that stands out from dark and light groups alike
    painted[edges] = np.where(painted[edges].mean(-1, keepdims=True) > 127, 0.0, 255.0)
    return Image.fromarray(painted.round().astype(np.uint8))


def tile(pictures: list[list[Image.Image]], *, gap: int = 4) -> Image.Image:
    """Put rows of pictures of one size into one picture on white.

    Args:
        pictures: Rows of pictures.
        gap: Pixels between them.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tocom_hf import tile
    >>> tile([[Image.new("RGB", (20, 10), colour) for colour in ("red", "green")]], gap=4).size
    (44, 10)

    ```
    """
    width, height = pictures[0][0].size
    columns = max(len(row) for row in pictures)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(pictures) * (height + gap) - gap), "white")
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + gap), y * (height + gap)))
    return sheet
