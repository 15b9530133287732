# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images come in one order whatever the number of processes, and a run goes on at the right sample."""

import itertools

import datasets
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from tocom_hf import DatasetError
from tocom_hf.data.images import TrainingImages
from tocom_hf.distillation.arguments import DistillationArguments
from tocom_hf.distillation.order import KeyedImages, KeyedStream, StreamState, TrainingLoader, TrainingOrder, is_stream


PROCESSOR = ViTImageProcessorPil(size={"height": 4, "width": 4})


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """datasets waits five seconds for its threads at the end of an epoch of parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 images in four files; image i has the grey value 10 i."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        images = [Image.new("RGB", (6, 6), (10 * i,) * 3) for i in range(6 * shard, 6 * shard + 6)]
        data = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
        data.to_parquet(folder / f"part-{shard}.parquet")
    return folder


def stream_of(folder):
    files = sorted(map(str, folder.glob("*.parquet")))
    stream = datasets.load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)
    return TrainingImages(stream, PROCESSOR)


def shown(sample):
    return int(sample["pixel_values"].flatten()[0]) // 10


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    order = list(TrainingOrder(count=20, global_batch=5, seed=0, steps=12))
    epochs = [order[i : i + 20] for i in range(0, 60, 20)]
    for epoch, positions in enumerate(epochs):
        assert sorted(positions) == list(range(20 * epoch, 20 * epoch + 20))
    assert len({tuple(position % 20 for position in positions) for positions in epochs}) == 3
    assert order != list(TrainingOrder(20, 5, seed=1, steps=12))


def test_what_does_not_fill_a_global_batch_is_left_out():
    order = list(TrainingOrder(count=23, global_batch=5, seed=0, steps=8))
    assert [position // 23 for position in order] == [0] * 20 + [1] * 20
    assert len(set(order)) == 40


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7, 12])
def test_an_order_goes_on_where_it_stopped(start):
    whole = list(TrainingOrder(20, 5, seed=0, steps=12))
    rest = TrainingOrder(20, 5, seed=0, steps=12, start=start)
    assert list(rest) == whole[5 * start :]
    assert len(rest) == len(whole) - 5 * start


def test_views_are_functions_of_seed_epoch_and_image(folder):
    files = sorted(map(str, folder.glob("*.parquet")))
    data = datasets.load_dataset("parquet", data_files=files, split="train")
    noise = Image.effect_noise((16, 16), 80).convert("RGB")
    data = data.map(lambda sample: {"image": noise})
    keyed = KeyedImages(TrainingImages(data, PROCESSOR), seed=0)
    again, later = keyed[3], keyed[3 + len(data)]
    assert torch.equal(keyed[3]["pixel_values"], again["pixel_values"])
    assert keyed[3]["key"] == again["key"]
    assert not torch.equal(later["pixel_values"], again["pixel_values"])
    assert later["key"] != again["key"]
    assert KeyedImages(TrainingImages(data, PROCESSOR), seed=1)[3]["key"] != again["key"]


def test_processes_share_a_stream_without_overlap(folder):
    images = stream_of(folder)
    assert is_stream(images)
    parts = [[shown(s) for s in itertools.islice(KeyedStream(images, 0, p, 2, 1, 4), 12)] for p in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(24))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_at_the_right_sample(folder, workers):
    """Bit for bit, in the middle of an epoch and beyond its end, whichever worker's turn it is."""
    args = DistillationArguments(per_device_train_batch_size=3, dataloader_num_workers=workers, shuffle_buffer_size=4)
    images, accelerator = stream_of(folder), Accelerator(cpu=True)

    def batches(loader, count):
        return [(b["pixel_values"], b["key"]) for b in itertools.islice(loader, count)]

    whole = batches(TrainingLoader(images, args, accelerator, 3, 100), 20)
    for stop in (3, 11):
        first = TrainingLoader(images, args, accelerator, 3, 100)
        batches(first, stop)
        state = StreamState.from_list(first.stream_state.to_list())
        rest = batches(TrainingLoader(images, args, accelerator, 3, 100, stop, state), 20 - stop)
        for (pixels, keys), (expected_pixels, expected_keys) in zip(rest, whole[stop:], strict=True):
            assert torch.equal(keys, expected_keys)
            assert torch.equal(pixels, expected_pixels)
    assert len({int(key) for _, keys in whole for key in keys}) == 60


def test_workers_do_not_share_their_epoch(folder):
    """One that is ahead would set the order of another that has yet to begin."""
    stream = KeyedStream(stream_of(folder), 0, 0, 1, 2, 4)
    places = [b["place"] for b in itertools.islice(DataLoader(stream, batch_size=2, num_workers=2), 20)]
    assert {int(epoch) for place in places for _, epoch, _ in place} == {0, 1}
    assert stream.stream.epoch == 0


def test_more_workers_than_files_are_reduced(folder):
    args = DistillationArguments(per_device_train_batch_size=2, dataloader_num_workers=9)
    loader = TrainingLoader(stream_of(folder), args, Accelerator(cpu=True), 2, 100)
    seen = [shown({"pixel_values": pixels}) for b in itertools.islice(loader, 12) for pixels in b["pixel_values"]]
    assert sorted(seen) == list(range(24))


def test_an_empty_stream_is_refused(folder):
    images = stream_of(folder)
    images.images = images.images.take(0)
    with pytest.raises(DatasetError, match="no images for worker 0 of process 0"):
        next(iter(KeyedStream(images, 0, 0, 1, 1, 4)))
