# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Heads that read the patches of layers in the middle get them at all places of the grid."""

import pytest
import torch
import transformers as hf
from helpers.families import COMMON, dpt, vitpose

from tocom_hf import apply_tome
from tocom_hf.merging.backbones import find_backbone


def hybrid():
    """A DPT whose patches come from a convolutional network, which its neck reads too."""
    stages = {"depths": [1, 1, 1], "embedding_size": 8, "hidden_sizes": [8, 16, 32], "num_groups": 4}
    features = {"out_features": ["stage1", "stage2", "stage3"], "embedding_dynamic_padding": True}
    backbone = hf.BitConfig(global_padding="same", layer_type="bottleneck", **stages, **features)
    sizes = {**COMMON, "image_size": 128, "patch_size": 16, "neck_hidden_sizes": [8, 16, 8, 8]}
    return hf.DPTConfig(
        **sizes, is_hybrid=True, backbone_config=backbone, backbone_featmap_shape=[1, 32, 8, 8],
        backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=8, neck_ignore_stages=[0, 1],
    )  # fmt: skip


def vitpose_of_64_patches():
    config = vitpose()
    config.backbone_config.image_size = [64, 64]
    return config


MODELS = {
    "DPT": (hf.DPTForDepthEstimation, dpt, 32, "predicted_depth"),
    "DPT hybrid": (hf.DPTForDepthEstimation, hybrid, 128, "predicted_depth"),
    "ViTPose": (hf.VitPoseForPoseEstimation, vitpose_of_64_patches, 64, "heatmaps"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_dense_heads_make_of_duplicate_tokens_is_that_without_merging(name):
    """Groups of four identical tokens merge exactly, so the head must not notice."""
    model_class, config, size, output = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config()).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    pixel_values = torch.randn(2, 3, size, size)
    backbone = find_backbone(model)

    def duplicate(module, args):
        tokens = args[0].clone()
        for offset in range(1, 4):
            tokens[:, backbone.protected + offset :: 4] = tokens[:, backbone.protected :: 4]
        return (tokens, *args[1:])

    def head():
        return getattr(model(pixel_values), output)

    with torch.no_grad():
        handle = backbone.layers[0].register_forward_pre_hook(duplicate)
        dense = head()
        apply_tome(model, [32, 16, 0, 0])
        merged = head()
        handle.remove()
        other = head()
        apply_tome(model, 0)
        unmerged = head()
    assert merged.shape == dense.shape
    torch.testing.assert_close(merged, dense, rtol=1e-4, atol=1e-4 * dense.abs().max().item())
    # the figures depend on the tokens: without duplicates, merging shows
    assert (other - unmerged).abs().max() > 1e-3 * unmerged.abs().max()
