# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint whose backbone would be random in part, or that is none of transformers, is refused by its reason."""

import json

import pytest
import torch
from helpers.families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from tocom_hf import PluginFileError, TocomModel, UnsupportedModelError


def rewrite(folder, change):
    """Change the weights in a folder."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("prefix", "origin"),
    [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel"), ("net.model.", "Strip it")],
)
@pytest.mark.parametrize("names", ["of the model", "of transformers 4"])
def test_names_behind_a_wrapper_are_refused_with_the_way_to_strip_them(
    model, plugins, checkpoint, prefix, origin, names
):
    weights = model.state_dict() if names == "of the model" else load_file(checkpoint / "model.safetensors")
    rewrite(checkpoint, lambda _: {prefix + name: weight for name, weight in weights.items()})
    for arguments in ({}, {"plugins": plugins, "target_r": 2}):
        with pytest.raises(PluginFileError, match=rf"weights of the backbone would be random .*{prefix}") as caught:
            TocomModel.from_pretrained(checkpoint, source_r=0, **arguments)
        assert origin in str(caught.value)
    assert f"name.removeprefix({prefix!r})" in str(caught.value)
    rewrite(checkpoint, lambda found: {name.removeprefix(prefix): weight for name, weight in found.items()})
    loaded = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_weight_of_the_backbone_that_is_missing_is_named(family, tmp_path):
    family.make().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: {name: weight for name, weight in weights.items() if ".2." not in name})
    with pytest.raises(PluginFileError, match=r"backbone would be random .*\.2\..*its file lacks"):
        TocomModel.from_pretrained(tmp_path, source_r=0)


def test_a_weight_of_the_backbone_of_another_shape_is_named(checkpoint):
    """With `ignore_mismatched_sizes` transformers starts it at random."""
    with pytest.raises(PluginFileError, match=r"1 of them, such as .*position_embeddings.*shapes"):
        TocomModel.from_pretrained(checkpoint, source_r=0, image_size=64, ignore_mismatched_sizes=True)


def test_a_head_may_be_new(checkpoint):
    rewrite(checkpoint, lambda found: {name: weight for name, weight in found.items() if "classifier" not in name})
    assert TocomModel.from_pretrained(checkpoint, source_r=0).classifier.out_features == 5


def test_a_pooler_may_be_missing(model, tmp_path):
    """As in published backbones that were pre-trained without one."""
    ViTModel(model.config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda found: {name: weight for name, weight in found.items() if "pooler" not in name})
    assert TocomModel.from_pretrained(tmp_path, source_r=0).target_r == 0


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        ({"architecture": "vit_base_patch16_224", "pretrained_cfg": {}}, UnsupportedModelError, "tocom convert"),
        ({"architecture": "vit_base_patch16_224"}, UnsupportedModelError, "tocom convert"),
        ({"auto_map": {"AutoModel": "code.Model"}}, UnsupportedModelError, "is not run"),
        ({"model_type": "mine", "auto_map": {}}, UnsupportedModelError, "is not run"),
        ({"model_type": "mine"}, PluginFileError, "names no model type"),
        ({"model_type": ["vit"]}, PluginFileError, "names no model type"),
        ({}, PluginFileError, "names no model type"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_its_reason(content, error, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("tocom_hf.model.checkpoint.is_timm_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(error, match=reason):
        TocomModel.from_pretrained(tmp_path, source_r=0)
