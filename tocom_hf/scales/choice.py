# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which scale s to put in front of the plugins: the scales to choose from, and a choice that needs no labels."""

import math
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from tocom_hf.devices import evaluation_mode
from tocom_hf.distillation.objectives import find_objective
from tocom_hf.errors import ArgumentError, DatasetError
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.plugins.composition import require_scale


PAPER_SCALES = (0.05, 0.08, 0.1, 0.12, 0.15)
WIDE_SCALES = (*PAPER_SCALES, 0.2, 0.25, 0.3)


def pick_scale(
    model: TocomModel,
    images: Dataset,
    target_r: int,
    *,
    scales: Sequence[float] = (0.0, *WIDE_SCALES),
    batch_size: int = 100,
) -> float:
    """The scale at which a model at `target_r` agrees best with itself at `source_r`, on images without labels.

    A plugin set recommends one scale for all models and degrees. A hundred images of the task that the model serves say
    more: what plugins are distilled for, `KL(model at source_r || model at target_r)` (ToCom, eq. 6; where the head
    predicts values or there is none, the distance of the values or of the features), is measured for this model. With
    0 among the scales the answer may be to merge without compensation.

    Agreement is not accuracy: below `source_r` a model may be better as it is than at its own degree. Labels tell.

    Args:
        model: A model with plugins. It is left as it was; run at the answer with `model.set_target_r(target_r, scale)`.
        images: Samples with finished `pixel_values`, float `(channels, height, width)`, of clips with the frames in
            front; labels are not looked at.
        target_r: The degree to run at.
        scales: The scales to choose from, in any order.
        batch_size: Images per forward pass.

    Returns:
        The scale of the smallest mean divergence; of equals the first.

    Raises:
        DatasetError: if there are no images.
        DegreeError: if the degree is outside the plugin set, or a scale is not a finite number.
        ArgumentError: if there are no scales, or the model has no plugins or runs at its source degree anyway.

    Example:

    ```python
    >>> import torch
    >>> from tocom_hf import TocomModel, pick_scale
    >>> model = TocomModel.from_pretrained(
    ...     "examples/fashion_mnist/checkpoint", plugins="hub_cards/tocom-vit-fashion-mnist"
    ... )
    >>> images = [{"pixel_values": torch.zeros(3, 28, 28)} for _ in range(2)]
    >>> pick_scale(model, images, 8, scales=[0.1])
    0.1

    ```
    """
    scales = [require_scale(scale) for scale in scales]
    if not scales:
        raise ArgumentError("There are no scales to choose from. Give some, e.g. scales=[0, 0.05, 0.1, 0.15].")
    plugins = getattr(model, "plugins", None)  # of a model that is no TocomModel there are none
    if plugins is None or target_r == model.source_r:
        why = "has no plugins" if plugins is None else f"was trained at target_r={target_r}"
        raise ArgumentError(f"The model {why}, so there is no scale to choose.")
    if len(images) == 0:  # type: ignore[arg-type]
        raise DatasetError("There are no images to choose a scale by.")
    plugins.require(model.source_r, target_r)
    backbone = find_backbone(model)
    objective = find_objective("auto", model)
    device = next(model.parameters()).device

    @torch.no_grad()
    def outputs() -> torch.Tensor:
        parts = []
        for batch in DataLoader(images, batch_size=batch_size):
            part = objective.outputs(backbone, batch["pixel_values"].to(device))
            parts.append(part.cpu())
        return torch.cat(parts)

    with evaluation_mode(model):
        with model.at(model.source_r):
            teacher = outputs()
        divergences = {}
        for scale in scales:
            with model.at(target_r, scale):
                divergences[scale] = objective.loss(teacher, outputs()).item()
    finite = [scale for scale in scales if math.isfinite(divergences[scale])]
    if not finite:
        raise ArgumentError(
            f"At none of the scales {scales} are the model's outputs finite at both degrees. Look for images that are "
            "not finite, and for scales that are too large."
        )
    return min(finite, key=divergences.__getitem__)
