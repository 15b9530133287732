# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from tocom_hf import DatasetError
from tocom_hf.data.images import TrainingImages, load_images, with_pixel_values


@pytest.fixture
def image_folder(tmp_path):
    for label, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (10, 8), colour).save(tmp_path / "images" / label / f"{i}.png")
    return str(tmp_path / "images")


@pytest.fixture
def parquet(image_folder, tmp_path):
    path = str(tmp_path / "images.parquet")
    load_images(image_folder, label_column="label").to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("source", ["image_folder", "parquet"])
def test_folders_and_parquet_files_load_alike(source, request):
    images = load_images(request.getfixturevalue(source), label_column="label")
    assert len(images) == 6
    assert images[0]["image"].size == (10, 8)
    processed = with_pixel_values(images, ViTImageProcessorPil(size={"height": 4, "width": 4}), label_column="label")
    assert processed[0]["pixel_values"].shape == (3, 4, 4)
    assert processed[0]["labels"] == 0
    # red, scaled to [-1, 1]
    torch.testing.assert_close(processed[0]["pixel_values"][:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_slices_and_limits(parquet):
    assert len(load_images(parquet, split="train[:4]")) == 4
    assert len(load_images(parquet, max_samples=2)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_further_columns_are_kept(parquet, streaming):
    images = load_images(parquet, keep_columns=["label", "image"], streaming=streaming)
    assert images.column_names == ["image", "label"]
    assert [row["label"] for row in images] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(
        DatasetError, match=r"has no column 'id'; it has image, label. Name the further column with --keep"
    ):
        load_images(parquet, keep_columns=["id"], streaming=streaming)


def test_a_limit_draws_from_all_classes_and_always_the_same(tmp_path):
    """Folders of images are sorted by class, and the first so many would be of one class."""
    for label in range(4):
        (tmp_path / "sorted" / str(label)).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (4, 4), (label, i, 0)).save(tmp_path / "sorted" / str(label) / f"{i}.png")
    drawn = load_images(str(tmp_path / "sorted"), label_column="label", max_samples=12)
    assert set(drawn["label"]) == {0, 1, 2, 3}
    pixels = [image.getpixel((0, 0)) for image in drawn["image"]]
    assert len(set(pixels)) == 12
    again = load_images(str(tmp_path / "sorted"), label_column="label", max_samples=12)
    assert pixels == [image.getpixel((0, 0)) for image in again["image"]]
    every = load_images(str(tmp_path / "sorted"), label_column="label", max_samples=100)
    assert every["label"][:] == [label for label in range(4) for _ in range(10)]


def test_images_that_cannot_be_read_are_named(image_folder):
    broken = Path(image_folder) / "cat" / "1.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(broken)
    broken.write_bytes(broken.read_bytes()[:-1000])
    images = load_images(image_folder)
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    for read in (
        lambda: with_pixel_values(images, processor)[0:6],
        lambda: [TrainingImages(images, processor)[i] for i in range(6)],
    ):
        with pytest.raises(DatasetError, match=r"cat/1\.png in the column 'image' cannot be read: .*truncated"):
            read()


def test_16_bits_become_8():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    images = datasets.Dataset.from_dict({"image": [Image.fromarray(ramp)]}).cast_column("image", datasets.Image())
    assert images[0]["image"].mode.startswith("I;16")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    pixels = TrainingImages(images, processor)[0]["pixel_values"]
    torch.testing.assert_close(pixels[0].double(), torch.from_numpy(ramp / 257.0), rtol=0, atol=1)
    processed = with_pixel_values(images, processor)[0]["pixel_values"]
    torch.testing.assert_close((processed[0] + 1) * 127.5, pixels[0].float())


def test_grey_and_transparent_images_become_rgb():
    images = datasets.Dataset.from_dict({"image": [Image.new("L", (4, 4)), Image.new("RGBA", (4, 4))]})
    images = images.cast_column("image", datasets.Image())
    processed = with_pixel_values(images, ViTImageProcessorPil(size={"height": 4, "width": 4}))
    assert processed[0:2]["pixel_values"][1].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_column": "picture"}, "no column 'picture'; it has image, label.*--image_column"),
        ({"label_column": "class"}, "no column 'class'.*--label_column"),
        ({"image_column": "label"}, "not images"),
        ({"split": "train[:0]"}, "no data"),
        ({"max_samples": 0}, "empty"),
    ],
)
def test_what_is_missing_is_named(parquet, arguments, message):
    with pytest.raises(DatasetError, match=message):
        load_images(parquet, **arguments)


def test_processed_data_sets_can_go_to_worker_processes(parquet):
    processed = with_pixel_values(load_images(parquet), ViTImageProcessorPil(size={"height": 4, "width": 4}))
    assert torch.equal(pickle.loads(pickle.dumps(processed))[1]["pixel_values"], processed[1]["pixel_values"])


def test_labels_must_be_integers(tmp_path):
    images = [Image.new("RGB", (4, 4))] * 2
    data = datasets.Dataset.from_dict({"image": images, "label": ["cat", "dog"]}).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "words.parquet")
    with pytest.raises(DatasetError, match="not integer labels"):
        load_images(str(tmp_path / "words.parquet"), label_column="label")


def test_missing_images_are_named():
    data = datasets.Dataset.from_dict({"image": [None]}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(DatasetError, match="without an image"):
        with_pixel_values(data, ViTImageProcessorPil())[0]


def test_a_split_that_is_not_there_is_named(image_folder):
    with pytest.raises(DatasetError, match=r"'validation'.*cannot be loaded"):
        load_images(image_folder, split="validation")


@pytest.mark.parametrize("name", ["no/such/folder", "mistyped.parquet", "./images", "/no/such.parquet"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DatasetError, match=f"There is no file or folder '{name}'"):
        load_images(name)
