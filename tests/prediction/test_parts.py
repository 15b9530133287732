# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A folder of parts remembers how far a run has come, and is not written by two."""

import errno
import json
import os

import datasets
import pyarrow as pa
import pytest

from tocom_hf import ArgumentError, PluginFileError
from tocom_hf.prediction.parts import Part, open_parts


SETTINGS = {"model": "m", "target_r": 4, "keep": {"id": "id"}}


def rows(*values):
    return pa.table({"row": values})


def write(folder, *tables, finished=False, settings=SETTINGS, **shard):
    with open_parts(folder, settings, **shard) as parts:
        for table in tables:
            parts.append(table, [1])
        if finished:
            parts.finish()


def read(folder):
    """All rows, as anybody reads the folder."""
    return datasets.load_dataset(str(folder), split="train")["row"][:]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_run_is_taken_up(tmp_path):
    write(tmp_path / "out", rows(0, 1), rows(2))
    with open_parts(tmp_path / "out", SETTINGS) as parts:
        assert (parts.rows, parts.counts, parts.file_lengths, parts.finished) == (3, [2, 1], [1], False)
        parts.append(rows(3, 4), [1])
        parts.finish()
    assert read(tmp_path / "out") == [0, 1, 2, 3, 4]
    state = json.loads((tmp_path / "out/.tocom-predictions.json").read_text())
    assert (state["rows"], state["finished"], state["settings"]) == (5, True, SETTINGS)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".tocom-predictions.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_what_the_state_does_not_list_is_written_anew(tmp_path):
    """A process may be killed between a part and the state, and while it writes either."""
    write(tmp_path, rows(0))
    (tmp_path / "part-00001.parquet").write_bytes((tmp_path / "part-00000.parquet").read_bytes())
    (tmp_path / ".writing-part-00002.parquet").write_bytes(b"PAR1")
    (tmp_path / ".writing-.tocom-predictions.json").write_bytes(b"{")
    write(tmp_path, finished=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tocom-predictions.json", "part-00000.parquet"]


@pytest.mark.parametrize("damage", ["missing", "cut off", "of other rows", "empty"])
def test_lost_parts_are_found(tmp_path, damage):
    write(tmp_path, rows(0, 1), rows(2, 3, 4), rows(5), finished=True)
    path = tmp_path / "part-00001.parquet"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "of other rows":
        path.write_bytes((tmp_path / "part-00000.parquet").read_bytes())
    else:
        path.write_bytes(content[:-20] if damage == "cut off" else b"")
    with open_parts(tmp_path, SETTINGS) as parts:
        [lost] = parts.broken()
        assert lost == Part(1, 2, 3)
        parts.replace(lost, rows(2, 3, 4))
        assert parts.broken() == []
    assert read(tmp_path) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", [{"target_r": 8}, {"keep": {}}, {"new": 1}])
def test_other_settings_are_refused_and_named(tmp_path, change):
    write(tmp_path, rows(0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    [name] = change
    with pytest.raises(ArgumentError, match=rf"holds predictions of another run .*: {name} is .* there and .* now\. "):
        write(tmp_path, settings={**SETTINGS, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_share_a_folder_and_its_settings(tmp_path):
    write(tmp_path, rows(0, 1), num_shards=2, shard_index=0)
    write(tmp_path, rows(2), num_shards=2, shard_index=1)
    assert read(tmp_path) == [0, 1, 2]
    assert (tmp_path / "shard-00001-of-00002-part-00000.parquet").exists()
    with pytest.raises(ArgumentError, match="target_r is 4 there and 5 now"):
        write(tmp_path, settings={**SETTINGS, "target_r": 5}, num_shards=2, shard_index=1)


def test_parquet_files_of_others_are_refused(tmp_path):
    (tmp_path / "mine.parquet").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"holds mine.parquet, and no record of the run"):
        write(tmp_path, rows(0))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.parquet"]


def test_a_second_process_is_refused(tmp_path):
    with open_parts(tmp_path, SETTINGS), pytest.raises(ArgumentError, match="Another process is writing"):
        write(tmp_path, rows(0))
    with open_parts(tmp_path, SETTINGS, 2, 0):
        write(tmp_path, rows(0), num_shards=2, shard_index=1)
    write(tmp_path / "other", rows(0))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"settings": {}, "parts": [-1], "file_lengths": [], "finished": true}', '{"settings": {}}'],
)
def test_a_damaged_state_is_refused(tmp_path, content):
    write(tmp_path, rows(0))
    (tmp_path / ".tocom-predictions.json").write_text(content)
    with pytest.raises(PluginFileError, match=r"says what the part files beside it hold: Choose another --output"):
        write(tmp_path, rows(1))


def test_a_full_disk_costs_nothing_that_is_written(tmp_path, monkeypatch):
    write(tmp_path, rows(0, 1))
    real = os.replace

    def fail(source, target):
        if target.suffix == ".parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PluginFileError) as caught:
        write(tmp_path, rows(2))
    for text in ("part-00001.parquet cannot be written", "No space left", f"Free space on the disk of {tmp_path}",
                 "1 MB for each part", "the same command again", "The 2 rows that are written stay"):  # fmt: skip
        assert text in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tocom-predictions.json", "part-00000.parquet"]
    monkeypatch.setattr(os, "replace", real)
    write(tmp_path, rows(2), finished=True)
    assert read(tmp_path) == [0, 1, 2]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"cannot be made: .* Choose another --output"):
        write(tmp_path / "file" / "out")
