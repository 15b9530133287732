# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The arguments that a model's forward needs for a batch of images."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from tocom_hf.merging.architectures import Backbone


def model_inputs(module: PreTrainedModel, backbone: Backbone, pixel_values: torch.Tensor) -> dict[str, Any]:
    """The arguments of a forward call under the names that the model gives them.

    Args:
        module: What is called: the whole model, or its backbone.
        backbone: The backbone in it.
        pixel_values: `(batch, channels, height, width)`, or what the model takes instead.
    """
    config = backbone.module.config
    inputs: dict[str, Any] = {module.main_input_name: pixel_values}
    trained_at = getattr(config, "image_size", None)
    if isinstance(trained_at, int):
        trained_at = (trained_at, trained_at)
    takes_any_size = "interpolate_pos_encoding" in inspect.signature(type(module).forward).parameters
    if takes_any_size and trained_at is not None and tuple(trained_at) != tuple(pixel_values.shape[2:]):
        inputs["interpolate_pos_encoding"] = True
    if backbone.architecture.shuffles_patches:
        # without merging the order of the patches decides about rounding alone, but about that it does
        inputs["noise"] = ascending_noise(pixel_values, config.patch_size)
    return inputs


def ascending_noise(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The `noise` with which ViT-MAE leaves the patches in order: float32 `(batch, patches)`.

    It shuffles the patches by random noise even where it masks none.
    """
    patches = pixel_values[0, 0].numel() // patch_size**2
    return torch.linspace(0, 1, patches, device=pixel_values.device).expand(len(pixel_values), -1)
