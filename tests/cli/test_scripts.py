# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the commands do with data and folders that are not as they should be: found before any work is done."""

import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.models import make_model
from helpers.paths import ROOT
from PIL import Image
from transformers import AutoConfig, DeiTForImageClassificationWithTeacher, ViTImageProcessorPil

from tocom_hf import PluginSet
from tocom_hf.evaluation import grid


CHECKPOINT, PLUGINS = ROOT / "examples/digits/checkpoint", ROOT / "hub_cards/tocom-vit-mix"
IMAGES = ROOT / "examples/digits/test.parquet"


@pytest.fixture
def labelled(offline, tmp_path):
    """A parquet file of 20 digits whose labels were changed: `labelled(change, feature)`, a feature made from names."""
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


def test_one_file_is_not_two_splits(refused):
    error = refused("evaluate", *EVALUATE, "--plugins", PLUGINS, "--dataset_name", IMAGES)
    assert "DatasetError: 800 images are in the validation split and in the test split" in error
    error = refused(
        "evaluate", *EVALUATE, *BOTH[:2], "--dataset_name", IMAGES, "--validation_split", "validation[:40]",
        "--test_split", "test[20:60]",
    )  # fmt: skip
    assert "DatasetError: 20 images are in the validation split and in the test split" in error
    error = refused(
        "finetune", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--eval_split", "test",
        "--output_dir", "tuned",
    )  # fmt: skip
    assert "DatasetError" in error
    assert "single file, so that its splits 'train' and 'test' are the same images" in error
    error = refused(
        "distill", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--eval_split", "validation",
        "--output_dir", "set",
    )  # fmt: skip
    assert "DatasetError" in error
    assert "are the same images" in error
    assert not Path("tuned").exists()


@pytest.mark.parametrize("missing", [None, -1])
def test_labels_that_are_secret_are_refused(refused, labelled, missing):
    path = labelled(lambda label: missing if label % 2 else label, lambda names: datasets.Value("int64"))
    error = refused("evaluate", *EVALUATE, "--dataset_name", path)
    assert re.search(r"DatasetError: \d+ of the 20 images of the split 'test' of .* have no label", error)


def test_evaluation_looks_at_everything_before_it_starts(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "evaluate_checkpoint", lambda *_, **__: pytest.fail("went on"))
    shutil.copytree(CHECKPOINT, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    error = refused("evaluate", *EVALUATE, "--dataset_name", IMAGES, "--checkpoints", CHECKPOINT, tmp_path / "bare")
    assert re.search(r"bare' cannot be loaded: .*(preprocessor_config\.json|image processor)", error)
    error = refused("evaluate", *EVALUATE, *BOTH, "--dataset_name", IMAGES, "--fixed_scales", "nan")
    assert re.search("DegreeError: .*finite", error)
    (tmp_path / "file").touch()
    error = refused("evaluate", *EVALUATE, *BOTH, "--dataset_name", IMAGES, "--output_dir", "file")
    assert re.search("ArgumentError: .*file cannot be made: .*Choose another --output_dir", error)
    error = refused(
        "model_arithmetic", "--target_a", CHECKPOINT, "--source_a", CHECKPOINT, "--source_b", CHECKPOINT,
        "--dataset_name", IMAGES, "--output", tmp_path,
    )  # fmt: skip
    assert re.search("ArgumentError: .*is a folder; expected the JSON file", error)


def test_distillation_looks_for_its_folder_before_it_starts(refused, tmp_path):
    (tmp_path / "file").touch()
    error = refused(
        "distill", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--dataset_split", "test",
        "--max_r", 8, "--num_train_epochs", 1, "--output_dir", "file/set",
    )  # fmt: skip
    assert re.search(r"CheckpointError: Nothing can be written into .*Choose another output_dir", error)


def test_fine_tuning_goes_on_at_its_own_degree(run, refused, tmp_path):
    command = (
        "finetune", "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--train_split", "test[:16]",
        "--per_device_train_batch_size", 8, "--save_strategy", "steps", "--save_steps", 1, "--report_to", "none",
        "--output_dir", tmp_path / "tuned", "--max_steps", 2,
    )  # fmt: skip
    assert run(*command, "--source_r", 4).code == 0
    resume = ("--resume_from_checkpoint", tmp_path / "tuned/checkpoint-1")
    assert AutoConfig.from_pretrained(tmp_path / "tuned/checkpoint-1").tocom["source_r"] == 4
    error = refused(*command, *resume)
    assert "ArgumentError" in error
    assert "trained at source_r=4, and shall go on at --source_r 0" in error
    assert run(*command, *resume, "--source_r", 4).code == 0


def pictures(folder, count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / str(i % 2) / f"{i}.png")


def test_a_distilled_deit_is_distilled_on_its_logits_and_a_stream_stays_one(run, refused, tmp_path):
    make_model(DeiTForImageClassificationWithTeacher).save_pretrained(tmp_path / "deit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "deit")
    pictures(tmp_path / "images/train", 12, 0)
    pictures(tmp_path / "images/test", 6, 1)
    command = (
        "distill", "--model_name_or_path", tmp_path / "deit", "--dataset_name", tmp_path / "images", "--streaming",
        "--eval_split", "test", "--eval_degrees", 0, 2, "--max_r", 2, "--max_steps", 2,
        "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "set",
    )  # fmt: skip
    error = refused(*command, "--num_eval_images", 0)
    assert re.search("DatasetError: .*no images in the split 'test'", error)
    assert run(*command, "--num_eval_images", 4).code == 0
    training = PluginSet.from_pretrained(tmp_path / "set").config.training
    assert training["objective"] == "logits"
    assert training["agreement"]["images"] == 4
    assert not list((tmp_path / "cache").rglob("*-train*.arrow")), "the whole training split was written to the disk"
