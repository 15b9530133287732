# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Commands that read images say so before they read any, where a model takes clips."""

import pytest
import transformers as hf
from helpers.families import vivit


@pytest.fixture
def clip_model(tmp_path):
    hf.VivitForVideoClassification(vivit()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("distill", ["--model_name_or_path", "model", "--dataset_name", "images", "--output_dir", "out"]),
        ("visualize", ["--model_name_or_path", "model", "--images", "a.png", "--output", "out.png"]),
    ],
)
def test_commands_for_images_refuse_models_of_clips(refused, clip_model, command, arguments):
    assert "takes clips (vivit), and this command reads images only" in refused(command, *arguments)


def test_evaluate_refuses_classifiers_of_clips(refused, clip_model):
    arguments = ["--checkpoints", "model", "--dataset_name", "images", "--target_r", "0", "--output_dir", "out"]
    assert "which classifies clips, and accuracy is measured on images only" in refused("evaluate", *arguments)


def test_merge_report_counts_clips(run, clip_model):
    ended = run("merge-report", "model", "--target_r", "0", "9", "--seconds", "0")
    assert ended.code == 0, ended
    assert "VivitForVideoClassification" in ended.output
