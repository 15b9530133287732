# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Commands that meet a damaged image end with one line that names it, whichever process loads it."""

import gc
import json

import numpy as np
import pytest
from helpers.models import make_model
from PIL import Image
from transformers import ViTImageProcessorPil


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """PyTorch waits five seconds for each process of a loader that has failed."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint, and a folder of images of which one is damaged."""
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}, "num_labels": 2}
    make_model(num_hidden_layers=2, patch_size=8, **labels).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for index in range(8):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    damaged = tmp_path / "images/dog/5.png"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    yield tmp_path
    # a Trainer that failed is part of a cycle, and its loading processes live until it is found
    gc.collect()


def arguments_of(name, folder, workers):
    model, data = folder / "model", ["--dataset_name", folder / "images", "--output_dir", folder / "out"]
    return {
        "distill": ["--model_name_or_path", model, *data, "--max_r", 2, "--num_train_epochs", 2,
                    "--per_device_train_batch_size", 2, "--num_eval_images", 0, "--dataloader_num_workers", workers],
        "evaluate": ["--checkpoints", model, "--source_r", 0, *data, "--test_split", "train", "--target_r", 2,
                     "--speed_rounds", 0, "--dataloader_num_workers", workers],
        "finetune": ["--model_name_or_path", model, *data, "--report_to", "none", "--dataloader_num_workers", workers],
    }[name]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["distill", "evaluate", "finetune"])
def test_the_image_is_named_in_one_line(run, folder, name, workers):
    ended = run(name, *arguments_of(name, folder, workers))
    assert ended.code == 2
    # a progress bar of Trainer's may stand in front of it, or behind
    [line] = [line for line in ended.errors.splitlines() if f"tocom {name}: error: " in line]
    start = f"tocom {name}: error: UnreadableImageError" if name != "distill" else "tocom distill: error: DatasetError"
    assert f"{start}: The image {folder}/images/dog/5.png in the column 'image' cannot be read: " in line
    assert "Traceback" not in ended.errors


def test_it_is_passed_over_where_that_is_asked_for(run, folder):
    ended = run("distill", *arguments_of("distill", folder, 0), "--skip_damaged")
    assert ended.code == 0, ended.errors
    config = json.loads((folder / "out/tocom_config.json").read_text())
    assert config["training"]["damaged_images"] == 2
