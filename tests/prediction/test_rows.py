# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The rows of a data set from any of them on, for one shard of several."""

import itertools

import datasets
import pytest
from PIL import Image

from tocom_hf import ArgumentError, DatasetError
from tocom_hf.prediction.rows import read_rows


LENGTHS = [4, 1, 6, 2]


def table(first, count):
    content = {"id": list(range(first, first + count)), "image": [Image.new("RGB", (2, 2))] * count}
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})
    return datasets.Dataset.from_dict(content, features)


@pytest.fixture
def stream(tmp_path):
    """A stream of four files."""
    starts = itertools.accumulate(LENGTHS, initial=0)
    for number, (start, count) in enumerate(zip(starts, LENGTHS, strict=False)):
        table(start, count).to_parquet(tmp_path / f"{number}.parquet")
    files = sorted(map(str, tmp_path.glob("*.parquet")))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def ids(rows, start, count=None):
    return [row["id"] for row in itertools.islice(rows.since(start), count)]


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 17])
def test_shards_of_a_table_are_runs_that_make_up_the_whole(shards):
    dataset = table(100, 13)
    found = []
    for index in range(shards):
        rows = read_rows(dataset, "image", shards, index)
        own = ids(rows, 0)
        assert len(own) == rows.total
        assert [rows.place(row)["row"] + 100 for row in range(len(own))] == own
        assert ids(rows, rows.total // 2) == own[rows.total // 2 :]
        found += own
    assert found == list(range(100, 113))


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_shards_of_a_stream_are_runs_of_files_that_make_up_the_whole(stream, shards):
    rows = [read_rows(stream, "image", shards, index) for index in range(shards)]
    assert [number for own in rows for number in ids(own, 0)] == list(range(13))
    assert [length for own in rows for length in own.file_lengths] == LENGTHS
    assert rows[0].place(3) == ({"row": 3} if shards == 1 else {"shard": 0, "row_of_shard": 3})


@pytest.mark.parametrize("learnt", range(5))
def test_a_stream_goes_on_anywhere_whatever_is_known_of_its_files(stream, learnt):
    """A run knows all files that it has read to their end, or has seen the end of none behind its last row."""
    first = sum(LENGTHS[:learnt])
    last = sum(LENGTHS[: learnt + 1])
    for start in range(0 if learnt == 4 else first, last + 1):
        rows = read_rows(stream, "image")
        rows.file_lengths = LENGTHS[:learnt]
        assert ids(rows, start, 2) == list(range(start, 13))[:2]
        assert ids(rows, start) == list(range(start, 13))
        assert rows.file_lengths == LENGTHS


def test_files_that_are_done_are_not_opened_again(stream, tmp_path):
    rows = read_rows(stream, "image")
    rows.file_lengths = LENGTHS[:2]
    for number in (0, 1):
        (tmp_path / f"{number}.parquet").unlink()
    assert ids(rows, 5) == list(range(5, 13))


def test_very_many_files_are_taken_in_groups(stream, monkeypatch):
    monkeypatch.setattr("tocom_hf.prediction.rows._MANY_FILES", 3)
    monkeypatch.setattr("tocom_hf.prediction.rows._GROUPS", 2)
    rows = read_rows(stream, "image")
    assert ids(rows, 0) == list(range(13))
    assert rows.file_lengths == [5, 8]
    assert ids(rows, 7) == list(range(7, 13))


def test_images_stay_undecoded(stream):
    for dataset in (stream, table(0, 2)):
        row = next(read_rows(dataset, "image").since(0))
        assert isinstance(row["image"]["bytes"], bytes)


def test_a_stream_has_no_more_shards_than_files(stream):
    with pytest.raises(ArgumentError, match=r"is read as 4 files, .* 5 shards are too many. .* leave --streaming out"):
        read_rows(stream, "image", 5, 0)


def test_a_file_that_breaks_off_is_an_error_of_the_data_set(stream, tmp_path):
    file = tmp_path / "2.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    rows = read_rows(stream, "image")
    with pytest.raises(DatasetError, match=r"Row 5 of the data set cannot be read: .* it goes on from there"):
        ids(rows, 0)
