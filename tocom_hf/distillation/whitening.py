# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The spread of a teacher's features, which `whitened_features` measures by."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Subset
from tqdm.auto import tqdm

from tocom_hf.distillation.agreement import held_out_batches
from tocom_hf.distillation.arguments import DistillationArguments
from tocom_hf.distillation.objectives import WhitenedFeatures
from tocom_hf.distillation.order import KeyedImages
from tocom_hf.distillation.student import SelfDistiller
from tocom_hf.errors import DatasetError, UnreadableImageError


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

    They are spread over the data set, and seen as in its first epoch but for what is done to batches (RandAugment,
    mixup): the same ones in a run that goes on, and on any number of processes. The teacher is at `args.source_r`, or
    does not merge. Other objectives need nothing.

    Args:
        distiller: Whose objective it is.
        dataset: The images of the training.
        args: Of the training.
        accelerator: Of this process; all processes share the work.
        mean, std: As in `augment`.

    Raises:
        DatasetError: if an image cannot be read, or the features do not differ.
    """
    if not isinstance(distiller.objective, WhitenedFeatures):
        return
    count = min(_IMAGES, len(dataset))
    processes = accelerator.num_processes
    # as many for each process, the first ones again where they do not come out even
    chosen = [index % count * len(dataset) // count for index in range(-(-count // processes) * processes)]
    images = Subset(KeyedImages(dataset, args.seed, args.skip_damaged), chosen)
    batches = held_out_batches(images, accelerator, args.per_device_train_batch_size, mean, std)
    source_r = args.source_r or 0
    found = []
    try:
        for pixel_values in tqdm(batches, desc="the spread of features", disable=not accelerator.is_main_process):
            with accelerator.autocast():
                found.append(distiller.run(pixel_values, source_r, source_r).float())
    except UnreadableImageError as error:
        raise DatasetError(f"{error} Or set skip_damaged.") from error
    features = accelerator.gather(torch.cat(found))  # (processes * images of each, features * hidden size)
    in_order = features.view(processes, -1, features.shape[-1]).transpose(0, 1).flatten(0, 1)[:count]
    distiller.objective = distiller.objective.fitted(in_order)
