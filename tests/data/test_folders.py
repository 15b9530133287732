# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Every image of a local folder is loaded, whatever words are in its name, or named as left out."""

import datasets
import pytest
from PIL import Image

from tocom_hf import DatasetError, load_images


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def warnings(monkeypatch):
    """What was warned of."""
    said = []
    monkeypatch.setattr("tocom_hf.data.folders.logger.warning", lambda text, *args: said.append(text % args))
    return said


def make_folder(tmp_path, files, name="images"):
    """A folder with an image of a colour of its own for every name."""
    for index, file in enumerate(files):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg"):
            Image.new("RGB", (4, 4), (8 * index, 0, 0)).save(path)
        else:
            path.write_text("{}")
    return tmp_path / name


def loaded_files(images, folder):
    """The images of a data set as paths in a folder."""
    encoded = images.cast_column("image", datasets.Image(decode=False))
    return sorted(str(sample["image"]["path"]).removeprefix(f"{folder}/") for sample in encoded)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("word", ["train", "test", "val", "valid", "dev", "eval", "validation", "training"])
def test_a_word_in_a_file_name_makes_no_split(tmp_path, word, streaming, warnings):
    files = [f"{i:02}.png" for i in range(4)] + [f"the {word} to Bern.png"]
    folder = make_folder(tmp_path, files)
    assert loaded_files(load_images(str(folder), streaming=streaming), folder) == files
    assert warnings == []


@pytest.mark.parametrize("word", ["train", "test", "val", "dev", "Test", "eval-kit", "model train"])
def test_a_class_may_be_called_like_a_split(tmp_path, word):
    files = sorted(f"{name}/{i}.png" for name in ("bus", "car", word) for i in range(3))
    folder = make_folder(tmp_path, files)
    images = load_images(str(folder), label_column="label")
    assert loaded_files(images, folder) == files
    names = images.features["label"].names
    assert sorted(names) == sorted(("bus", "car", word))
    assert sorted(images["label"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("file", ["instruction.md", "task.toml", "run.eval", "labels.csv", "cat/1.png.json"])
def test_other_files_do_not_take_the_place_of_images(tmp_path, file):
    files = ["cat/1.png", "dog/2.png"]
    folder = make_folder(tmp_path, [*files, file])
    assert loaded_files(load_images(str(folder), label_column="label"), folder) == files


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("train", "val", "test"), ("training", "dev", "eval"), ("Train", "Valid", "Testing")],
)
def test_sub_folders_called_like_splits_are_splits(tmp_path, train, validation, test):
    files = [f"{split}/{label}/{i}.png" for split in (train, validation, test) for label in "ab" for i in range(2)]
    folder = make_folder(tmp_path, files)
    for name, split in ((train, "train"), (validation, "validation"), (test, "test")):
        images = load_images(str(folder), split=split, label_column="label")
        assert loaded_files(images, folder) == [file for file in files if file.startswith(f"{name}/")]
        assert images["label"][:] == [0, 0, 1, 1]
    both = load_images(str(folder), split="train+validation[:50%]")
    assert len(both) == 6


def test_splits_may_lie_in_the_only_sub_folder(tmp_path):
    files = [f"data/images/{split}/{label}/{i}.png" for split in ("test", "train") for label in "ab" for i in range(2)]
    folder = make_folder(tmp_path, files)
    images = load_images(str(folder), split="test", label_column="label")
    assert loaded_files(images, folder) == files[:4]
    assert images["label"][:] == [0, 0, 1, 1]


def test_the_only_sub_folder_may_have_a_class_called_train(tmp_path):
    folder = make_folder(tmp_path, ["data/bus/1.png", "data/train/2.png"])
    assert load_images(str(folder), label_column="label")["label"][:] == [0, 1]


def test_splits_inside_of_classes_are_told_of(tmp_path, warnings):
    """They are one split, and who trains on it would test on images that were trained on."""
    folder = make_folder(tmp_path, ["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"])
    assert len(load_images(str(folder))) == 4
    assert len(warnings) == 1
    assert "are the split 'train', although folders in it are called test, train" in warnings[0]


def test_the_names_of_splits_are_no_labels(tmp_path):
    folder = make_folder(tmp_path, ["train/1.png", "train/2.png", "test/3.png"])
    assert load_images(str(folder)).column_names == ["image"]
    with pytest.raises(DatasetError, match=r"no column 'label'.*the name of an image's folder.*metadata\.csv"):
        load_images(str(folder), label_column="label")


