# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Models with several parts that could merge: the caller names one, and the others are left alone."""

import pytest
import torch
import transformers as hf
from helpers.families import COMMON, clip, dino, video_llava
from helpers.models import describe, make_plugins

from tocom_hf import ArgumentError, TocomModel, apply_tome, calibrate, count_flops, remove_tome, trace_tokens
from tocom_hf.merging.backbones import backbones_in, find_backbone
from tocom_hf.merging.layers import MergingLayer


def depth_pro():
    encoder = {**dino(hf.Dinov2Config).to_dict()}
    config = hf.DepthProConfig(
        patch_size=32, fusion_hidden_size=8, image_model_config=encoder, patch_model_config=encoder,
        fov_model_config=encoder, intermediate_hook_ids=[3, 1], intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.25], scaled_images_feature_dims=[8, 8],
        use_fov_model=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.DepthProForDepthEstimation(config).eval()


def merging_parts(model):
    """The backbones of a model whose layers merge, by path."""
    return [part.path for part in backbones_in(model) if all(isinstance(layer, MergingLayer) for layer in part.layers)]


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (video_llava, ["model.video_tower", "model.image_tower"]),
        (
            depth_pro,
            [
                "depth_pro.encoder.patch_encoder.model",
                "depth_pro.encoder.image_encoder.model",
                "fov_model.fov_encoder.model",
            ],
        ),
    ],
)
def test_ambiguity_is_refused_with_the_paths(make, paths):
    model = make()
    before = describe(model)
    with pytest.raises(ArgumentError, match=r"Name one, backbone=") as refused:
        apply_tome(model, 4)
    assert all(repr(path) in str(refused.value) for path in paths)
    with pytest.raises(ArgumentError, match="backbone='text_model' stands for none of them"):
        apply_tome(model, 4, backbone="text_model")
    with pytest.raises(ArgumentError, match="more than one of them"):
        apply_tome(model, 4, backbone=paths[0].partition(".")[0] if make is video_llava else "encoder")
    assert describe(model) == before


@pytest.mark.parametrize("name", ["image_tower", "model.image_tower"])
def test_what_is_named_merges_and_nothing_else(name):
    model = video_llava()
    before = describe(model)
    apply_tome(model, 4, backbone=name)
    assert merging_parts(model) == ["model.image_tower"]
    # from here on it is the one that merges
    apply_tome(model, 5)
    assert find_backbone(model).path == "model.image_tower"
    assert count_flops(model, 5) == count_flops(model.model.image_tower, 5)
    assert calibrate(model, degrees=[0, 5], seconds=0, progress=False)[5].tokens == (65, 60, 55, 50, 45)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), trace_tokens(model) as trace:
        model.model.image_tower(pixel_values)
    assert trace.positions[-1].unique().numel() == 45
    assert describe(remove_tome(model)) == before


def test_both_may_merge_each_at_its_own_degree():
    model = video_llava()
    before = describe(model)
    apply_tome(apply_tome(model, 4, backbone="image_tower"), 8, backbone="video_tower")
    assert merging_parts(model) == ["model.video_tower", "model.image_tower"]
    with pytest.raises(ArgumentError, match="2 backbones"):
        apply_tome(model, 2)
    for name, left in (("image_tower", 65 - 16), ("video_tower", 65 - 32)):
        with torch.no_grad(), trace_tokens(model, backbone=name) as trace:
            getattr(model.model, name)(torch.randn(1, 3, 32, 32))
        assert trace.positions[-1].unique().numel() == left
    remove_tome(model, backbone="video_tower")
    assert merging_parts(model) == ["model.image_tower"]
    assert describe(remove_tome(model)) == before


@torch.no_grad()
def test_a_named_encoder_of_several_reads_its_inner_layers():
    """Depth Pro reads two inner layers of its patch encoder."""
    model = depth_pro().double()
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            torch.nn.init.zeros_(parameter)
    # one patch, everywhere, so that merging loses nothing
    pixel_values = torch.randn(1, 3, 4, 4, dtype=torch.float64).repeat(1, 1, 16, 16)
    expected = model(pixel_values).predicted_depth
    apply_tome(model, 6, backbone="patch_encoder")
    torch.testing.assert_close(model(pixel_values).predicted_depth, expected, rtol=1e-6, atol=1e-8)
    noise = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert not torch.allclose(model(noise).predicted_depth, remove_tome(model)(noise).predicted_depth, rtol=1e-6)


def test_a_model_with_one_backbone_may_name_it_too():
    model = apply_tome(hf.CLIPModel(clip()).eval(), 4, backbone="vision_model")
    assert merging_parts(model) == ["vision_model"]
    with pytest.raises(ArgumentError, match="'tower' stands for none"):
        apply_tome(hf.ViTModel(hf.ViTConfig(**COMMON)), 4, backbone="tower")


@pytest.mark.parametrize("name", ["image_tower", "video_tower"])
def test_a_checkpoint_of_several_towers_composes_in_the_one_that_is_named(name, tmp_path):
    plain = video_llava()
    plain.save_pretrained(tmp_path / "checkpoint")
    tower = getattr(plain.model, name)
    plugins = make_plugins(tower)
    with pytest.raises(ArgumentError, match="2 backbones"):
        TocomModel.from_pretrained(tmp_path / "checkpoint", plugins=plugins, source_r=0, target_r=4)
    model = TocomModel.from_pretrained(tmp_path / "checkpoint", plugins=plugins, source_r=0, target_r=4, backbone=name)
    alone = TocomModel.from_pretrained(tower, plugins=plugins, source_r=0, target_r=4)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = getattr(model.model, name)(pixel_values).last_hidden_state
        assert torch.equal(found, alone(pixel_values).last_hidden_state)
        # it stays the one that plugins are composed in, whatever the other does
        other = "video_tower" if name == "image_tower" else "image_tower"
        apply_tome(model, 3, backbone=other)
        model.set_target_r(6)
        alone.set_target_r(6)
        assert torch.equal(
            getattr(model.model, name)(pixel_values).last_hidden_state, alone(pixel_values).last_hidden_state
        )
        remove_tome(model, backbone=other)
        # and the checkpoint records it
        model.save_pretrained(tmp_path / "saved")
        again = TocomModel.from_pretrained(tmp_path / "saved")
        assert (again.target_r, again.config.tocom["backbone"]) == (6, f"model.{name}")
        assert torch.equal(
            getattr(again.model, name)(pixel_values).last_hidden_state, alone(pixel_values).last_hidden_state
        )
