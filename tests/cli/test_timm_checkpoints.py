# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as timm writes them to the Hub, through the commands and `TocomModel.from_pretrained`."""

import json

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.timm_models import SMALL, is_timm_installed, make_timm
from PIL import Image
from safetensors.torch import save_file


if not is_timm_installed():
    pytest.skip("timm, an extra, is not installed", allow_module_level=True)

from transformers import AutoImageProcessor

from tocom_hf import PluginSet, TocomModel
from tocom_hf.cli import distill, evaluate, export, find_recipe, finetune, merge_report, visualize
from tocom_hf.data.timm_processor import as_image_processor


DIGITS = ROOT / "examples" / "digits" / "test.parquet"
SAMPLE = ROOT / "examples" / "space" / "samples" / "1-trouser.png"
NORMALIZED = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}


def write_timm(folder, **pretrained_cfg):
    """A checkpoint in timm's own layout, without a model type and with timm's names of weights."""
    folder.mkdir(exist_ok=True)
    model = make_timm(num_labels=10)
    weights = {name.removeprefix("timm_model."): tensor for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 10,
        "model_args": SMALL,
        "label_names": [str(label) for label in range(10)],
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 0.9,
            "crop_mode": "center", **NORMALIZED, "num_classes": 10, "first_conv": "patch_embed.proj",
            "classifier": "head", **pretrained_cfg,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def checkpoint(tmp_path):
    write_timm(tmp_path / "timm")
    return str(tmp_path / "timm")


def test_it_opens_with_its_head_and_survives_a_round_trip(tmp_path):
    expected = write_timm(tmp_path / "timm")
    pixel_values = torch.randn(2, 3, 32, 32)
    model = TocomModel.from_pretrained(tmp_path / "timm", source_r=0)
    assert type(model).__name__ == "TimmWrapperForImageClassification"
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, expected(pixel_values).logits)
        model.save_pretrained(tmp_path / "saved")
        again = TocomModel.from_pretrained(tmp_path / "saved")
        assert torch.equal(again(pixel_values).logits, expected(pixel_values).logits)
    assert again.config.id2label[7] == "7"


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_pct": 0.8},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_pct": 0.8, "crop_mode": "squash"},
        {"crop_pct": 0.8, "interpolation": "lanczos"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(80, 40), (40, 120), (32, 32)])
def test_the_processor_gives_the_same_pixels_as_that_of_timm(tmp_path, settings, size):
    write_timm(tmp_path / "timm", **settings)
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "timm")
    ours = as_image_processor(theirs)
    assert type(ours).__name__ == "BitImageProcessorPil"
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found, expected = (torch.as_tensor(p(image, return_tensors="pt")["pixel_values"]) for p in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_processor_that_does_more_stays_as_it_is(tmp_path):
    write_timm(tmp_path / "timm", crop_mode="border")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "timm")
    assert as_image_processor(processor) is processor


def test_merge_report(checkpoint, capsys):
    assert merge_report.main([checkpoint, "--target_r", "4", "--seconds", "0"]) == 0
    assert "timm_wrapper" in capsys.readouterr().out


def test_evaluate(checkpoint, tmp_path):
    arguments = ["--dataset_name", DIGITS, "--test_split", "test[:40]", "--target_r", 0, 4, "--speed_rounds", 0]
    arguments = ["--checkpoints", checkpoint, *arguments, "--source_r", 0, "--output_dir", tmp_path / "out"]
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "out" / "grid.json").is_file()


def test_distilled_fine_tuned_and_composed(checkpoint, tmp_path):
    data = ["--dataset_name", str(DIGITS)]
    arguments = [
        "--model_name_or_path",
        checkpoint,
        *data,
        "--dataset_split",
        "test",
        "--max_r",
        "2",
        "--max_steps",
        "2",
    ]
    arguments += ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "set")]
    assert distill.main(arguments) == 0
    assert PluginSet.from_pretrained(tmp_path / "set").config.backbone.model_type == "timm_wrapper"
    arguments = ["--model_name_or_path", checkpoint, *data, "--train_split", "test[:32]", "--eval_split", "test[:16]"]
    arguments += ["--source_r", "2", "--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path / "tuned")]
    assert finetune.main(arguments) == 0
    model = TocomModel.from_pretrained(tmp_path / "tuned", plugins=tmp_path / "set", target_r=0)
    assert (model.source_r, model.target_r) == (2, 0)


def test_find_recipe(checkpoint, tmp_path):
    arguments = ["--model_name_or_path", checkpoint, "--dataset_name", DIGITS, "--dataset_split", "test"]
    arguments += ["--max_samples", 8, "--degrees", 4, "--max_evaluations", 3, "--output_dir", tmp_path / "recipe"]
    assert find_recipe.main([str(argument) for argument in arguments]) == 0


def test_visualize(checkpoint, tmp_path):
    arguments = ["--model_name_or_path", checkpoint, "--images", SAMPLE, "--r", 4, "--output", tmp_path / "groups.png"]
    assert visualize.main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "groups.png").is_file()


def test_export(checkpoint, tmp_path):
    assert export.main([checkpoint, str(tmp_path / "out"), "--degrees", "4", "--format", "torch"]) == 0
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
