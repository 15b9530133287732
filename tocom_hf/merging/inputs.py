# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The arguments that a model's forward needs for a batch of images or clips, and their sizes."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tocom_hf.merging.backbones import Backbone


def model_inputs(module: PreTrainedModel, backbone: Backbone, pixel_values: torch.Tensor) -> dict[str, Any]:
    """The arguments of a forward call under the names that the model gives them.

    Args:
        module: What is called: the whole model, or its backbone.
        backbone: The backbone in it.
        pixel_values: `(batch, channels, height, width)`, or what the model takes instead (`Architecture.inputs`).
    """
    config = backbone.module.config
    inputs: dict[str, Any] = {main_input_name(module): pixel_values}
    parameters = inspect.signature(type(module).forward).parameters
    if "skip_predictor" in parameters:  # what comes behind the encoder predicts masked parts, and changes none of it
        inputs["skip_predictor"] = True
    # of clips at other sizes, models scale their positions wrongly
    takes_any_size = "interpolate_pos_encoding" in parameters and backbone.architecture.inputs == "images"
    trained_at = getattr(config, "image_size", None)
    if takes_any_size and trained_at is not None and as_pair(trained_at) != tuple(pixel_values.shape[2:]):
        inputs["interpolate_pos_encoding"] = True
    if backbone.architecture.inputs == "patch sequences":
        batch, patches = pixel_values.shape[:2]
        side = math.isqrt(patches)
        shape = torch.tensor([side, patches // side], device=pixel_values.device)
        inputs["pixel_attention_mask"] = torch.ones(batch, patches, dtype=torch.int64, device=pixel_values.device)
        inputs["spatial_shapes"] = shape.expand(batch, 2)
    if backbone.architecture.shuffles_patches:
        # without merging the order of the patches decides about rounding alone, but about that it does
        inputs["noise"] = ascending_noise(pixel_values, config)
    return inputs


def clip_shape(backbone: Backbone) -> tuple[int, int, int, int]:
    """Frames, channels, height and width of the clips that a backbone takes."""
    frames, channels, size = (getattr(backbone.module.config, name) for name in backbone.architecture.clip_sizes)
    return frames, channels, *as_pair(size)


def main_input_name(module: PreTrainedModel) -> str:
    """What the forward of a model calls its images or spectrograms.

    Some vision towers inherit `input_ids` as their `main_input_name`, which their forward does not take.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    named = module.main_input_name
    return named if named in names or not names else names[0]


def ascending_noise(pixel_values: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """The `noise` with which ViT-MAE leaves the patches in order: float32 `(batch, patches)`.

    It shuffles the patches by random noise even where it masks none.
    """
    rows, columns = patch_grid(config.patch_size, pixel_values)
    return torch.linspace(0, 1, rows * columns, device=pixel_values.device).expand(pixel_values.shape[0], -1)


def patch_grid(patch_size: int | Sequence[int], pixel_values: torch.Tensor) -> tuple[int, int]:
    """Patches from top to bottom and from left to right; what does not fill a patch is cut off.

    Args:
        patch_size: Of the backbone, in pixels.
        pixel_values: `(batch, channels, height, width)`.
    """
    patch_height, patch_width = as_pair(patch_size)
    return pixel_values.shape[2] // patch_height, pixel_values.shape[3] // patch_width


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of what a configuration gives as one integer or as two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
