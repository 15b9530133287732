# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which images a local folder holds, by split: decided by its layout, so that none is left out without a word.

`datasets` looks for words such as train, test, val and dev in the names of all files and folders. Where it finds one,
it takes what is named so for a split and leaves everything else out: of 20 photographs and "the train to Bern.png" it
loads one.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import datasets
import pandas
from datasets.data_files import FILES_TO_IGNORE
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as Builder
from huggingface_hub import DatasetCard
from transformers.utils import logging

from tocom_hf.errors import DatasetError


logger = logging.get_logger(__name__)

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a sub-folder of this name is, in small letters or capitals."""

_IMAGES = frozenset(Builder.EXTENSIONS)
_METADATA = frozenset(Builder.METADATA_FILENAMES)
_TABLES = frozenset((".parquet", ".arrow", ".tar"))  # files that hold many images each
_SHOWN = 3  # files that a message names


@dataclass
class Split:
    """A part of an image folder.

    Attributes:
        roots: The folders that it consists of, relative to the image folder.
        images, metadata: The files in them, relative to the image folder.
    """

    roots: list[PurePath] = field(default_factory=list)
    images: list[PurePath] = field(default_factory=list)
    metadata: list[PurePath] = field(default_factory=list)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of image files.

    Attributes:
        path: The folder.
        splits: Its parts by the name of the split.
        outside: Images and metadata files that are in none of them.
        links: Sub-folders that are symbolic links, into which a pattern does not go by itself.
    """

    path: Path
    splits: dict[str, Split]
    outside: list[PurePath]
    links: list[PurePath]

    def load(self, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
        """The images of a split, with labels from the names of their folders or from metadata.

        Args:
            split: In the slicing syntax of `datasets`.
            streaming: As in `load_images`.

        Raises:
            DatasetError: if there is no such split.
        """
        wanted = require_splits(self.path, split, self.splits, self.outside)
        unlisted = [image for name in wanted for image in self._unlisted(self.splits[name])]
        if unlisted:
            logger.warning("Left out: no metadata file lists %s of %s.", _some(unlisted), self.path)
        return datasets.load_dataset(
            "imagefolder",
            data_dir=str(self.path),
            data_files={name: self._patterns(part) for name, part in self.splits.items()},
            drop_labels=None if self.has_labels else True,
            split=split,
            streaming=streaming,
        )

    @property
    def has_labels(self) -> bool:
        """Whether the names of folders are labels: all images lie equally deep, in folders below those of the split."""
        depths = {
            len(image.relative_to(root).parts)
            for part in self.splits.values()
            for image in part.images
            for root in part.roots
            if image.is_relative_to(root)
        }
        return len(depths) == 1 and depths.pop() > 1

    def _patterns(self, part: Split) -> list[str]:
        """The files of a split as patterns: there are far fewer of them, and each is looked for on its own."""
        links = [link for link in self.links if any(link.is_relative_to(root) for root in part.roots)]
        patterns = []
        for root in dict.fromkeys([*part.roots, *links]):
            inside = [link for link in links if link != root]
            own = [
                file
                for file in (*part.images, *part.metadata)
                if file.is_relative_to(root) and not any(file.is_relative_to(link) for link in inside)
            ]
            endings = {file.name if file.name in _METADATA else f"*{file.suffix}" for file in own}
            place = os.path.abspath(self.path / root)
            if root in links and glob.has_magic(place):
                # a pattern for it begins to search above the link, and does not follow it
                raise DatasetError(f"{place} is a symbolic link whose path has one of *, ? and [. Rename it.")
            patterns += [os.path.join(glob.escape(place), "**", ending) for ending in sorted(endings)]
        return patterns

    def _unlisted(self, part: Split) -> list[PurePath]:
        """The images of a split that its metadata files do not list, where there are any: these are not loaded."""
        if not part.metadata:
            return []
        listed: set[PurePath] = set()
        for metadata in part.metadata:
            names = _listed_in(self.path / metadata)
            if names is None:
                return []
            listed.update(PurePath(os.path.normpath(metadata.parent / name)) for name in names)
        return [image for image in part.images if image not in listed]


def find_image_folder(path: Path) -> ImageFolder | None:
    """Look at a local folder.

    Its direct sub-folders are splits where they are called train, validation or test (or as in `SPLIT_FOLDERS`), and
    so are those of its only sub-folder. Otherwise all images are the split `train`: a folder called train beside bus
    and car is a class like these.

    Returns:
        What it holds; `None` for what is left to `datasets`: folders of parquet files and their like, with archives,
        or with a data set card that names the files.
    """
    files, links = _walk(path)
    images = [file for file in files if file.suffix.lower() in _IMAGES]
    metadata = [file for file in files if file.name in _METADATA]
    others = {file.suffix.lower() for file in files if file.name not in _METADATA}
    if not images or others & _TABLES or ".zip" in others or names_its_files(path):
        return None
    base = _only_folder(images)
    folders = _split_folders([image.relative_to(base) for image in images])
    if not folders:
        _warn_of_deeper_splits(path, images)
        return ImageFolder(path, {"train": Split([PurePath()], images, metadata)}, [], links)
    splits: dict[str, Split] = {}
    outside = {*images, *metadata}
    for folder, name in sorted(folders.items()):
        part = splits.setdefault(name, Split())
        part.roots.append(base / folder)
        own = [[file for file in files if file.is_relative_to(base / folder)] for files in (images, metadata)]
        part.images += own[0]
        part.metadata += own[1]
        outside.difference_update(*own)
    return ImageFolder(path, splits, sorted(outside), links)


def find_unused(path: Path, builder: datasets.DatasetBuilder) -> list[PurePath]:
    """The files of a folder that `datasets` leaves out, of the kinds that it takes.

    Args:
        path: The folder.
        builder: What `datasets` makes of it.
    """
    taken = {PurePath(os.path.realpath(file)) for files in builder.config.data_files.values() for file in files}
    kinds = {file.suffix for file in taken}
    files, _ = _walk(path)
    candidates = [file for file in files if file.suffix in kinds and file.name not in FILES_TO_IGNORE]
    return [file for file in candidates if PurePath(os.path.realpath(path / file)) not in taken]


def require_splits(path: Path, split: str, known: Iterable[str], unused: list[PurePath]) -> list[str]:
    """Hold what is asked for against what a folder has, and say what of it is in no split.

    Args:
        path: The folder.
        split: In the slicing syntax of `datasets`.
        known: The splits that there are.
        unused: The files that are in none of them.

    Returns:
        The names of the splits asked for.

    Raises:
        DatasetError: if one of them is not known.
    """
    known = [str(name) for name in known]
    left_out = ""
    if unused:
        verb = "is" if len(unused) == 1 else "are"
        left_out = (
            f"{_some(unused)} of {path} {verb} in no split and left out, because other files or folders of it are "
            "named like splits (train, validation, test, ...). Move what is left out into a split, or rename these."
        )
    names = [part.partition("[")[0].strip() for part in split.split("+")]
    for name in names:
        if name not in known and name != "all":
            have = f"only the split {known[0]!r}" if len(known) == 1 else f"the splits {', '.join(map(repr, known))}"
            raise DatasetError(
                f"It has {have}. Name a part of it as a slice, such as '{known[0]}[80%:]', or put the files into "
                f"sub-folders called train, validation and test. {left_out}".strip()
            )
    if left_out:
        logger.warning("%s", left_out)
    return known if "all" in names else names


def names_its_files(path: Path) -> bool:
    """Whether a folder has a data set card that says which files are in which split."""
    if (path / datasets.config.REPOYAML_FILENAME).is_file():
        return True
    card = path / datasets.config.REPOCARD_FILENAME
    return card.is_file() and "configs" in DatasetCard.load(card).data.to_dict()


def _only_folder(images: list[PurePath]) -> PurePath:
    """The folder in which all images lie, down to where there are several or where they are called like a split."""
    base = PurePath()
    while True:
        rest = [image.relative_to(base).parts for image in images]
        tops = {parts[0] for parts in rest}
        if len(tops) > 1 or len(rest[0]) == 1 or next(iter(tops)).casefold() in SPLIT_FOLDERS:
            return base
        base /= tops.pop()


def _warn_of_deeper_splits(path: Path, images: list[PurePath]) -> None:
    """Say so where the images of splits may be mixed, because their folders lie too deep."""
    names = {name for image in images for name in image.parts[:-1] if name.casefold() in SPLIT_FOLDERS}
    if len({SPLIT_FOLDERS[name.casefold()] for name in names}) > 1:
        logger.warning(
            "All images of %s are the split 'train', although folders in it are called %s: splits are direct "
            "sub-folders, with the folders of the classes in them.",
            path,
            ", ".join(sorted(names)),
        )


def _split_folders(images: list[PurePath]) -> dict[str, str]:
    """The direct sub-folders that are splits, and which; none where they are classes."""
    found = {image.parts[0] for image in images if len(image.parts) > 1}
    named = {name: SPLIT_FOLDERS[name.casefold()] for name in found if name.casefold() in SPLIT_FOLDERS}
    inside = [len(image.parts) for image in images if image.parts[0] in named]
    beside = [len(image.parts) for image in images if image.parts[0] not in named and len(image.parts) > 1]
    # folders beside them make a class of one, unless it holds class folders where these hold images
    if beside and len(set(named.values())) == 1 and min(inside) <= max(beside):
        return {}
    return named


def _walk(path: Path) -> tuple[list[PurePath], list[PurePath]]:
    """The files in a folder that `datasets` would look at, and the sub-folders that are links, relative to it."""
    files: list[PurePath] = []
    links: list[PurePath] = []
    seen = {os.path.realpath(path)}
    for place, folders, names in os.walk(path, followlinks=True):
        relative = PurePath(os.path.relpath(place, path))
        files += [relative / name for name in sorted(names) if not name.startswith(".")]
        folders[:] = sorted(_new_folders(place, folders, seen))
        links += [relative / name for name in folders if os.path.islink(os.path.join(place, name))]
    return files, links


def _new_folders(place: str, names: list[str], seen: set[str]) -> Iterator[str]:
    """Those sub-folders that are neither hidden nor, by way of links, a folder that was looked at before."""
    for name in names:
        real = os.path.realpath(os.path.join(place, name))
        if not name.startswith((".", "__")) and real not in seen:
            seen.add(real)
            yield name


def _listed_in(metadata: Path) -> list[str] | None:
    """The files that a metadata file lists; `None` where it does not list them in columns."""
    if metadata.suffix == ".csv":
        table = pandas.read_csv(metadata, dtype=str)
    elif metadata.suffix == ".jsonl":
        table = pandas.read_json(metadata, lines=True, dtype=False)
    else:
        table = pandas.read_parquet(metadata)
    columns = [name for name in table.columns if name.endswith(("file_name", "file_names"))]
    if not columns:
        return None
    return [name for column in columns for name in table[column].explode().dropna()]


def _some(files: list[PurePath]) -> str:
    """How many files there are, and the names of the first."""
    names = ", ".join(str(file) for file in files[:_SHOWN])
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} ({names}{', ...' if len(files) > _SHOWN else ''})"
