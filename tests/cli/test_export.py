# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`tocom export` writes a checkpoint with its plugins and its image processor, or merges alone where there are none."""

import json

import numpy as np
import torch
import transformers as hf
from helpers.exports import make_images
from helpers.families import FAMILIES
from helpers.models import make_model, make_plugins

from tocom_hf import ExportedTocom, TocomModel, apply_tome


def save(model, folder):
    model.save_pretrained(folder / "model")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    return folder / "model"


def test_a_checkpoint_with_plugins(run, tmp_path):
    model = make_model(num_hidden_layers=2)
    make_plugins(model).save_pretrained(tmp_path / "plugins")
    path = save(model, tmp_path)
    arguments = ["--plugins", tmp_path / "plugins", "--source_r", 0, "--scale", 0.2, "--degrees", 5]
    ended = run("export", path, tmp_path / "out", *arguments, "--format", "torch")
    assert ended.code == 0, ended
    assert ended.output.splitlines()[1].split()[:2] == ["5", "55"]
    expected = TocomModel.from_pretrained(path, plugins=tmp_path / "plugins", source_r=0, target_r=5, scale=0.2)
    exported, images = ExportedTocom(tmp_path / "out"), make_images()
    with torch.no_grad():
        np.testing.assert_allclose(exported(images), expected(torch.from_numpy(images)).logits, atol=1e-5, rtol=1e-5)
    assert len(exported.predict(np.zeros((9, 9, 3), np.uint8))[0]) == 5


def test_a_checkpoint_without_plugins_merges_alone(run, tmp_path):
    model = make_model(num_hidden_layers=1)
    ended = run("export", save(model, tmp_path), tmp_path / "out", "--degrees", 4, "--format", "torch")
    assert ended.code == 0, ended
    exported, images = ExportedTocom(tmp_path / "out"), make_images()
    with torch.no_grad():
        expected = apply_tome(model, 4)(torch.from_numpy(images)).logits
    np.testing.assert_allclose(exported(images), expected, atol=1e-5, rtol=1e-5)


def test_spectrograms_need_no_image_processor(run, tmp_path):
    family = next(family for family in FAMILIES if family.audio)
    family.make(layers=1).save_pretrained(tmp_path / "model")
    ended = run("export", tmp_path / "model", tmp_path / "out", "--degrees", 0, "--format", "torch", "--one_image")
    assert ended.code == 0, ended
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["input"] == {"name": "input_values", "shape": [1, 32, 32]}
