# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The spread of a teacher's features, which `whitened_features` measures by."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from tocom_hf.distillation.agreement import held_out_batches
from tocom_hf.distillation.arguments import DistillationArguments
from tocom_hf.distillation.objectives import WhitenedFeatures
from tocom_hf.distillation.order import KeyedImages
from tocom_hf.distillation.student import SelfDistiller


_IMAGES = 2048


@torch.no_grad()
def fit_objective(
    distiller: SelfDistiller,
    dataset: Any,
    args: DistillationArguments,
    accelerator: Accelerator,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> None:
    """Give an objective that measures by the spread of the teacher's features that of up to 2,048 images.

    They are spread over the data set, and seen as in its first epoch: the same ones in a run that goes on. The teacher
    is at `args.source_r`, or does not merge. Other objectives need nothing.

    Args:
        distiller: Whose objective it is.
        dataset: The images of the training.
        args: Of the training.
        accelerator: Of this process; all processes share the work.
        mean, std: As in `augment`.
    """
    if not isinstance(distiller.objective, WhitenedFeatures):
        return
    count = min(_IMAGES, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    images = Subset(KeyedImages(dataset, args.seed, args.skip_damaged), chosen)
    source_r = args.source_r or 0
    found = []
    for pixel_values in held_out_batches(images, accelerator, args.per_device_train_batch_size, mean, std):
        with accelerator.autocast():
            found.append(distiller.run(pixel_values, source_r, source_r))
    features = accelerator.gather(torch.cat(found))  # (images, features * hidden size)
    finite = features.isfinite().all(dim=1)  # (images,)
    distiller.objective = distiller.objective.fitted(features[finite])
