# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Tokens and floating-point operations of a forward pass at a degree, counted while it runs on example inputs."""

import contextlib
import inspect
from typing import NamedTuple, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tocom_hf.errors import ArgumentError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.inputs import as_pair, clip_shape, main_input_name, model_inputs
from tocom_hf.merging.patching import get_settings, merging_at
from tocom_hf.merging.schedule import Schedule, require_degree, tokens_per_layer
from tocom_hf.merging.state import MergeSettings


def count_flops(model: PreTrainedModel, r: int, image_size: int | tuple[int, int] | None = None) -> int:
    """Floating-point operations for one image (spectrogram, clip) at a degree, as `torch.utils.flop_counter` counts.

    A multiply-add is two operations; papers that count multiply-adds report half. Attention is counted as the two
    matrix products that it consists of, whichever kernel the model uses. Of a bare V-JEPA 2 its encoder is counted.

    Args:
        model: A supported model. It is left as it was.
        r: The degree.
        image_size: Height and width in pixels; by default those of the model's configuration. Only for images.

    Raises:
        UnsupportedModelError: if the architecture is not supported.
        DegreeError: if `r` is not a degree.
        ArgumentError: if the image size is out of range, or the model takes no images.

    Example:

    ```python
    >>> from tocom_hf import count_flops
    >>> from transformers import AutoModelForImageClassification
    >>> model = AutoModelForImageClassification.from_pretrained("examples/fashion_mnist/checkpoint")
    >>> round(count_flops(model, 0) / count_flops(model, 8), 1)
    3.6

    ```
    """
    degree = require_degree(r, "r")
    example = Example.of(find_backbone(model), image_size, batch_size=1)
    return example.count_at(degree).flops


class DegreeCount(NamedTuple):
    """What can be counted of one degree.

    Attributes:
        tokens: Tokens that enter the first layer, and tokens after each layer.
        flops: Floating-point operations for one image.
    """

    tokens: tuple[int, ...]
    flops: int


class Example(NamedTuple):
    """A batch to run, in order to see what a model costs.

    Attributes:
        backbone: The model's backbone.
        module: What is run: the model, or its vision backbone alone where the model wants text too, as one that
            describes images does.
        batch: The inputs, as `Architecture.inputs` has them, on the model's device and in its dtype.
    """

    backbone: Backbone
    module: PreTrainedModel
    batch: torch.Tensor

    @classmethod
    def of(cls, backbone: Backbone, image_size: int | tuple[int, int] | None, batch_size: int) -> "Example":
        """Random inputs of a size, by default the one that the model's configuration names.

        Raises:
            ArgumentError: if the size is out of range, or is given for a model that takes no images.
        """
        model = backbone.model
        kind = backbone.architecture.inputs
        if kind != "images" and image_size is not None:
            raise ArgumentError(
                f"{type(model).__name__} takes {kind}, not images, and only at the size that its configuration names: "
                "leave image_size out."
            )
        generator = torch.Generator().manual_seed(0)
        if kind == "spectrograms":
            batch = _spectrograms(backbone, batch_size, generator)
        elif kind == "clips":
            batch = _clips(backbone, batch_size, generator)
        elif kind == "patch sequences":
            batch = _patch_sequences(backbone, batch_size, generator)
        else:
            batch = _images(backbone, image_size, batch_size, generator)
        images_suffice = main_input_name(model) == main_input_name(backbone.module) and not _wants_text(model)
        module = model if images_suffice else backbone.module
        return cls(backbone, module, batch.to(next(model.parameters()).device, model.dtype))

    def run(self) -> None:
        """One forward pass of the batch."""
        self.module(**model_inputs(self.module, self.backbone, self.batch))

    @torch.no_grad()
    def count_at(self, degree: Schedule) -> DegreeCount:
        """Run the first image at a degree, and count."""
        backbone = self.backbone
        model = backbone.model
        entering: list[int] = []
        hook = backbone.layers[0].register_forward_pre_hook(lambda layer, args: entering.append(args[0].shape[1]))
        implementation = model.config._attn_implementation
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            if implementation not in ("eager", "sdpa"):  # kernels from outside torch are not counted
                stack.callback(model.set_attn_implementation, implementation)
                model.set_attn_implementation("sdpa")
            stack.enter_context(merging_at(backbone, degree))
            # the counter does not know all fused kernels: let attention be computed by matrix products
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            counter = stack.enter_context(FlopCounterMode(display=False))
            self._replace(batch=self.batch[:1]).run()
            settings = cast(MergeSettings, get_settings(backbone))
        tokens = tokens_per_layer(list(settings.schedule), len(backbone.layers), entering[0], backbone.protected)
        if settings.class_tokens_only:
            tokens[-1] = backbone.protected
        return DegreeCount((entering[0], *tokens), counter.get_total_flops())


def _images(
    backbone: Backbone, image_size: int | tuple[int, int] | None, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Random images, `(batch, channels, height, width)`."""
    measures = backbone.dimensions
    height, width = height_and_width(measures.image_size if image_size is None else image_size)
    patch_height, patch_width = as_pair(measures.patch_size)
    if height < patch_height or width < patch_width:
        raise ArgumentError(
            f"image_size must be at least a patch of {patch_height} x {patch_width}, got {image_size!r}."
        )
    # neighbouring patches resemble each other, as in photographs
    coarse = torch.randn(batch_size, measures.num_channels or 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def _spectrograms(backbone: Backbone, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Random spectrograms, `(batch, frames, mel bins)`."""
    config = backbone.module.config
    return torch.randn(batch_size, config.max_length, config.num_mel_bins, generator=generator)


def _clips(backbone: Backbone, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Random clips, `(batch, frames, channels, height, width)`, in which neighbours in space and time are alike."""
    frames, channels, height, width = clip_shape(backbone)
    coarse = torch.randn(batch_size, channels, 4, 8, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    return fine.transpose(1, 2)


def _patch_sequences(backbone: Backbone, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Random images as sequences of patches, `(batch, patches, values)`."""
    config = backbone.module.config
    values = config.num_channels * config.patch_size**2
    return torch.randn(batch_size, config.num_patches, values, generator=generator)


def _wants_text(model: PreTrainedModel) -> bool:
    """Whether a model takes tokens of text beside images, as one with a decoder does."""
    return any(name.endswith("input_ids") for name in inspect.signature(type(model).forward).parameters)


def height_and_width(size: object) -> tuple[int, int]:
    """Height and width of what a caller gives as one integer or two."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(side) is int for side in pair):
        raise ArgumentError(f"image_size must be an integer or two, height and width, got {size!r}.")
    return pair[0], pair[1]
