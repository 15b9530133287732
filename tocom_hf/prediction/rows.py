# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The rows of a data set, or of one shard of it, from any row on: of a table in memory-mapped files, or of a stream."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import datasets

from tocom_hf.data.clips import encoded_clips
from tocom_hf.errors import ArgumentError, DatasetError


_MANY_FILES, _GROUPS = 10_000, 100


class Rows(ABC):
    """What one shard reads. Images, clips and videos stay undecoded.

    Attributes:
        features: What the columns hold.
        total: How many rows there are, `None` for a stream.
        file_lengths: Of a stream, the rows of its files as far as they were read to their end; where there are very
            many, those of groups of them. Who goes on where another run has stopped sets what that one has learnt.
    """

    features: datasets.Features
    total: int | None
    file_lengths: list[int]

    @abstractmethod
    def place(self, row: int) -> dict[str, int]:
        """What tells a row from all others of the data set, as columns; `row` counts those that this shard reads."""

    def since(self, start: int) -> Iterator[dict[str, Any]]:
        """The rows from this one on.

        Raises:
            DatasetError: if a row cannot be read.
        """
        iterator = self._since(start)
        row = start
        while True:
            try:
                content = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # each format and each way to a file has exceptions of its own
                reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
                raise DatasetError(
                    f"Row {row} of the data set cannot be read: {reason:.400}. What was predicted before stays. Once "
                    "that is mended give the same command again: it goes on from there."
                ) from error
            yield content
            row += 1

    @abstractmethod
    def _since(self, start: int) -> Iterator[dict[str, Any]]:
        """`since`, but for its errors."""


class TableRows(Rows):
    """A run of rows of a `datasets.Dataset`."""

    def __init__(self, dataset: datasets.Dataset, num_shards: int, shard_index: int):
        self._first = len(dataset) * shard_index // num_shards
        self._end = len(dataset) * (shard_index + 1) // num_shards
        self._dataset = dataset
        self.features, self.total, self.file_lengths = dataset.features, self._end - self._first, []

    def place(self, row: int) -> dict[str, int]:
        return {"row": self._first + row}

    def _since(self, start: int) -> Iterator[dict[str, Any]]:
        yield from self._dataset.select(range(self._first + start, self._end))


class StreamRows(Rows):
    """A run of files of a `datasets.IterableDataset`.

    How many rows a file has is known once it was read. Files whose rows were all predicted are not opened again.
    """

    def __init__(self, stream: datasets.IterableDataset, num_shards: int, shard_index: int):
        if num_shards > max(stream.num_shards, 1):
            raise ArgumentError(
                f"The stream is read as {stream.num_shards} file{'' if stream.num_shards == 1 else 's'}, of which each "
                f"shard takes some, so that {num_shards} shards are too many. Take fewer, or leave --streaming out."
            )
        self._shard = (shard_index, num_shards)
        self._stream = stream if num_shards == 1 else stream.shard(num_shards, shard_index)
        self.features, self.total = stream.features, None
        self.file_lengths = []

    def place(self, row: int) -> dict[str, int]:
        index, count = self._shard
        # how many rows the files of other shards have is not known
        return {"row": row} if count == 1 else {"shard": index, "row_of_shard": row}

    def _since(self, start: int) -> Iterator[dict[str, Any]]:
        files = max(self._stream.num_shards, 1)
        # each of them is found by going through the list of all, which for a folder of images may be a million
        count = files if files <= _MANY_FILES else _GROUPS
        for number in range(count):
            known = number < len(self.file_lengths)
            if known and start >= self.file_lengths[number]:
                start -= self.file_lengths[number]
                continue
            file = self._stream.shard(count, number)
            length = 0
            for row in file.skip(start) if start else file:
                yield row
                length += 1
            if not known:
                self.file_lengths.append(start + length)
            start = 0


def read_rows(dataset: Any, image_column: str, num_shards: int = 1, shard_index: int = 0) -> Rows:
    """The rows of one shard.

    Args:
        dataset: What `load_images` or `load_clips` returned.
        image_column: Column of the images or clips.
        num_shards: Into how many shards the data set is split: runs of rows that follow each other, of a stream runs
            of files.
        shard_index: Which of them to read, from 0 on.

    Raises:
        ArgumentError: if a stream has fewer files than there are shards.
    """
    encoded = encoded_clips(dataset, image_column)
    if isinstance(encoded, datasets.Dataset):
        return TableRows(encoded, num_shards, shard_index)
    return StreamRows(encoded, num_shards, shard_index)
