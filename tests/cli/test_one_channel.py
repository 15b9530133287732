# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Every command that reads images follows the number of channels that the model takes."""

import numpy as np
import pytest
from helpers.models import make_model, make_plugins
from PIL import Image
from transformers import ViTImageProcessorPil


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a checkpoint of one channel, a plugin set for it, colour images, and a wrong processor's copy."""
    folder = tmp_path_factory.mktemp("inputs")
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}, "num_labels": 2}
    for name, mean in (("grey", [0.5]), ("wrong", [0.5] * 3)):
        model = make_model(num_channels=1, num_hidden_layers=2, **labels)
        model.save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=mean, image_std=mean).save_pretrained(
            folder / name
        )
    make_plugins(model, max_r=2).save_pretrained(folder / "plugins")
    generator = np.random.default_rng(0)
    for index in range(8):
        path = folder / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (36, 32, 3), dtype=np.uint8)).save(path)
    return folder


def commands(inputs, checkpoint):
    model, images, plugins = inputs / checkpoint, inputs / "images", inputs / "plugins"
    data = ["--dataset_name", images]
    return {
        "distill": ["--model_name_or_path", model, *data, "--output_dir", "out", "--max_r", 2, "--max_steps", 1,
                    "--per_device_train_batch_size", 2, "--randaugment_num_ops", 2, "--num_eval_images", 2],
        "evaluate": ["--checkpoints", model, "--plugins", plugins, "--source_r", 0, *data, "--target_r", 2,
                     "--test_split", "train[:50%]", "--validation_split", "train[50%:]", "--scales", 0.1,
                     "--speed_rounds", 0, "--output_dir", "out"],
        "finetune": ["--model_name_or_path", model, *data, "--output_dir", "out", "--max_steps", 1, "--eval_split",
                     "train[:2]", "--train_split", "train[2:]", "--report_to", "none"],
        "fit-scales": ["--model_name_or_path", model, "--plugins", plugins, "--source_r", 0, *data, "--max_steps", 1,
                       "--output_dir", "out"],
        "visualize": ["--model_name_or_path", model, "--images", images / "cat/0.png", "--output", "out.png"],
    }  # fmt: skip


NAMES = ["distill", "evaluate", "finetune", "fit-scales", "visualize"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_one_channel_runs(run, inputs, tmp_path, name):
    ended = run(name, *commands(inputs, "grey")[name])
    assert ended.code == 0, ended.errors
    assert (tmp_path / "out").is_dir() or (tmp_path / "out.png").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_processor_that_contradicts_it_is_refused(refused, inputs, name):
    line = refused(name, *commands(inputs, "wrong")[name])
    assert "ArgumentError: The model takes images of 1 channel, but the setting image_mean" in line
    assert "Correct its preprocessor_config.json" in line


def test_serve_refuses_it_before_it_measures_anything(refused, inputs, monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.setattr("tocom_hf.cost.calibration.calibrate", None)
    line = refused("serve", "--model_name_or_path", inputs / "wrong", "--plugins", inputs / "plugins", "--source_r", 0)
    assert "The model takes images of 1 channel, but the setting image_mean" in line
