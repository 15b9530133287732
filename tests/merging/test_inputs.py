# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images of any size, and patches and images that are no squares."""

import pytest
import torch
import transformers as hf
from helpers.families import COMMON

from tocom_hf import apply_tome
from tocom_hf.merging.inputs import ascending_noise, patch_grid


def mae(**settings):
    torch.manual_seed(0)
    return hf.ViTMAEModel(hf.ViTMAEConfig(**{**COMMON, "mask_ratio": 0.0, **settings})).eval()


@pytest.mark.parametrize(
    ("size", "patch", "grid"),
    [((32, 32), 4, (8, 8)), ((37, 30), 4, (9, 7)), ((32, 48), [4, 8], (8, 6)), ((35, 47), (8, 4), (4, 11))],
)
def test_what_does_not_fill_a_patch_is_cut_off(size, patch, grid):
    config = hf.ViTMAEConfig(patch_size=patch, image_size=size)
    pixel_values = torch.zeros(2, 3, *size)
    assert patch_grid(config.patch_size, pixel_values) == grid
    convolution = torch.nn.Conv2d(3, 1, patch, patch)
    assert convolution(pixel_values).shape[2:] == grid
    noise = ascending_noise(pixel_values, config)
    assert noise.shape == (2, grid[0] * grid[1])
    assert torch.equal(noise.argsort(dim=1), torch.arange(grid[0] * grid[1]).expand(2, -1))


@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize(
    ("settings", "size"),
    [({}, (38, 33)), ({}, (48, 40)), ({"patch_size": [4, 4], "image_size": [32, 32]}, (32, 32))],
)
@torch.no_grad()
def test_mae_takes_any_size(r, settings, size):
    model = mae(**settings)
    pixel_values = torch.randn(2, 3, *size)
    arguments = {} if size == (32, 32) else {"interpolate_pos_encoding": True}
    rows, columns = size[0] // 4, size[1] // 4
    noise = torch.linspace(0, 1, rows * columns).expand(2, -1)
    expected = model(pixel_values, noise=noise, **arguments).last_hidden_state
    found = apply_tome(model, r)(pixel_values, **arguments).last_hidden_state
    assert found.shape[1] == expected.shape[1] - 4 * r
    if r == 0:
        assert torch.equal(found, expected)
