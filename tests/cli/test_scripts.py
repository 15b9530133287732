# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the scripts do with data and folders that are not as they should be: found before any work is done."""

import importlib
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.models import make_model
from helpers.paths import ROOT
from PIL import Image
from transformers import AutoConfig, DeiTForImageClassificationWithTeacher, ViTImageProcessorPil

from tocom_hf import ArgumentError, CheckpointError, DatasetError, DegreeError, PluginSet


CHECKPOINT, PLUGINS = ROOT / "examples/digits/checkpoint", ROOT / "hub_cards/tocom-vit-mix"
IMAGES = ROOT / "examples/digits/test.parquet"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Run a script in this process: `script(name, *arguments)`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()

    return run


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """A parquet file of 20 digits whose labels were changed: `labelled(change, feature)`, a feature made from names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.load_dataset("parquet", data_files=str(IMAGES), split="train").select(range(20))
    names = data.features["label"].names

    def make(change, feature):
        path = tmp_path / "labelled.parquet"
        labels = [change(label) for label in data["label"]]
        data.remove_columns("label").add_column("label", labels, feature=feature(names)).to_parquet(str(path))
        return path

    return make


EVALUATE = ("--checkpoints", CHECKPOINT, "--target_r", 0, 8, "--speed_rounds", 0, "--output_dir", "results")
BOTH = ("--plugins", PLUGINS, "--validation_split", "validation[:20]", "--test_split", "test[20:40]")


def test_one_file_is_not_two_splits(script):
    with pytest.raises(DatasetError, match="800 images are in the validation split and in the test split"):
        script("evaluate", *EVALUATE, "--plugins", PLUGINS, "--dataset_name", IMAGES)
    with pytest.raises(DatasetError, match="20 images are in the validation split and in the test split"):
        script(
            "evaluate", *EVALUATE, *BOTH[:2], "--dataset_name", IMAGES, "--validation_split", "validation[:40]",
            "--test_split", "test[20:60]",
        )  # fmt: skip
    message = "single file, so that its splits 'train' and 'test' are the same images"
    with pytest.raises(DatasetError, match=message):
        script(
            "finetune", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--eval_split", "test",
            "--output_dir", "tuned",
        )  # fmt: skip
    with pytest.raises(DatasetError, match="are the same images"):
        script(
            "distill", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--eval_split", "validation",
            "--output_dir", "set",
        )  # fmt: skip
    assert not Path("tuned").exists()


def test_classes_in_another_order_are_refused(script, labelled):
    path = labelled(lambda label: 9 - label, lambda names: datasets.ClassLabel(names=names[::-1]))
    with pytest.raises(DatasetError, match="in another order: 0 is '9' there and '0' to the checkpoint"):
        script("evaluate", *EVALUATE, "--dataset_name", path)


@pytest.mark.parametrize("missing", [None, -1])
def test_labels_that_are_secret_are_refused(script, labelled, missing):
    path = labelled(lambda label: missing if label % 2 else label, lambda names: datasets.Value("int64"))
    with pytest.raises(DatasetError, match=r"of the 20 images of the split 'test' of .* have no label"):
        script("evaluate", *EVALUATE, "--dataset_name", path)


def test_evaluation_looks_at_everything_before_it_starts(script, tmp_path, monkeypatch):
    evaluate = importlib.import_module("evaluate")
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *_, **__: pytest.fail("went on"))
    shutil.copytree(CHECKPOINT, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"preprocessor_config\.json|image processor"):
        script("evaluate", *EVALUATE, "--dataset_name", IMAGES, "--checkpoints", CHECKPOINT, tmp_path / "bare")
    with pytest.raises(DegreeError, match="finite"):
        script("evaluate", *EVALUATE, *BOTH, "--dataset_name", IMAGES, "--fixed_scales", "nan")
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"file cannot be made: .*Choose another --output_dir"):
        script("evaluate", *EVALUATE, *BOTH, "--dataset_name", IMAGES, "--output_dir", "file")
    with pytest.raises(ArgumentError, match="is a folder; expected the JSON file"):
        script(
            "model_arithmetic", "--target_a", CHECKPOINT, "--source_a", CHECKPOINT, "--source_b", CHECKPOINT,
            "--dataset_name", IMAGES, "--output", tmp_path,
        )  # fmt: skip


def test_distillation_looks_for_its_folder_before_it_starts(script, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"Nothing can be written into .*Choose another output_dir"):
        script(
            "distill", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--dataset_split", "test",
            "--max_r", 8, "--num_train_epochs", 1, "--output_dir", "file/set",
        )  # fmt: skip


def test_fine_tuning_goes_on_at_its_own_degree(script, tmp_path):
    command = (
        "finetune", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--train_split", "test[:16]",
        "--per_device_train_batch_size", 8, "--save_strategy", "steps", "--save_steps", 1, "--report_to", "none",
        "--output_dir", tmp_path / "tuned", "--max_steps", 2,
    )  # fmt: skip
    script(*command, "--source_r", 4)
    resume = ("--resume_from_checkpoint", tmp_path / "tuned/checkpoint-1")
    assert AutoConfig.from_pretrained(tmp_path / "tuned/checkpoint-1").tocom["source_r"] == 4
    with pytest.raises(ArgumentError, match="trained at source_r=4, and shall go on at --source_r 0"):
        script(*command, *resume)
    script(*command, *resume, "--source_r", 4)


def pictures(folder, count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / str(i % 2) / f"{i}.png")


def test_a_distilled_deit_is_distilled_on_its_logits_and_a_stream_stays_one(script, tmp_path):
    make_model(DeiTForImageClassificationWithTeacher).save_pretrained(tmp_path / "deit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "deit")
    pictures(tmp_path / "images/train", 12, 0)
    pictures(tmp_path / "images/test", 6, 1)
    command = (
        "distill", "--model_name_or_path", tmp_path / "deit", "--dataset_name", tmp_path / "images", "--streaming",
        "--eval_split", "test", "--eval_degrees", 0, 2, "--max_r", 2, "--max_steps", 2,
        "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "set",
    )  # fmt: skip
    with pytest.raises(DatasetError, match="no images in the split 'test'"):
        script(*command, "--num_eval_images", 0)
    script(*command, "--num_eval_images", 4)
    training = PluginSet.from_pretrained(tmp_path / "set").config.training
    assert training["objective"] == "logits"
    assert training["agreement"]["images"] == 4
    assert not list((tmp_path / "cache").rglob("*-train*.arrow")), "the whole training split was written to the disk"
