# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images for distillation and fine-tuning: any data set that `datasets` loads, turned into `pixel_values`."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from tocom_hf.data.colour import find_num_channels
from tocom_hf.data.decoding import decode_image
from tocom_hf.data.folders import find_image_folder, find_unused, names_its_files, require_splits
from tocom_hf.errors import ArgumentError, DatasetError, UnreadableImageError


_SEED = 0  # of the samples that max_samples draws


def load_images(
    name: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
    keep_columns: Sequence[str] = (),
) -> Any:
    """Load an image data set and check that it has what the job needs.

    Args:
        name: Hub name, a folder of images or of parquet files, or a parquet file. Of images: one folder per class, in
            sub-folders called train, validation and test where there are splits, else all are the split `train`.
        split: The split, in the slicing syntax of `datasets`.
        config_name: Configuration of a Hub data set.
        image_column: Column of the images.
        label_column: Column of the integer labels, where they are needed.
        max_samples: Keep only so many samples, drawn at random but always the same, because data sets are often sorted
            by class; of a stream the first.
        streaming: Read the samples as they come, without downloading or indexing the whole data set first.
        keep_columns: Further columns to keep.

    Returns:
        The data set with the named columns only: a `datasets.Dataset`, with `streaming` a `datasets.IterableDataset`.

    Raises:
        DatasetError: if it cannot be loaded, is empty, or lacks a column.

    Example:

    ```python
    >>> from tocom_hf import load_images
    >>> images = load_images("examples/fashion_mnist/test.parquet", split="test", label_column="label", max_samples=3)
    >>> images["label"][:]
    [1, 8, 1]

    ```
    """
    return load_columns(
        name,
        "image",
        image_column,
        label_column,
        lambda feature: isinstance(feature, datasets.Image),
        split=split,
        config_name=config_name,
        max_samples=max_samples,
        streaming=streaming,
        keep_columns=keep_columns,
    )


def load_columns(
    name: str,
    kind: str,
    column: str,
    label_column: str | None,
    is_kind: Callable[[Any], bool],
    *,
    split: str,
    config_name: str | None,
    max_samples: int | None,
    streaming: bool,
    keep_columns: Sequence[str] = (),
) -> Any:
    """What `load_images` does, for images or for clips.

    Args:
        name, label_column, split, config_name, max_samples, streaming, keep_columns: As in `load_images`.
        kind: What the samples are, for messages: image or clip.
        column: Where they are.
        is_kind: Whether a feature of `datasets` holds such samples.
    """
    if _is_path(str(name)) and not Path(name).exists():
        raise DatasetError(
            f"There is no file or folder {name!r}. Give the path of a folder of images or parquet files, or of one "
            "parquet file, or the name of a data set on the Hub."
        )
    try:
        loaded = _load(str(name), split, config_name, streaming)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(f"The split {split!r} of the data set {name!r} cannot be loaded: {error}") from error
    if loaded.features is None:  # a stream of a format without a schema: look at its first samples
        loaded = loaded._resolve_features()
    needed: list[tuple[str, str | None, str]] = [(kind, column, "--image_column")]
    needed.append(("label", label_column, "--label_column"))
    needed += [("further", name, "--keep_columns") for name in keep_columns]
    for role, wanted, option in needed:
        if wanted is not None and wanted not in loaded.column_names:
            of_folders = ""
            if role == "label" and Path(name).is_dir() and loaded.column_names == ["image"]:
                of_folders = (
                    " For a folder of images the label is the name of an image's folder, where there are two such "
                    "folders or more, all equally deep; or it stands in a metadata.csv."
                )
            raise DatasetError(
                f"The data set {name!r} has no column {wanted!r}; it has {', '.join(loaded.column_names)}. "
                f"Name the {role} column with {option}.{of_folders}"
            )
    if not is_kind(loaded.features[column]):
        raise DatasetError(
            f"The column {column!r} of {name!r} holds {loaded.features[column]}, not {kind}s. "
            f"Name the {kind} column with --image_column."
        )
    label_feature = None if label_column is None else loaded.features[label_column]
    integers = isinstance(label_feature, datasets.Value) and label_feature.dtype.startswith(("int", "uint"))
    if label_feature is not None and not integers and not isinstance(label_feature, datasets.ClassLabel):
        raise DatasetError(
            f"The column {label_column!r} of {name!r} holds {label_feature}, not integer labels. "
            "Convert it with Dataset.class_encode_column, or name the label column with --label_column."
        )
    if max_samples is not None and streaming:
        loaded = loaded.take(max_samples)
    elif max_samples is not None and max_samples < len(loaded):
        loaded = loaded.shuffle(seed=_SEED).select(range(max_samples))
    if not streaming and len(loaded) == 0:
        raise DatasetError(f"The split {split!r} of the data set {name!r} is empty.")
    named = dict.fromkeys([column, label_column, *keep_columns])
    return loaded.select_columns([name for name in named if name])


