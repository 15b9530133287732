# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import collections
import dataclasses

import datasets
import pytest
from PIL import Image

from tocom_hf import DatasetError
from tocom_hf.data.tasks import TASKS, load_labelled, require_disjoint


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A data set with the columns of CIFAR-100, of which every image is different."""
    for split, count, start in (("train", 1100, 0), ("test", 50, 2000)):
        numbers = range(start, start + count)
        images = [Image.new("RGB", (2, 2), (i % 256, i // 256, 0)) for i in numbers]
        data = datasets.Dataset.from_dict({"img": images, "fine_label": [i % 7 for i in numbers]})
        data.cast_column("img", datasets.Image()).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    return str(tmp_path / "hub")


@pytest.fixture
def task(folder, monkeypatch):
    def make(name, **changes):
        columns = {"image_column": "img", "label_column": "fine_label"}
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], hub_name=folder, **columns, **changes))
        return name

    return make


def pictures(dataset):
    return {sample["image"].tobytes() for sample in dataset}


def test_vtab_has_19_tasks_of_three_kinds():
    vtab = [task for name, task in TASKS.items() if name.startswith("vtab-1k/")]
    assert collections.Counter(task.kind for task in vtab) == {"natural": 7, "specialized": 4, "structured": 8}
    assert len({task.hub_name for task in TASKS.values()}) == len(TASKS) == 24


def test_vtab_draws_800_and_200_images(task):
    name = task("vtab-1k/svhn")
    train, classes = load_labelled(name, "train")
    validation, _ = load_labelled(name, "validation")
    test, _ = load_labelled(name, "test")
    assert (len(train), len(validation), len(test), classes) == (800, 200, 50, 10)
    assert train.column_names == ["image", "label"]
    require_disjoint(train, validation)
    require_disjoint(validation, test)
    assert pictures(load_labelled(name, "train+validation")[0]) == pictures(train) | pictures(validation)
    assert pictures(load_labelled(name, "train")[0]) == pictures(train)


def test_other_tasks_hold_out_a_tenth_of_the_training_images(task):
    name = task("cifar-100")
    train, validation = (load_labelled(name, split)[0] for split in ("train", "validation"))
    assert (len(train), len(validation)) == (990, 110)
    require_disjoint(train, validation)
    # drawn, not cut off: data sets on the Hub are often sorted by class
    assert len({sample["label"] for sample in validation}) == 7


def test_a_validation_split_of_its_own_is_used(task):
    name = task("flowers", validation="test")
    assert len(load_labelled(name, "validation")[0]) == 50
    assert len(load_labelled(name, "train")[0]) == 1100
    assert len(load_labelled(name, "train+validation")[0]) == 1150


def test_any_other_data_set_goes_by_its_own_names(folder):
    found, classes = load_labelled(folder, "test[:20]", image_column="img", label_column="fine_label")
    assert (len(found), classes, found.column_names) == (20, 7, ["image", "label"])


def test_a_split_that_a_task_lacks_is_named(task):
    with pytest.raises(DatasetError, match="has the splits train, validation, train\\+validation, test; got 'dev'"):
        load_labelled(task("cars"), "dev")


def test_validation_images_must_not_be_tested_on(folder):
    def load(split):
        return load_labelled(folder, split, image_column="img", label_column="fine_label")[0]

    require_disjoint(load("test[:20]"), load("test[20:]"))
    with pytest.raises(DatasetError, match="20 images are in the validation split and in the test split"):
        require_disjoint(load("test[:20]"), load("test"))


def test_files_that_count_the_classes_differently_are_refused(tmp_path):
    """The library takes the names of the first file for all, so that the labels of the other mean something else."""
    images = [Image.new("RGB", (2, 2))] * 3
    for file, names in (("train", ["a", "b", "c"]), ("test", ["c", "a", "b"]), ("validation", ["a", "b", "c"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2]}, features=features)
        data.to_parquet(tmp_path / "data" / f"{file}.parquet")
    with pytest.raises(
        DatasetError, match=r"test\.parquet and .*train\.parquet have other names .* Give the path of one"
    ):
        load_labelled(str(tmp_path / "data"), "test")
    assert load_labelled(str(tmp_path / "data/test.parquet"), "test")[0].features["label"].names == ["c", "a", "b"]
    (tmp_path / "data/test.parquet").unlink()
    assert len(load_labelled(str(tmp_path / "data"), "validation")[0]) == 3
