# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Labels that mean to a checkpoint what they mean to a data set, which may count its classes in another order."""

from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable, concat_tables
from transformers import PreTrainedConfig
from transformers.utils import logging

from tocom_hf.data.class_names import NameMatch, are_numbered, are_wordnet_ids, match_names, number_in
from tocom_hf.errors import ArgumentError, DatasetError


# a child of transformers' logger: its verbosity holds for ours
logger = logging.get_logger(f"transformers.{__name__}")
_SHOWN = 5  # names in a message
_RENAME = "Rename the classes of the data set, or correct id2label and label2id in the config.json of the checkpoint."


def match_labels(
    dataset: datasets.Dataset, config: PreTrainedConfig, *, label_column: str = "label"
) -> datasets.Dataset:
    """The same images with the labels that a checkpoint has for them.

    Classes are matched by name. Case, spaces, underscores and hyphens do not count, numbers are compared as numbers
    (`LABEL_7` is `7`), and of names with synonyms (`tench, Tinca tinca`) one is enough. The data set may lack classes.
    Labels without names are taken as they are. Images are neither read nor copied.

    Args:
        dataset: With a column of integer labels, before or after `with_pixel_values`.
        config: Of the checkpoint, whose `id2label` names its outputs.
        label_column: Column of the labels.

    Returns:
        A data set with the same images. Where neither side's names tell the order (`LABEL_0`), but both have as many
        classes, it is taken to be the same, with a warning.

    Raises:
        DatasetError: if a class cannot be matched, fits several classes, or a label is missing or out of range.
        ArgumentError: if the data set is a stream.

    Example:

    ```python
    >>> from tocom_hf import load_images, match_labels
    >>> from transformers import ViTConfig
    >>> images = load_images("examples/digits/test.parquet", split="test", label_column="label", max_samples=3)
    >>> images["label"][:]
    [3, 7, 7]
    >>> backwards = ViTConfig(id2label={index: f"{9 - index}" for index in range(10)})
    >>> match_labels(images, backwards)["label"][:]
    [6, 2, 2]

    ```
    """
    return match_labels_to(dataset, class_names_of(config), _checkpoint(config), label_column=label_column)


def match_labels_to(
    dataset: datasets.Dataset, known: Sequence[str], owner: str, *, label_column: str = "label"
) -> datasets.Dataset:
    """What `match_labels` does, for names that need not be those of a checkpoint.

    Args:
        dataset: With a column of integer labels.
        known: The names to match with, in the order that the labels shall have.
        owner: Whose names they are, for messages.
        label_column: Column of the labels.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ArgumentError("Labels of a stream are not matched. Load the data set without streaming.")
    labels = require_labels(dataset, label_column=label_column)
    source = _source(dataset)
    names = getattr(dataset.features[label_column], "names", None)
    if names is None:
        if max(labels, default=-1) >= len(known):
            raise DatasetError(
                f"{source[0].upper()}{source[1:]} has the label {max(labels)}, but {owner} knows {len(known)} classes."
            )
        return dataset
    occurring = sorted(set(labels))
    order = _find_order(names, known, occurring, source, owner)
    if all(order[label] == label for label in occurring):
        return dataset
    return _with_labels(dataset, label_column, order, known)


def class_names_of(config: PreTrainedConfig) -> list[str]:
    """The names of a checkpoint's classes in the order of its outputs.

    Raises:
        DatasetError: if `id2label` does not number them from 0 on.
    """
    id2label: dict[Any, Any] = config.id2label or {}
    if sorted(id2label) != list(range(len(id2label))):
        raise DatasetError(
            f"id2label in the config.json of {_checkpoint(config)} numbers the classes {_listed(sorted(id2label))}; "
            f"expected 0 to {len(id2label) - 1}. Correct it."
        )
    return [str(id2label[index]) for index in range(len(id2label))]


def require_labels(dataset: datasets.Dataset, *, label_column: str = "label", source: str | None = None) -> list[int]:
    """The labels of all images.

    Args:
        dataset: With a column of integer labels.
        label_column: Its name.
        source: What to call the data set in a message.

    Raises:
        DatasetError: if some are missing.
    """
    # without the format, which may be a transform that decodes images
    labels = dataset.with_format(None).select_columns([label_column])[label_column][:]
    missing = sum(label is None or label < 0 for label in labels)
    if missing:
        raise DatasetError(
            f"{missing} of the {len(labels)} images of {source or _source(dataset)} have no label (None or "
            "negative), as in test splits whose labels are secret. Name a split with labels, or filter them out."
        )
    return labels


def _find_order(
    names: Sequence[str],
    known: Sequence[str],
    occurring: list[int],
    source: str,
    owner: str,
) -> list[int | None]:
    """The checkpoint's label for every label of the data set; `None` for some that do not occur."""
    found = match_names(names, known)
    if all(found.order[label] is not None for label in occurring):
        return found.order
    if found.rivals or any(index is not None for index in found.order):
        raise _mismatch(names, known, occurring, found, source, owner)
    places = [_place(name, len(known)) for name in names]
    if all(places[label] is not None for label in occurring):
        logger.warning_once(
            f"The classes of {source} are numbers, and those of {owner} are {_listed(known)}. The numbers are "
            f"taken for places in that list, counted from 0; if they are not, the accuracy is wrong. {_RENAME}"
        )
        return places
    silent = are_numbered(known) or (are_wordnet_ids(names) and list(names) == sorted(names))
    if silent and len(names) == len(known):
        logger.warning_once(
            f"The classes of {owner} are named {_listed(known)}, and those of {source} {_listed(names)}, so that "
            "nothing tells whether they are in the same order. It is taken to be the same; if it is not, the accuracy "
            "is wrong. To make sure, name the classes in id2label and label2id in the config.json of the checkpoint."
        )
        return list(range(len(names)))
    raise _mismatch(names, known, occurring, found, source, owner)