def _load(name: str, split: str, config_name: str | None, streaming: bool) -> Any:
    path = Path(name)
    if path.is_file():
        data_files = {split.partition("[")[0]: name}
        return datasets.load_dataset("parquet", data_files=data_files, split=split, streaming=streaming)
    if path.is_dir() and config_name is None:
        folder = find_image_folder(path)
        if folder is not None:
            return folder.load(split, streaming)
        if not names_its_files(path):
            builder = datasets.load_dataset_builder(name)
            require_splits(path, split, builder.config.data_files, find_unused(path, builder))
    return datasets.load_dataset(name, config_name, split=split, streaming=streaming)


def require_different_images(name: str, first: str, second: str) -> None:
    """Refuse two splits of a single file that are the same part of it: a file has no splits, only slices.

    Args:
        name: The data set, as in `load_images`.
        first, second: Splits, in the slicing syntax of `datasets`.

    Raises:
        DatasetError: if they are the same images.
    """
    if Path(name).is_file() and first.partition("[")[1:] == second.partition("[")[1:]:
        raise DatasetError(
            f"{name} is a single file, so that its splits {first!r} and {second!r} are the same images. Take slices "
            f"that do not overlap, such as {first.partition('[')[0]}[:80%] and {second.partition('[')[0]}[80%:]."
        )


def _is_path(name: str) -> bool:
    """Whether a name cannot be that of a data set on the Hub: a parquet file, or what no repository may be called."""
    if "://" in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.endswith(".parquet")


def with_pixel_values(
    dataset: datasets.Dataset,
    processor: BaseImageProcessor,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    num_channels: int | None = None,
) -> datasets.Dataset:
    """Process images when they are read: samples become `pixel_values` `(channels, height, width)` and `labels`.

    Args:
        dataset: What `load_images` returned.
        processor: The model's image processor.
        image_column: Column of the images.
        label_column: Column of the labels, if they shall be in the samples.
        num_channels: What the model takes, 3 for RGB or 1 for grey; by default what the processor is made for.

    Raises:
        ArgumentError: if the processor is made for another number of channels.
        DatasetError: when a sample is read whose image is damaged, or whose pixels have no known range.

    Example:

    ```python
    >>> from tocom_hf import load_images, with_pixel_values
    >>> from transformers import AutoImageProcessor
    >>> images = load_images("examples/fashion_mnist/test.parquet", split="test", max_samples=3)
    >>> processor = AutoImageProcessor.from_pretrained("examples/fashion_mnist/checkpoint")
    >>> with_pixel_values(images, processor)[0]["pixel_values"].shape
    torch.Size([3, 28, 28])

    ```
    """
    num_channels = find_num_channels(processor, num_channels)
    # undecoded, so that an image that cannot be read is named
    encoded = dataset.cast_column(image_column, datasets.Image(decode=False))
    return encoded.with_transform(_Process(processor, image_column, label_column, num_channels))


@dataclass(frozen=True)
class _Process:
    """The transform of `with_pixel_values`; a class, so that worker processes can be started with any method."""

    processor: BaseImageProcessor
    image_column: str
    label_column: str | None
    num_channels: int

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        images = [open_image(image, self.image_column, self.num_channels) for image in batch[self.image_column]]
        sample: dict[str, Any] = {"pixel_values": list(self.processor(images, return_tensors="pt")["pixel_values"])}
        if self.label_column is not None:
            sample["labels"] = batch[self.label_column]
        return sample


def read_column(dataset: datasets.Dataset, image_column: str, num_channels: int) -> list[Image.Image]:
    """All images of a small data set, decoded.

    Args:
        dataset: What `load_images` returned.
        image_column: Column of the images.
        num_channels: 3 for RGB, 1 for grey.

    Raises:
        DatasetError: if an image cannot be read.
    """
    encoded = dataset.cast_column(image_column, datasets.Image(decode=False))
    return [open_image(image, image_column, num_channels) for image in encoded[image_column]]


