# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a prediction: parquet files that are written one after the other, and how far a run has come.

A part is written under another name, flushed to the disk and renamed. Then the state file, which lists the rows of
every part, is replaced in the same way. So a run that is killed at any time goes on behind its last part, and a file
that the state does not list is written anew. Names that begin with a dot are passed over by those who read the folder
as one data set.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from tocom_hf.errors import ArgumentError, PluginFileError
from tocom_hf.storage.durable_files import UNFINISHED, write_durably
from tocom_hf.storage.json_files import read_json
from tocom_hf.storage.transaction import disk_is_full
from tocom_hf.version import __version__


_STATE = ".tocom-predictions"
_ANEW = "choose another --output, or delete the files of this one to start anew."


@dataclass(frozen=True)
class Part:
    """A file of a shard: its number, the number of its first row in the shard, and how many rows it has."""

    index: int
    start: int
    count: int


class Parts:
    """What one shard has written, and may write. It is locked: `open_parts` makes it.

    Attributes:
        folder: Where the parts are.
        counts: The rows of every part.
        file_lengths: As in `Rows`.
        finished: Whether all rows are written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], num_shards: int, shard_index: int):
        self.folder = folder
        self._settings = dict(settings)
        self._shard = "" if num_shards == 1 else f"shard-{shard_index:05}-of-{num_shards:05}-"
        self.counts: list[int] = []
        self.file_lengths: list[int] = []
        self.finished = False

    @property
    def rows(self) -> int:
        """How many rows are written."""
        return sum(self.counts)

    def path(self, index: int) -> Path:
        """The file of a part."""
        return self.folder / f"{self._shard}part-{index:05}.parquet"

    @property
    def state_path(self) -> Path:
        """The file that says how far the shard is."""
        return self.folder / f"{_STATE}{f'-{self._shard}'.rstrip('-')}.json"

    def broken(self) -> list[Part]:
        """Parts that are missing, cut off, or have another number of rows than they were written with."""
        found = []
        start = 0
        for index, count in enumerate(self.counts):
            if _count_rows(self.path(index)) != count:
                found.append(Part(index, start, count))
            start += count
        return found

    def append(self, table: pa.Table, file_lengths: list[int]) -> None:
        """Write the next part.

        Raises:
            PluginFileError: if the disk is full, or the part cannot be written for another reason.
        """
        self._write(self.path(len(self.counts)), _as_parquet(table))
        self.counts.append(len(table))
        self.file_lengths = list(file_lengths)
        self._save()

    def replace(self, part: Part, table: pa.Table) -> None:
        """Write a part anew that was lost. Raises what `append` raises."""
        self._write(self.path(part.index), _as_parquet(table))

    def finish(self) -> None:
        """Note that there are no more rows. Raises what `append` raises."""
        self.finished = True
        self._save()

    def begin(self) -> None:
        """Take up what an earlier run has left, if its settings are the same.

        Raises:
            ArgumentError: if the folder holds predictions of another run, or other parquet files.
            PluginFileError: if a state file is damaged, or nothing can be written.
        """
        states = {path: _read_state(path) for path in sorted(self.folder.glob(f"{_STATE}*.json"))}
        for path, state in states.items():
            self._require_same(path, state["settings"])
        own = states.get(self.state_path)
        if own is None:
            self._require_free(self._shard if states else "")
        else:
            self.counts, self.file_lengths = own["parts"], own["file_lengths"]
            self.finished = own["finished"]
        for path in self.folder.glob(f"{UNFINISHED}*"):
            if self._shard.rstrip("-") in path.name:
                path.unlink()
        if not self.finished:  # also in order to see that the folder can be written to
            self.path(len(self.counts)).unlink(missing_ok=True)
            self._save()

    def _require_same(self, path: Path, settings: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self._settings))
        changed = [
            f"{name} is {settings.get(name)!r:.100} there and {now.get(name)!r:.100} now"
            for name in sorted(settings.keys() | now.keys())
            if settings.get(name) != now.get(name)
        ]
        if changed:
            raise ArgumentError(
                f"{self.folder} holds predictions of another run ({path.name}): {'; '.join(changed)}. Give the command "
                f"of that run to go on with it; else {_ANEW}"
            )

    def _require_free(self, start: str) -> None:
        strangers = sorted(path.name for path in self.folder.glob(f"{start}*.parquet"))
        if strangers:
            raise ArgumentError(
                f"{self.folder} holds {strangers[0]}, and no record of the run that wrote it. Choose another --output."
            )

    def _save(self) -> None:
        content = {
            "tocom_hf_version": __version__,
            "settings": self._settings,
            "rows": self.rows,
            "parts": self.counts,
            "file_lengths": self.file_lengths,
            "finished": self.finished,
        }
        self._write(self.state_path, (json.dumps(content, indent=1) + "\n").encode())

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_durably(path, content)
        except OSError as error:
            kept = f"The {self.rows} rows that are written stay"
            advice = f"Remove the cause and give the same command again: it goes on. {kept}."
            if disk_is_full(error):
                advice = (
                    f"Free space on the disk of {self.folder.absolute()}, {max(len(content) // 10**6, 1)} MB for each "
                    f"part, without moving the parts, and give the same command again: it goes on. {kept}."
                )
            raise PluginFileError(f"{path} cannot be written: {error}. {advice}") from error


@contextlib.contextmanager
def open_parts(folder: Path, settings: Mapping[str, Any], num_shards: int = 1, shard_index: int = 0) -> Iterator[Parts]:
    """Make the folder of a run where there is none, and keep other processes from writing the same shard.

    Args:
        folder: Where the parts go, those of all shards.
        settings: What decides the predictions, as JSON can hold it. All shards of a folder have the same.
        num_shards, shard_index: Which part of the data set is written, of how many.

    Raises:
        ArgumentError: if the folder cannot be made, is in use, or holds something else.
        PluginFileError: if a state file is damaged, or nothing can be written.
    """
    parts = Parts(folder, settings, num_shards, shard_index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"The folder {folder} cannot be made: {error}. Choose another --output.") from error
    lock = parts.state_path.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                parts.begin()
                yield parts
            finally:
                with contextlib.suppress(OSError):
                    lock.unlink()
    except Timeout as error:
        raise ArgumentError(
            f"Another process is writing into {folder} what this command would. Wait for it, or choose another "
            "--output; several machines take a --shard_index each."
        ) from error


def _as_parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


def _count_rows(path: Path) -> int | None:
    """The rows of a parquet file, `None` for one that is missing or cut off."""
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException):
        return None


def _read_state(path: Path) -> dict[str, Any]:
    advice = f"It says what the part files beside it hold: {_ANEW[0].upper()}{_ANEW[1:]}"
    state = read_json(path, advice)
    kinds: dict[str, type] = {"settings": dict, "parts": list, "file_lengths": list, "finished": bool}
    for name, kind in kinds.items():
        value = state.get(name)
        counts = value if kind is list and isinstance(value, list) else []
        if not isinstance(value, kind) or not all(type(count) is int and count >= 0 for count in counts):
            raise PluginFileError(f"{path} has no usable entry {name!r}. {advice}")
    return state
