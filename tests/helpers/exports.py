# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Exported folders for tests: a model with plugins, and what PyTorch gives at each of its degrees."""

import numpy as np
import torch

from helpers.models import make_model, make_plugins
from tocom_hf import TocomModel


def make_tocom_model(source_r=2, target_r=None, layers=2, merging=None, **settings):
    """A model with plugins on query and value. Of two layers one has no token sizes yet, and one has them."""
    model = make_model(num_hidden_layers=layers, **settings)
    plugins = make_plugins(model, **({} if merging is None else {"merging": merging}))
    return TocomModel.from_pretrained(model, plugins=plugins, source_r=source_r, target_r=target_r)


def make_images(count=3, seed=5, side=32):
    return np.random.default_rng(seed).standard_normal((count, 3, side, side)).astype(np.float32)


def logits_at(model, degree, images):
    """The logits of a `TocomModel` at a degree, as an array."""
    with torch.no_grad(), model.at(degree):
        return model(pixel_values=torch.from_numpy(images)).logits.numpy()


def copy_of(folder, target):
    """A copy that a test may damage."""
    for path in folder.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target
