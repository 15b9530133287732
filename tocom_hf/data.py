# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images for distillation and fine-tuning: any data set that `datasets` loads, turned into `pixel_values`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import BaseImageProcessor

from .errors import DatasetError


def load_images(
    name: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    max_samples: int | None = None,
) -> datasets.Dataset:
    """Load an image data set and check that it has what the job needs.

    Args:
        name: Hub name, a folder of images (`imagefolder`: one folder per class) or of parquet files, or a parquet file.
        split: The split, in the slicing syntax of `datasets`.
        config_name: Configuration of a Hub data set.
        image_column: Column of the images.
        label_column: Column of the integer labels, where they are needed.
        max_samples: Keep only the first so many samples.

    Returns:
        The data set with the named columns only.

    Raises:
        DatasetError: if it cannot be loaded, is empty, or lacks a column.
    """
    try:
        if Path(name).is_file():
            loaded = datasets.load_dataset("parquet", data_files={split.partition("[")[0]: str(name)}, split=split)
        else:
            loaded = datasets.load_dataset(name, config_name, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(f"The split {split!r} of the data set {name!r} cannot be loaded: {error}") from error
    for role, column in (("image", image_column), ("label", label_column)):
        if column is not None and column not in loaded.column_names:
            raise DatasetError(
                f"The data set {name!r} has no column {column!r}; it has {', '.join(loaded.column_names)}. "
                f"Name the {role} column with --{role}_column."
            )
    if not isinstance(loaded.features[image_column], datasets.Image):
        raise DatasetError(
            f"The column {image_column!r} of {name!r} holds {loaded.features[image_column]}, not images. "
            "Name the image column with --image_column."
        )
    label_feature = None if label_column is None else loaded.features[label_column]
    integers = isinstance(label_feature, datasets.Value) and label_feature.dtype.startswith(("int", "uint"))
    if label_feature is not None and not integers and not isinstance(label_feature, datasets.ClassLabel):
        raise DatasetError(
            f"The column {label_column!r} of {name!r} holds {label_feature}, not integer labels. "
            "Convert it with Dataset.class_encode_column, or name the label column with --label_column."
        )
    if max_samples is not None:
        loaded = loaded.select(range(min(max_samples, len(loaded))))
    if len(loaded) == 0:
        raise DatasetError(f"The split {split!r} of the data set {name!r} is empty.")
    return loaded.select_columns([column for column in (image_column, label_column) if column])


def with_pixel_values(
    dataset: datasets.Dataset,
    processor: BaseImageProcessor,
    *,
    image_column: str = "image",
    label_column: str | None = None,
) -> datasets.Dataset:
    """Process images when they are read: samples become `pixel_values` `(channels, height, width)` and `labels`."""

    return dataset.with_transform(_Process(processor, image_column, label_column))


@dataclass(frozen=True)
class _Process:
    """The transform of `with_pixel_values`; a class, so that worker processes can be started with any method."""

    processor: BaseImageProcessor
    image_column: str
    label_column: str | None

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        if any(image is None for image in batch[self.image_column]):
            raise DatasetError(f"The column {self.image_column!r} has a sample without an image. Filter it out first.")
        images = [image.convert("RGB") for image in batch[self.image_column]]
        sample: dict[str, Any] = {"pixel_values": list(self.processor(images, return_tensors="pt")["pixel_values"])}
        if self.label_column is not None:
            sample["labels"] = batch[self.label_column]
        return sample
