# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Accuracy is that of the classes that are meant, in whatever order and spelling data set and checkpoint have them."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from helpers.paths import ROOT
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from tocom_hf import with_pixel_values


CHECKPOINT, PLUGINS = ROOT / "examples/digits/checkpoint", ROOT / "hub_cards/tocom-vit-mix"
IMAGES = ROOT / "examples/digits/test.parquet"
WORDS = ["Zero", "One digit", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """20 digits and, of each, what the checkpoint says it is, which is taken for the truth."""
    cache = str(tmp_path_factory.mktemp("cache"))
    data = datasets.load_dataset("parquet", data_files=str(IMAGES), split="train", cache_dir=cache).select(range(20))
    processed = with_pixel_values(data, AutoImageProcessor.from_pretrained(CHECKPOINT))
    pixel_values = torch.stack([sample["pixel_values"] for sample in processed])
    with torch.no_grad():
        said = AutoModelForImageClassification.from_pretrained(CHECKPOINT)(pixel_values=pixel_values).logits.argmax(-1)
    return data, said.tolist()


@pytest.fixture
def data_set(offline, images, tmp_path):
    """A parquet file of the digits that names its classes in an order of its own: `data_set(names, digits)`."""

    def make(names, digits, file="data.parquet"):
        data, said = images
        kept = [index for index, digit in enumerate(said) if digit in digits]
        labels = [digits.index(said[index]) for index in kept]
        feature = datasets.ClassLabel(names=list(names))
        data = data.select(kept).remove_columns("label").add_column("label", labels, feature=feature)
        data.to_parquet(str(tmp_path / file))
        return tmp_path / file

    return make


@pytest.fixture
def checkpoint(tmp_path):
    """The checkpoint with other names for its classes."""

    def make(names, **changes):
        folder = tmp_path / "named"
        shutil.copytree(CHECKPOINT, folder)
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: index for index, name in enumerate(names)}
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


TEXT_ORDER = [0, 1, 9, 2, 8, 3, 7, 4, 6, 5]
MATCHED = {
    "folders in the order of texts": ([f"{digit:03}" for digit in TEXT_ORDER], TEXT_ORDER, [*"0123456789"]),
    "a checkpoint without names": ([str(digit) for digit in TEXT_ORDER], TEXT_ORDER, [f"LABEL_{i}" for i in range(10)]),
    "another spelling": (["ONE_DIGIT", "zero", *WORDS[2:]], [1, 0, *range(2, 10)], WORDS),
    "a part of the classes": (["nine ", "two"], [9, 2], WORDS),
    "numbers for words": ([str(digit) for digit in TEXT_ORDER], TEXT_ORDER, WORDS),
}


@pytest.mark.parametrize(("names", "digits", "known"), MATCHED.values(), ids=MATCHED)
def test_evaluate_counts_the_class_that_is_meant(run, data_set, checkpoint, names, digits, known):
    code, output, errors = run(
        "evaluate", "--checkpoints", checkpoint(known), "--dataset_name", data_set(names, digits), "--target_r", 0,
        "--speed_rounds", 0, "--output_dir", "results",
    )  # fmt: skip
    assert code == 0, errors
    assert "named: r 0 -> 0: plain 100.00%" in output


@pytest.mark.parametrize("script", ["quickstart", "model_arithmetic"])
def test_scripts_count_the_class_that_is_meant(run, data_set, checkpoint, script):
    names, digits, known = MATCHED["another spelling"]
    folder = checkpoint(known)
    arguments = {
        "quickstart": ("--model_name_or_path", folder, "--target_r", 0),
        "model_arithmetic": (
            "--target_a", folder, "--source_a", folder, "--source_b", folder, "--output", "arithmetic.json",
        ),
    }  # fmt: skip
    code, output, errors = run(script, *arguments[script], "--dataset_name", data_set(names, digits))
    assert code == 0, errors
    accuracy = {"quickstart": "100.0%", "model_arithmetic": "| 100.0 ± 0.0 | 100.0 ± 0.0 |"}
    assert accuracy[script] in output


