# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The labelled data sets of the paper by name: where they are on the Hub, and which columns and splits they have."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from tocom_hf.data.clips import encoded_clips
from tocom_hf.data.images import load_images
from tocom_hf.data.labels import require_labels
from tocom_hf.errors import DatasetError


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Attributes:
        hub_name: Name of the data set on the Hub.
        num_classes: Number of classes; a small sample may lack some of them.
        kind: What VTAB calls it: natural, specialized or structured; fine-grained for the others.
        image_column, label_column: Columns of the images and of the integer labels.
        validation: The validation split. Where there is none, validation images are drawn from the training split with
            a fixed seed: a tenth of it, or the 200 beside the 800 that VTAB-1k trains on.
        few_shot: Train on 800 images, as VTAB-1k does.
    """

    hub_name: str
    num_classes: int
    kind: str
    image_column: str = "image"
    label_column: str = "label"
    validation: str | None = None
    few_shot: bool = False


def _vtab(name: str, num_classes: int, kind: str, prefix: str = "wds_vtab-") -> Task:
    return Task(f"clip-benchmark/{prefix}{name}", num_classes, kind, "webp", "cls", few_shot=True)


TASKS: dict[str, Task] = {
    "cifar-100": Task("uoft-cs/cifar100", 100, "fine-grained", "img", "fine_label"),
    "cub-200": Task("bentrevett/caltech-ucsd-birds-200-2011", 200, "fine-grained"),
    "cars": Task("tanganke/stanford_cars", 196, "fine-grained"),
    "dogs": Task("Donghyun99/Stanford-Dogs", 120, "fine-grained"),
    "flowers": Task("dpdl-benchmark/oxford_flowers102", 102, "fine-grained", validation="validation"),
    "vtab-1k/caltech101": _vtab("caltech101", 102, "natural"),
    "vtab-1k/cifar100": _vtab("cifar100", 100, "natural"),
    "vtab-1k/dtd": _vtab("dtd", 47, "natural"),
    "vtab-1k/flowers102": _vtab("flowers", 102, "natural"),
    "vtab-1k/pets": _vtab("pets", 37, "natural"),
    "vtab-1k/sun397": _vtab("sun397", 397, "natural", prefix="wds_"),
    "vtab-1k/svhn": _vtab("svhn", 10, "natural"),
    "vtab-1k/patch_camelyon": _vtab("pcam", 2, "specialized"),
    "vtab-1k/eurosat": _vtab("eurosat", 10, "specialized"),
    "vtab-1k/resisc45": _vtab("resisc45", 45, "specialized"),
    "vtab-1k/diabetic_retinopathy": _vtab("diabetic_retinopathy", 5, "specialized"),
    "vtab-1k/clevr_count": _vtab("clevr_count_all", 8, "structured"),
    "vtab-1k/clevr_distance": _vtab("clevr_closest_object_distance", 6, "structured"),
    "vtab-1k/dmlab": _vtab("dmlab", 6, "structured"),
    "vtab-1k/kitti_distance": _vtab("kitti_closest_vehicle_distance", 4, "structured"),
    "vtab-1k/dsprites_location": _vtab("dsprites_label_x_position", 16, "structured"),
    "vtab-1k/dsprites_orientation": _vtab("dsprites_label_orientation", 16, "structured"),
    "vtab-1k/smallnorb_azimuth": _vtab("smallnorb_label_azimuth", 18, "structured"),
    "vtab-1k/smallnorb_elevation": _vtab("smallnorb_label_elevation", 9, "structured"),
}
"""The data sets of the paper: five for full fine-tuning, and the 19 of VTAB-1k."""

_SPLITS = ("train", "validation", "train+validation", "test")
_SEED = 0


def load_labelled(
    name: str,
    split: str,
    *,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    load: Callable[..., Any] = load_images,
) -> tuple[datasets.Dataset, int]:
    """Load one split of a task of `TASKS`, or of any data set that `load_images` takes.

    The 1,000 images of VTAB-1k are drawn with a fixed seed. They are not those of the original file lists, which refer
    to another copy of the data.

    Args:
        name: A key of `TASKS`, a Hub name, a folder or a parquet file.
        split: `train`, `validation`, `train+validation` or `test` for a key of `TASKS`, else any split that there is.
        config_name, image_column, label_column: As in `load_images`, for data sets that are not in `TASKS`.
        load: What loads them: `load_images`, or `load_clips` for clips.

    Returns:
        The data set with the columns `image` and `label`, and the number of classes.

    Raises:
        DatasetError: if it cannot be loaded, is empty, or lacks a column, a split, or the label of an image, or if its
            parquet files count the classes differently.
    """
    task = TASKS.get(name)
    if task is None:
        _require_one_order(Path(name), label_column)
        found = load(name, config_name=config_name, split=split, image_column=image_column, label_column=label_column)
        found = _rename(found, image_column, label_column)
        labels = require_labels(found, source=f"the split {split!r} of {name!r}")
        feature = found.features["label"]
        return found, getattr(feature, "num_classes", None) or max(labels) + 1
    if split not in _SPLITS:
        raise DatasetError(f"{name!r} has the splits {', '.join(_SPLITS)}; got {split!r}.")
    drawn = task.validation is None and split != "test"
    found = load(
        task.hub_name,
        split="train" if drawn else split.replace("validation", str(task.validation)),
        image_column=task.image_column,
        label_column=task.label_column,
    )
    if drawn:
        training = 800 if task.few_shot else len(found) * 9 // 10
        end = 1000 if task.few_shot else len(found)
        start, stop = {"train": (0, training), "validation": (training, end), "train+validation": (0, end)}[split]
        found = found.shuffle(seed=_SEED).select(range(start, min(stop, len(found))))
    found = _rename(found, task.image_column, task.label_column)
    require_labels(found, source=f"the split {split!r} of {name!r}")
    return found, task.num_classes


def _rename(dataset: datasets.Dataset, image_column: str, label_column: str) -> datasets.Dataset:
    names = {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    return dataset.rename_columns(names) if names else dataset


def _require_one_order(folder: Path, label_column: str) -> None:
    """Refuse parquet files that name their classes differently: datasets takes the names of one file for all."""
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(folder.rglob("*.parquet")) if folder.is_dir() else ():
        # datasets says what is wrong with a file that cannot be read
        with contextlib.suppress(OSError, ValueError, AttributeError):
            recorded = json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
            feature = recorded.get("info", {}).get("features", {}).get(label_column, {})
            if feature.get("names"):
                found.setdefault(tuple(feature["names"]), path)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise DatasetError(
            f"{first} and {second} have other names for their classes, or another order of them, but a data set of "
            "several files has one. Give the path of one file, or write the files anew with the same ClassLabel."
        )


def require_disjoint(validation: datasets.Dataset, test: datasets.Dataset) -> None:
    """Refuse validation images that are test images too: a scale picked on them would flatter the test figures.

    Args:
        validation, test: Two slices of one split, with the column `image`.

    Raises:
        DatasetError: if they share an image.
    """
    shared = _images(validation) & _images(test)
    if shared:
        raise DatasetError(
            f"{len(shared)} images are in the validation split and in the test split. The scale must be picked on "
            "images that are not tested on: choose slices that do not overlap, such as test[:200] and test[200:]."
        )


def _images(dataset: datasets.Dataset) -> set:
    encoded = encoded_clips(dataset.select_columns(["image"]), "image")
    samples = (sample["image"] for sample in encoded)
    return {_content_of(sample) for sample in samples if sample}


def _content_of(sample: Any) -> Any:
    """What tells an image, a video or a list of images from others."""
    if isinstance(sample, list):
        return tuple(_content_of(frame) for frame in sample)
    if sample is None:
        return None
    return hashlib.sha256(sample["bytes"]).digest() if sample["bytes"] else sample["path"]