class TrainingImages(Dataset):
    """Random views of images for distillation: a random part of each, resized and perhaps mirrored, as uint8.

    What comes behind that (RandAugment, mixing, normalisation) runs in batches on the accelerator.

    Args:
        images: What `load_images` returned.
        processor: The model's image processor, which tells size, mean and standard deviation.
        image_column: Column of the images.
        min_crop: Smallest share of an image's area that a view shows, in (0, 1]. Views of 1 show the whole image.
        flip: Probability of being mirrored.
        num_channels: What the model takes, 3 for RGB or 1 for grey; by default what the processor is made for.

    Attributes:
        num_channels: Channels of the views.
        image_mean, image_std: float32 `(channels,)`, what values in [0, 1] are normalised by; `None` where they are
            not.
        size: Height and width of the views.

    Raises:
        ArgumentError: if an argument is out of range, or the processor is made for another number of channels.
    """

    def __init__(
        self,
        images: Any,
        processor: Any,
        *,
        image_column: str = "image",
        min_crop: float = 0.08,
        flip: float = 0.5,
        num_channels: int | None = None,
    ):
        if not 0 < min_crop <= 1 or not 0 <= flip <= 1:
            raise ArgumentError(f"Expected min_crop in (0, 1] and flip in [0, 1], got {min_crop!r} and {flip!r}.")
        self.num_channels = find_num_channels(processor, num_channels)
        # undecoded, so that a stream that is read up to where a run stopped does not decode what it skips
        self.images = self._encoded(images, image_column)
        self.image_column, self.min_crop, self.flip = image_column, min_crop, flip
        self.size = _view_size(processor)
        normalised = getattr(processor, "do_normalize", False)
        self.image_mean = torch.tensor(processor.image_mean) if normalised else None
        self.image_std = torch.tensor(processor.image_std) if normalised else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The whole image, resized: `pixel_values` as uint8 `(channels, height, width)`."""
        frames = self._open(self.images[index])
        return {"pixel_values": self._resize(frames, (0, 0, *frames[0].size))}

    def select(self, indices: Iterable[int]) -> "TrainingImages":
        """The same views of some of the images only."""
        chosen = copy.copy(self)
        chosen.images = self.images.select(indices)
        return chosen

    def view(self, sample: int | dict[str, Any], generator: np.random.Generator) -> torch.Tensor:
        """A random view of one image, uint8 `(channels, height, width)`.

        Args:
            sample: Index of the image, or the sample itself as it comes from a stream.
            generator: Decides the view.
        """
        sample = self.images[sample] if isinstance(sample, int) else sample
        frames = self._open(sample)
        view = self._resize(frames, _random_box(frames[0].size, self.min_crop, generator))
        return view.flip(-1) if generator.random() < self.flip else view

    def _encoded(self, images: Any, image_column: str) -> Any:
        return images.cast_column(image_column, datasets.Image(decode=False))

    def _open(self, sample: dict[str, Any]) -> list[Image.Image]:
        """What a sample shows: one image."""
        return [open_image(sample[self.image_column], self.image_column, self.num_channels)]

    def _resize(self, frames: list[Image.Image], box: "_Box") -> torch.Tensor:
        """A part of what a sample shows, uint8."""
        return self._resize_image(frames[0], box)

    def _resize_image(self, image: Image.Image, box: "_Box") -> torch.Tensor:
        height, width = self.size
        resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(resized)).view(height, width, self.num_channels)
        return pixels.permute(2, 0, 1).contiguous()


def open_image(encoded: dict[str, Any] | None, column: str, num_channels: int) -> Image.Image:
    """Decode a sample of an `Image(decode=False)` column."""
    path: Any
    content: Any
    path, content = (encoded["path"], encoded["bytes"]) if encoded else (None, None)
    if path is None and content is None:
        raise UnreadableImageError(f"The column {column!r} has a sample without an image. Filter it out first.")

    def name() -> str:
        if path is not None:
            return f"{path} in the column {column!r}"
        digest = hashlib.sha256(content).hexdigest()[:12]
        return f"of {len(content)} bytes, SHA-256 {digest}, in the column {column!r}"

    local = content is not None or "://" not in path
    return decode_image(lambda: datasets.Image().decode_example(encoded), name, num_channels, local=local)


def _view_size(processor: BaseImageProcessor) -> tuple[int, int]:
    for name in ("crop_size", "size"):
        size = getattr(processor, name, None)
        if isinstance(size, int):
            return size, size
        size = dict(size or {})
        if {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    raise DatasetError(
        f"{type(processor).__name__} does not say how large the model's images are (size or crop_size). "
        "Pass samples with finished pixel_values instead."
    )


_Box = tuple[float, float, float, float]


def _random_box(size: tuple[int, int], min_crop: float, generator: np.random.Generator) -> _Box:
    """A random box of `min_crop` to 1 of an image's area and of an aspect ratio of 3:4 to 4:3, as (left, upper, right,
    lower); the whole image where ten attempts do not fit."""
    width, height = size
    for _ in range(10 if min_crop < 1 else 0):
        area = width * height * generator.uniform(min_crop, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            left, upper = generator.uniform(0, width - box_width), generator.uniform(0, height - box_height)
            # rounding must not take the box beyond the image
            return left, upper, min(left + box_width, width), min(upper + box_height, height)
    return 0, 0, width, height