@pytest.mark.parametrize("beside", ["extra/5.png", "5.png"])
def test_images_beside_splits_are_named(tmp_path, beside, warnings):
    folder = make_folder(tmp_path, ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png", beside])
    assert len(load_images(str(folder), split="test", label_column="label")) == 2
    assert len(warnings) == 1
    assert f"1 file ({beside}) of {folder} is in no split" in warnings[0]


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    folder = make_folder(tmp_path, ["a/1.png", "b/2.png"])
    message = r"The split 'test' of .* cannot be loaded: It has only the split 'train'\..*slice.*'train\[80%:\]'"
    for streaming in (False, True):
        with pytest.raises(DatasetError, match=message):
            load_images(str(folder), split="test", streaming=streaming)
    folder = make_folder(tmp_path, ["test/1.png", "2.png"], "more")
    with pytest.raises(DatasetError, match=r"only the split 'test'.*1 file \(2\.png\)"):
        load_images(str(folder), split="train")


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_is_honoured_and_images_that_it_does_not_list_are_named(tmp_path, streaming, warnings):
    folder = make_folder(tmp_path, ["1.png", "train 2.png", "3.png"])
    (folder / "metadata.csv").write_text("file_name,label\ntrain 2.png,7\n1.png,5\n")
    images = load_images(str(folder), label_column="label", streaming=streaming)
    assert [sample["label"] for sample in images] == [7, 5]
    assert warnings == [f"Left out: no metadata file lists 1 file (3.png) of {folder}."]


def test_metadata_of_splits(tmp_path, warnings):
    folder = make_folder(tmp_path, ["train/1.png", "train/2.png", "test/3.png"])
    for split, text in (("train", "1.png,0\n2.png,1\n"), ("test", "3.png,1\n")):
        (folder / split / "metadata.csv").write_text(f"file_name,label\n{text}")
    assert load_images(str(folder), split="test", label_column="label")["label"][:] == [1]
    assert load_images(str(folder), label_column="label")["label"][:] == [0, 1]
    assert warnings == []


def test_names_that_look_like_patterns(tmp_path):
    files = ["[a]/1.png", "[a]/img[1].PNG", "b*/3.jpg"]
    folder = make_folder(tmp_path, files, "pictures [2]")
    images = load_images(str(folder), label_column="label")
    assert loaded_files(images, folder) == files


def test_links_to_folders_are_followed(tmp_path):
    elsewhere = make_folder(tmp_path, ["5.png"], "elsewhere")
    folder = make_folder(tmp_path, ["a/1.png", "b/2.png"])
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked in a circle").symlink_to(folder)
    images = load_images(str(folder), label_column="label")
    assert loaded_files(images, folder) == ["a/1.png", "b/2.png", "linked/5.png"]
    assert images.features["label"].names == ["a", "b", "linked"]
    (folder / "linked").rename(folder / "linked [5]")
    with pytest.raises(DatasetError, match=r"linked \[5\] is a symbolic link.*Rename it"):
        load_images(str(folder), label_column="label")


@pytest.mark.parametrize("hidden", [".hidden/1.png", "__MACOSX/1.png", "cat/._1.png"])
def test_what_is_hidden_stays_hidden(tmp_path, hidden):
    folder = make_folder(tmp_path, ["cat/1.png", "dog/2.png", hidden])
    assert len(load_images(str(folder), label_column="label")) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_keep_their_splits_and_what_is_in_none_is_named(tmp_path, streaming, warnings):
    images = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * 2})
    (tmp_path / "shards").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "more"):
        images.cast_column("image", datasets.Image()).to_parquet(tmp_path / "shards" / f"{name}.parquet")
    found = load_images(str(tmp_path / "shards"), streaming=streaming)
    assert len(list(found)) == 4
    assert len(warnings) == 1
    assert "1 file (more.parquet)" in warnings[0]
    with pytest.raises(DatasetError, match=r"'validation'.*the splits 'train', 'test'.*more\.parquet"):
        load_images(str(tmp_path / "shards"), split="validation", streaming=streaming)


def test_a_data_set_card_names_the_files(tmp_path, warnings):
    folder = make_folder(tmp_path, ["one/1.png", "two/2.png", "two/3.png"])
    configs = "configs:\n- config_name: default\n  data_files:\n  - split: few\n    path: one/*.png\n"
    (folder / "README.md").write_text(f"---\n{configs}---\n")
    assert loaded_files(load_images(str(folder), split="few"), folder) == ["one/1.png"]
    assert warnings == []


def test_a_card_without_files_changes_nothing(tmp_path):
    folder = make_folder(tmp_path, ["1.png", "the train.png"])
    (folder / "README.md").write_text("---\nlicense: mit\n---\nHolidays\n")
    assert len(load_images(str(folder))) == 2