def _place(name: str, count: int) -> int | None:
    """The number that a name is, if it can be the index of one of `count` classes."""
    number = number_in(name)
    return int(number) if number is not None and len(number) < 10 and int(number) < count else None


def _mismatch(
    names: Sequence[str],
    known: Sequence[str],
    occurring: list[int],
    found: NameMatch,
    source: str,
    owner: str,
) -> DatasetError:
    sentences = []
    strange = [names[label] for label in occurring if found.order[label] is None and label not in found.rivals]
    if strange:
        sentence = f"{len(strange)} of the {len(names)} classes of {source} are none of the {len(known)} of "
        sentence += f"{owner}: {_listed(strange)}"
        if found.unused:
            sentence += f". Left over of these: {_listed(found.unused)}"
        sentences.append(sentence)
    unclear = [label for label in occurring if label in found.rivals]
    for label in unclear[:_SHOWN]:
        rivals = found.rivals[label]
        others = f"fits {_listed(rivals)} of {owner}" + (" as others do" if len(rivals) == 1 else " equally well")
        sentences.append(f"The name {names[label]!r} of {source} {others}")
    return DatasetError(f"{'. '.join(sentences)}. {_RENAME}")


def _with_labels(
    dataset: datasets.Dataset, label_column: str, order: list[int | None], known: Sequence[str]
) -> datasets.Dataset:
    """The data set with other labels, whatever its format and selection.

    Dataset.map would write the images anew, and add_column too where images were selected. Here only the table's
    column of labels is replaced; the rows that the indices leave out may hold anything.
    """
    table, indices = dataset.data, dataset._indices
    old = table.column(label_column).to_pylist()
    new = [order[label] if label is not None and 0 <= label < len(order) else None for label in old]
    unique = len(set(known)) == len(known)
    feature = datasets.ClassLabel(names=list(known)) if unique else datasets.Value("int64")
    labels = InMemoryTable.from_pydict({label_column: pa.array(new, pa.int64())})
    replaced = concat_tables([table.remove_column(table.column_names.index(label_column)), labels], axis=1)
    info = dataset.info.copy()
    info.features = datasets.Features({**dataset.features, label_column: feature})
    replaced = replaced.replace_schema_metadata(None)
    matched = datasets.Dataset(replaced, info=info, split=dataset.split, indices_table=indices)
    matched.set_format(**dataset.format)
    return matched


def _source(dataset: datasets.Dataset) -> str:
    return "the data set" if dataset.split is None else f"the split {str(dataset.split)!r}"


def _checkpoint(config: PreTrainedConfig) -> str:
    return str(getattr(config, "name_or_path", None) or "the checkpoint")


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(f"{name!r:.60}" for name in names[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")
