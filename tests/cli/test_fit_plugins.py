# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`tocom fit-plugins` writes the set that `fit_plugins` makes."""

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from helpers.models import make_model
from PIL import Image

from tocom_hf import PluginSet, TocomModel
from tocom_hf.cli import main as cli


COMMAND = [
    "fit-plugins", "--model_name_or_path", "model", "--dataset_name", "data.parquet", "--max_r", "4",
    "--output_dir", "set",
]  # fmt: skip


@pytest.fixture
def save_images(tmp_path, monkeypatch):
    """Saves images as `data.parquet` beside a model, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("model")
    return lambda images: datasets.Dataset.from_dict({"image": images}).to_parquet("data.parquet")


def test_a_set_is_fitted_recorded_and_used(save_images, capsys):
    generator = np.random.default_rng(0)
    save_images([Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(20)])
    more = ["--degrees", "2", "4", "--num_eval_images", "8", "--dtype", "float16", "--no_proportional_attention"]
    assert cli.main([*COMMAND, *more]) == 0
    assert "r = 2: cosine to r = 0 0." in capsys.readouterr().out
    plugins = PluginSet.from_pretrained("set")
    config = plugins.config
    assert (config.base_model, config.source_r, config.max_r, config.dtype) == ("model", 0, 4, "float16")
    assert not config.proportional_attention
    assert config.training["dataset"] == "data.parquet"
    assert config.training["num_images"] == 12
    assert config.training["agreement"]["images"] == 8
    model = TocomModel.from_pretrained("model", plugins="set", source_r=0, target_r=4)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).logits.isfinite().all()


def test_nothing_is_written_where_all_images_would_be_held_out(save_images, tmp_path, capsys):
    save_images([Image.new("RGB", (32, 32))] * 3)
    assert cli.main(COMMAND) != 0
    assert "Cannot hold out 64 of 3 images" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
