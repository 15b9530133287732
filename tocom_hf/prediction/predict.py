# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""From the rows of a data set, batch by batch, to parquet files with a row for each of them."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.features.features import require_decoding
from tqdm.auto import tqdm

from tocom_hf.deployed.scores import scores_of
from tocom_hf.errors import ArgumentError, DatasetError, UnreadableImageError
from tocom_hf.prediction.backends import Backend
from tocom_hf.prediction.parts import Parts
from tocom_hf.prediction.rows import Rows


_AHEAD = 2  # batches that are read while one is in the model
_PART_SECONDS = 300.0  # after which a part is written though it is small, so that no more than this is lost
_Columns = dict[str, list[Any]]
_ALWAYS = {"path": datasets.Value("string"), "reason": datasets.Value("string")}


@dataclass(frozen=True)
class Options:
    """How a data set is gone through.

    Attributes:
        image_column: Column of the images or clips.
        keep: Columns of the data set that go into the results, and what they are called there.
        batch_size: Samples of a forward pass.
        rows_per_part: A part is written once it has so many rows, or after five minutes.
        top_k: How many labels for each row.
        skip_damaged: Note why where an image is damaged, instead of stopping.
        num_workers: Threads that read and prepare samples.
        noun: What the rows are, images or clips.
    """

    image_column: str = "image"
    keep: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 32
    rows_per_part: int = 10_000
    top_k: int = 5
    skip_damaged: bool = False
    num_workers: int = 4
    noun: str = "images"


@dataclass
class Summary:
    """What a run has done.

    Attributes:
        rows: Rows that are predicted now, with those of earlier runs.
        new: Rows that this run has predicted.
        damaged: How many of these are damaged.
        seconds: What it took.
        noun: What the rows are.
    """

    rows: int
    new: int
    damaged: int
    seconds: float
    noun: str = "images"

    def __str__(self) -> str:
        text = f"{self.rows} {self.noun}"
        if self.rows and not self.new:
            return f"{text}, all of them before"
        if self.new != self.rows:
            text += f", {self.new} of them now"
        if self.damaged:
            text += f", {self.damaged} of these damaged"
        return f"{text}; {self.new / self.seconds:.1f} {self.noun}/s"


def predict(backend: Backend, rows: Rows, parts: Parts, options: Options) -> Summary:
    """Write the predictions of all rows that have none yet.

    A batch is a function of the rows done and of `batch_size` alone, so that a run which goes on gives what it would
    have given in one go.

    Args:
        backend: The model.
        rows: What to predict.
        parts: Where the predictions go, and what is there already.
        options: How.

    Raises:
        DatasetError: if a row cannot be read, or there are none.
        UnreadableImageError: if an image is damaged, without `options.skip_damaged`.
        ArgumentError: if the model refuses the inputs, or memory does not suffice.
        PluginFileError: if a part cannot be written, for instance because the disk is full.
    """
    start = time.perf_counter()
    rows.file_lengths = list(parts.file_lengths)
    run = _Run(backend, rows, options)
    lost = parts.broken()
    left = None if rows.total is None else rows.total - parts.rows + sum(part.count for part in lost)
    done = parts.rows - sum(part.count for part in lost)
    total = None if left is None else done + left
    with tqdm(desc="predicting", total=total, initial=done, unit=f" {options.noun}", disable=None) as bar:
        for part in lost:
            batches = list(run.batches(part.start, bar, part.count))
            if sum(map(_length, batches)) != part.count:
                raise DatasetError(
                    f"{parts.path(part.index)} is missing or damaged, and the data set has no longer the "
                    f"{part.count} rows that were in it. It has changed: choose another --output."
                )
            parts.replace(part, run.table(batches))
        if not parts.finished:
            _append(run, parts, bar, options.rows_per_part)
    return Summary(parts.rows, run.count, run.damaged, time.perf_counter() - start, options.noun)


def _append(run: "_Run", parts: Parts, bar: tqdm, rows_per_part: int) -> None:
    """Write what comes behind the parts that there are."""
    pending: list[_Columns] = []
    written = time.monotonic()
    for batch in run.batches(parts.rows, bar):
        pending.append(batch)
        late = time.monotonic() - written >= _PART_SECONDS
        if late or sum(map(_length, pending)) >= rows_per_part:
            parts.append(run.table(pending), run.rows.file_lengths)
            pending, written = [], time.monotonic()
    if pending:
        parts.append(run.table(pending), run.rows.file_lengths)
    if not parts.counts and run.rows.total is None:
        raise DatasetError("There are no rows in the data set, or none in the files of this shard.")
    parts.finish()


def result_features(backend: Backend, columns: datasets.Features, options: Options) -> datasets.Features:
    """The columns of the results behind those that say which row it is.

    Args:
        backend: The model.
        columns: Those of the data set.
        options: Which of them to keep, and under which names.

    Raises:
        ArgumentError: if a column to keep holds media, or has the name of another column of the results.
    """
    own: dict[str, Any] = {"features": datasets.List(datasets.Value("float32"))}
    if backend.labels is not None:
        own = {"label": datasets.Value("string"), "label_id": datasets.Value("int64")}
        own["score"] = datasets.Value("float32")
        if options.top_k > 1:
            own["labels"] = datasets.List(datasets.Value("string"))
            own["scores"] = datasets.List(datasets.Value("float32"))
    kept: dict[str, Any] = {}
    for name, given in options.keep.items():
        if given in {*own, *_ALWAYS, *kept, "row", "shard", "row_of_shard"}:
            raise ArgumentError(
                f"The results have a column {given!r} of their own, so that one of the data set cannot be kept under "
                f"this name. Give it another: --keep_columns {name}=true_{name}."
            )
        if require_decoding(columns[name], ignore_decode_attribute=True):
            raise ArgumentError(
                f"The column {name!r} holds {columns[name]}. --keep_columns is for what tells rows apart, such as "
                "numbers and names, not for the images themselves."
            )
        kept[given] = columns[name]
    return datasets.Features({**kept, **own, **_ALWAYS})