def test_an_order_that_no_name_tells_is_taken_with_a_warning(run, data_set, checkpoint, caplog):
    code, output, errors = run(
        "evaluate", "--checkpoints", checkpoint([f"LABEL_{i}" for i in range(10)]), "--dataset_name",
        data_set(WORDS, list(range(10))), "--target_r", 0, "--speed_rounds", 0, "--output_dir", "results",
    )  # fmt: skip
    assert code == 0, errors
    assert "plain 100.00%" in output
    assert caplog.text.count("nothing tells whether they are in the same order") == 1


def test_classes_that_a_checkpoint_does_not_know_are_named(refused, data_set, checkpoint):
    folder = checkpoint(WORDS)
    command = ("evaluate", "--checkpoints", folder, "--target_r", 0, "--output_dir", "results", "--dataset_name")
    error = refused(*command, data_set([*WORDS[:9], "ten"], list(range(10))))
    assert "DatasetError: 1 of the 10 classes of the split 'test' are none of the 10 of" in error
    assert "named: 'ten'. Left over of these: 'nine'. Rename the classes" in error
    error = refused(*command, data_set([*WORDS[:9], "Eight"], list(range(10)), "other.parquet"))
    assert "named: 'Eight'. Left over of these: 'nine'" in error
    error = refused(
        "quickstart", "--model_name_or_path", folder, "--dataset_name", data_set(["ten"], [9], "one.parquet")
    )
    assert "1 of the 1 classes" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "trained for several labels an image"),
        ({"problem_type": "regression"}, "is a regression with 10 outputs"),
        ({"id2label": {"0": "age"}, "label2id": {"age": 0}, "problem_type": None}, "is a regression with one output"),
        ({"architectures": ["ViTModel"]}, "is a ViTModel, which classifies no images"),
    ],
)
def test_models_without_an_accuracy_are_refused_before_data_are_loaded(refused, checkpoint, changes, message):
    error = refused(
        "evaluate", "--checkpoints", checkpoint(WORDS, **changes), "--dataset_name", "no/where/at.all", "--target_r", 0,
        "--output_dir", "results",
    )  # fmt: skip
    assert "UnsupportedModelError: " in error
    assert message in error


FINETUNE = (
    "finetune", "--per_device_train_batch_size", 4, "--report_to", "none", "--output_dir", "tuned", "--max_steps", 1,
    "--learning_rate", 0, "--save_strategy", "no",
)  # fmt: skip


def test_finetune_keeps_the_order_of_a_head(run, data_set, checkpoint):
    """At a learning rate of 0 the head stays as good as it was, so that the accuracy is 1 for the right order only."""
    backwards = list(range(9, -1, -1))
    data = data_set([WORDS[digit].upper() for digit in backwards], backwards)
    code, _, errors = run(
        *FINETUNE, "--model_name_or_path", checkpoint(WORDS), "--dataset_name", data,
        "--train_split", "train[:10]", "--eval_split", "test[10:]",
    )  # fmt: skip
    assert code == 0, errors
    assert json.loads(Path("tuned/eval_results.json").read_text())["eval_accuracy"] == 1
    config = AutoConfig.from_pretrained("tuned")
    assert [config.id2label[index] for index in range(10)] == [word.upper() for word in WORDS]
    assert config.label2id["NINE"] == 9


def test_finetune_on_other_classes_takes_the_order_of_the_data(run, data_set):
    names = ["cherry", "apple", *(f"fruit {index}" for index in range(8))]
    data = data_set(names, list(range(10)))
    code, _, errors = run(*FINETUNE, "--model_name_or_path", CHECKPOINT, "--dataset_name", data)
    assert code == 0, errors
    config = AutoConfig.from_pretrained("tuned")
    assert [config.id2label[index] for index in range(10)] == names
