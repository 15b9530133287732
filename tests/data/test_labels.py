# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Labels of a data set in the numbering of a checkpoint, whatever the spelling and the order of the names."""

import datasets
import pytest
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil
from transformers.utils import logging

from tocom_hf import ArgumentError, DatasetError, with_pixel_values
from tocom_hf.data import labels as labels_module
from tocom_hf.data.labels import class_names_of, match_labels


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    """The warnings of a test, each of which is given once in a process."""
    given = []
    monkeypatch.setattr(labels_module.logger, "warning_once", given.append)
    return given


def config_of(names):
    return ViTConfig(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})


def data_of(names, labels=None):
    """One image for every class, in order, whose red value tells the class."""
    labels = list(range(len(names))) if labels is None else labels
    images = [Image.new("RGB", (2, 2), (label, 0, 0)) for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


MATCHED = {
    "exact": (["cat", "dog"], ["cat", "dog"]),
    "another order": (["cat", "dog", "pug"], ["pug", "cat", "dog"]),
    "case": (["Cat", "DOG"], ["dog", "cat"]),
    "separators": (["Golden retriever", "great-dane"], ["great_dane", "golden_retriever"]),
    "camel case": (["GoldenRetriever", "GreatDane"], ["great dane", "golden-retriever"]),
    "blanks around": ([" cat", "dog\n"], ["dog ", "cat"]),
    "unicode forms": (["cafe\u0301", "\uff24og", "ﬁsh", "Straße"], ["STRASSE", "fish", "dog", "café"]),
    "numbers": (["0", "1", "10", "11", "2", *map(str, range(3, 10))], [str(index) for index in range(12)]),
    "leading zeros": (["000", "001", "007"], ["7", "0", "1"]),
    "LABEL_i": (["2", "1", "0"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
    "words that are numbers": (["LABEL_1", "label 0"], ["0", "1"]),
    "synonyms": (["goldfish", "tench"], ["tench, Tinca tinca", "goldfish, Carassius auratus"]),
    "synonyms on both sides": (["great white, man-eater", "hen"], ["hen", "great white shark, great white"]),
    "a later synonym": (["missile", "projectile"], ["projectile, missile", "missile"]),
    "a subset": (["dog"], ["cat", "dog", "pug"]),
    "case tells the classes": (["letter: a", "letter: A"], ["letter: A", "letter: a"]),
    "case tells a synonym": (["Cardigan"], ["cardigan", "Cardigan, Cardigan Welsh corgi"]),
    "case tells two synonyms": (["Cardigan", "cardigan"], ["cardigan", "Cardigan, Cardigan Welsh corgi"]),
}
PARTNERS = {  # of the names above that are not found by a simple rule
    "ﬁsh": "fish", "Straße": "STRASSE", "cafe\u0301": "café", "\uff24og": "dog", "007": "7", "000": "0", "001": "1",
    "tench": "tench, Tinca tinca", "goldfish": "goldfish, Carassius auratus", "projectile": "projectile, missile",
    "great white, man-eater": "great white shark, great white", "Cardigan": "Cardigan, Cardigan Welsh corgi",
    "LABEL_1": "1", "label 0": "0", "0": "0", "1": "1", "2": "2",
}  # fmt: skip


def partner(name, known):
    """Where a name is among those of the checkpoint, as a reader would say."""
    if name in known:
        return known.index(name)
    if f"LABEL_{name}" in known:
        return int(name)
    if name in PARTNERS:
        return known.index(PARTNERS[name])
    (found,) = [
        index
        for index, own in enumerate(known)
        if [letter for letter in own.lower() if letter.isalnum()] == [c for c in name.lower() if c.isalnum()]
    ]
    return found


@pytest.mark.parametrize(("names", "known"), MATCHED.values(), ids=MATCHED)
def test_classes_are_matched_by_name(names, known, warnings):
    matched = match_labels(data_of(names), config_of(known))
    assert matched["label"][:] == [partner(name, known) for name in names]
    assert [image.getpixel((0, 0))[0] for image in matched["image"]] == list(range(len(names)))  # the same images
    assert not warnings


def test_the_names_after_matching_are_those_of_the_checkpoint():
    matched = match_labels(data_of(["dog", "Cat"]), config_of(["cat", "dog", "pug"]))
    assert matched.features["label"].names == ["cat", "dog", "pug"]
    assert match_labels(matched, config_of(["cat", "dog", "pug"]))["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        (
            ["cat", "wolf"],
            ["cat", "dog"],
            "1 of the 2 classes .* none of the 2 of .*: 'wolf'. Left over of these: 'dog'",
        ),
        (["cat", "dog", "wolf"], ["cat", "dog"], "1 of the 3 classes .* are none of the 2 of the checkpoint: 'wolf'"),
        (["DOG"], ["Dog", "dog"], "'DOG' of the data set fits 'Dog', 'dog' of the checkpoint equally well"),
        (["DOG", "dog"], ["Dog"], "'DOG' of .* fits 'Dog' of the checkpoint as others do.* 'dog' of"),
        (["dog", "DOG"], ["dog", "cat"], "1 of the 2 classes .*: 'DOG'.*: 'cat'"),
        (["shark"], ["great white, shark", "tiger shark, shark"], "'shark' .* equally well"),
        (["cat", "dog"], ["LABEL_0", "LABEL_1", "LABEL_2"], "2 of the 2 classes"),
        (["n01440764", "n01443537"], ["tench", "goldfish", "shark"], "2 of the 2 classes"),
        (["n01443537", "n01440764"], ["tench", "goldfish"], "2 of the 2 classes"),
        (["1", "2"], ["tench", "goldfish"], "2 of the 2 classes"),
        (["0", "1", "10"], ["LABEL_0", "LABEL_1", "LABEL_2"], "'10'.*: 'LABEL_2'"),
        ([f"a{i}" for i in range(9)], [f"b{i}" for i in range(9)], "'a0', 'a1', 'a2', 'a3', 'a4', ..."),
    ],
)
def test_what_cannot_be_matched_is_named_with_what_to_do(names, known, message):
    with pytest.raises(DatasetError, match=message) as raised:
        match_labels(data_of(names), config_of(known))
    assert "Rename the classes of the data set, or correct id2label" in str(raised.value)


@pytest.mark.parametrize(
    ("names", "known", "warning"),
    [
        (["cat", "dog"], ["LABEL_0", "LABEL_1"], "nothing tells whether they are in the same order"),
        (["cat", "dog"], ["0", "1"], "nothing tells whether they are in the same order"),
        (["n01440764", "n01443537"], ["tench", "goldfish"], "nothing tells whether they are in the same order"),
        (["1", "0"], ["tench", "goldfish"], "The numbers are taken for places in that list"),
    ],
)
def test_names_that_tell_nothing_are_taken_in_order_with_a_warning(names, known, warning, warnings):
    matched = match_labels(data_of(names), config_of(known))
    assert matched["label"][:] == ([1, 0] if names == ["1", "0"] else [0, 1])
    assert len(warnings) == 1
    assert warning in warnings[0]
    assert "id2label" in warnings[0]


def test_a_name_that_a_checkpoint_has_twice_stays_in_place_where_all_others_do():
    known = ["tench", "crane", "hen", "crane"]
    assert match_labels(data_of(["tench", "crane", "hen", "crane2"]), config_of(known))["label"][:] == [0, 1, 2, 3]
    with pytest.raises(DatasetError, match="'crane' of the data set fits 'crane', 'crane' of"):
        match_labels(data_of(["hen", "crane", "tench", "crane2"]), config_of(known))
    with pytest.raises(DatasetError, match="'crane' of the data set fits 'crane', 'crane' of"):
        match_labels(data_of(["crane"]), config_of(known))


def test_classes_without_images_need_no_partner():
    data = data_of(["background", "dog", "cat"], labels=[1, 2, 1])
    assert match_labels(data, config_of(["cat", "dog"]))["label"][:] == [1, 0, 1]


def test_labels_without_names_are_taken_as_they_are():
    data = data_of("abc").cast_column("label", datasets.Value("int64"))
    assert match_labels(data, config_of(["x", "y", "z"]))["label"][:] == [0, 1, 2]
    with pytest.raises(DatasetError, match="The data set has the label 2, but the checkpoint knows 2 classes"):
        match_labels(data, config_of(["x", "y"]))


def test_missing_labels_and_streams_and_holes_are_refused():
    with pytest.raises(DatasetError, match="1 of the 2 images of the data set have no label"):
        match_labels(data_of("ab", labels=[0, -1]), config_of("ab"))
    with pytest.raises(ArgumentError, match="without streaming"):
        match_labels(data_of("ab").to_iterable_dataset(), config_of("ab"))
    with pytest.raises(DatasetError, match="numbers the classes 1, 2; expected 0 to 1"):
        class_names_of(ViTConfig(id2label={1: "a", 2: "b"}))


def test_selection_and_transform_survive_and_nothing_is_decoded_or_written(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = [f"class {index}" for index in range(6)]
    data_of(names).to_parquet(tmp_path / "data.parquet")
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), split="train")
    data = data.shuffle(seed=1).select([0, 2, 4])
    expected = [5 - label for label in data["label"]]
    before = {path: path.stat().st_size for path in tmp_path.rglob("*.arrow")}
    processed = with_pixel_values(data, ViTImageProcessorPil(size={"height": 2, "width": 2}), label_column="label")
    config = config_of([name.upper() for name in reversed(names)])

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
        before_processing, after_processing = match_labels(data, config), match_labels(processed, config)
    assert {path: path.stat().st_size for path in tmp_path.rglob("*.arrow")} == before
    assert before_processing["label"][:] == expected
    assert before_processing._fingerprint != data._fingerprint
    samples = [after_processing[index] for index in range(3)]
    assert [sample["labels"] for sample in samples] == expected
    for sample, label in zip(samples, expected, strict=True):
        red = (sample["pixel_values"][0, 0, 0] + 1) * 127.5
        assert round(float(red)) == 5 - label


def test_a_warning_is_given_at_the_level_of_transformers():
    assert labels_module.logger.name.startswith(f"{logging.get_logger('transformers').name}.")