@dataclass
class _Sample:
    """A row, and its input or why it has none."""

    number: int
    content: dict[str, Any]
    values: np.ndarray | None = None
    path: str | None = None
    reason: str | None = None


class _Run:
    """One run over some rows, which counts what it does."""

    def __init__(self, backend: Backend, rows: Rows, options: Options):
        self.backend, self.rows, self.options = backend, rows, options
        self.features = result_features(backend, rows.features, options)
        self.count = self.damaged = 0

    def batches(self, start: int, bar: tqdm, count: int | None = None) -> Iterator[_Columns]:
        """The results for rows, the columns of one batch after the other.

        Args:
            start: The first row.
            bar: Is moved on.
            count: How many rows; `None` for all that follow.
        """
        for batch in self._samples(islice(self.rows.since(start), count), start):
            outputs = self._outputs([sample for sample in batch if sample.values is not None])
            columns = self._columns(batch, outputs)
            self.count += len(batch)
            self.damaged += len(batch) - len(outputs)
            bar.update(len(batch))
            yield columns

    def table(self, batches: Sequence[_Columns]) -> pa.Table:
        """The columns of batches as a table, with what `datasets` notes of their types."""
        features = datasets.Features(
            {
                name: self.features.get(name, datasets.Value("int64")) for name in batches[0]
            }  # the latter are row numbers
        )
        columns = {name: [value for batch in batches for value in batch[name]] for name in features}
        # once for many rows, because a Dataset takes a fingerprint of all that it is made of
        return datasets.Dataset.from_dict(columns, features=features).data.table

    def _samples(self, rows: Iterable[dict[str, Any]], start: int) -> Iterator[list[_Sample]]:
        """Batches of samples that are ready, read by threads while the model is busy with those before."""
        samples = (_Sample(start + index, content) for index, content in enumerate(rows))
        waiting: deque[list[tuple[_Sample, Future]]] = deque()
        pool = ThreadPoolExecutor(self.options.num_workers, thread_name_prefix="reader")
        try:
            while True:
                batch = list(islice(samples, self.options.batch_size))
                if batch:
                    waiting.append([(sample, pool.submit(self._read, sample)) for sample in batch])
                if not waiting:
                    return
                if not batch or len(waiting) > _AHEAD:
                    ready = waiting.popleft()
                    for _, future in ready:
                        future.result()
                    yield [sample for sample, _ in ready]
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, sample: _Sample) -> None:
        encoded = sample.content.pop(self.options.image_column)
        sample.path = _path_of(encoded)
        try:
            sample.values = self.backend.read(encoded)
        except UnreadableImageError as error:
            if not self.options.skip_damaged:
                raise UnreadableImageError(
                    f"Row {sample.number}: {error} Or pass over such rows with --skip_damaged. The same command goes "
                    "on from the last part that was written."
                ) from error
            sample.reason = str(error)
        except DatasetError as error:
            raise DatasetError(
                f"Row {sample.number}: {error} The same command goes on from the last part that was written."
            ) from error

    def _outputs(self, samples: list[_Sample]) -> np.ndarray:
        """`(samples, classes)` or `(samples, features)`."""
        values = [sample.values for sample in samples if sample.values is not None]
        if not values:
            return np.empty((0, 0), np.float32)
        for sample, own in zip(samples, values, strict=True):
            if own.shape != values[0].shape:
                raise ArgumentError(
                    f"The image of row {sample.number} becomes an input of the shape {own.shape}, that of row "
                    f"{samples[0].number} one of {values[0].shape}, because the image processor does not resize. Let "
                    "it (do_resize in its preprocessor_config.json), or give --batch_size 1."
                )
        return self.backend.run(np.stack(values))

    def _columns(self, batch: list[_Sample], outputs: np.ndarray) -> _Columns:
        columns: _Columns = {}
        places = [self.rows.place(sample.number) for sample in batch]
        for name in places[0]:
            columns[name] = [place[name] for place in places]
        for name, given in self.options.keep.items():
            columns[given] = [sample.content[name] for sample in batch]
        found = iter(self._results(outputs))
        results = [next(found) if sample.values is not None else {} for sample in batch]
        for name in self.features:
            if name not in columns:
                columns[name] = [result.get(name) for result in results]
        columns["path"] = [sample.path for sample in batch]
        columns["reason"] = [sample.reason for sample in batch]
        return columns

    def _results(self, outputs: np.ndarray) -> Iterator[dict[str, Any]]:
        """What is found for each row, by the names of the columns."""
        labels = self.backend.labels
        if labels is None:
            for vector in outputs:
                yield {"features": vector}
            return
        scores = scores_of(outputs, self.backend.scores)  # (batch, classes)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.options.top_k]  # (batch, top_k)
        for row, best in zip(scores, order, strict=True):
            yield {
                "label": labels[best[0]],
                "label_id": int(best[0]),
                "score": row[best[0]],
                "labels": [labels[index] for index in best],
                "scores": row[best],
            }


def _path_of(encoded: Any) -> str | None:
    """What the data set says of the file of an undecoded image or video, or of the first frame of a clip."""
    first = encoded[0] if isinstance(encoded, list) and encoded else encoded
    return first.get("path") if isinstance(first, dict) else None


def _length(columns: _Columns) -> int:
    return len(columns["reason"])
