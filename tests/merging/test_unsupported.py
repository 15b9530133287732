# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
import transformers as hf
from helpers.families import COMMON, clip, dino

from tocom_hf import UnsupportedModelError, apply_tome


def tiny_swin():
    return hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2]))


def tiny_beit():
    return hf.BeitModel(hf.BeitConfig(**COMMON))


def tiny_pixtral():
    return hf.PixtralVisionModel(
        hf.PixtralVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )


def tiny_phi4():
    phi4 = hf.models.phi4_multimodal
    config = phi4.configuration_phi4_multimodal.Phi4MultimodalVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    return phi4.modeling_phi4_multimodal.Phi4MultimodalVisionModel(config)


def tiny_bert():
    return hf.BertModel(hf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "Expected a transformers model"),
        (tiny_swin, "'swin': it attends within windows"),
        (tiny_beit, "'beit': its attention is built to add a bias"),
        (tiny_pixtral, "'pixtral': it joins all images"),
        (tiny_bert, r"'bert': it reads text.*\. Supported model types: .*vit"),
        (lambda: hf.CLIPTextModel(clip().text_config), "'clip_text_model': it reads text"),
        (tiny_phi4, "'phi4_multimodal_vision': its attention is causal"),
        (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**COMMON)), "mask_ratio = 0"),
        (lambda: hf.VitPoseBackbone(hf.VitPoseBackboneConfig(num_experts=6, part_features=8)), "with several experts"),
        (lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**COMMON, mask_ratio=0.0)), "decoder needs every token"),
    ],
)
def test_models_that_cannot_be_merged_soundly_are_refused_with_the_reason(make, message):
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=message):
        apply_tome(model, 4)
    assert [type(module) for module in model.modules()] == classes


def test_the_text_side_of_clip_is_untouched():
    model = apply_tome(hf.CLIPModel(clip()).eval(), 4)
    assert type(model.text_model.encoder.layers[0]) is hf.models.clip.modeling_clip.CLIPEncoderLayer
    text = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with torch.no_grad():
        output = model(**text, pixel_values=torch.randn(2, 3, 32, 32))
    assert output.logits_per_image.shape == (2, 1)


def test_the_last_feature_map_of_a_backbone_keeps_its_grid():
    model = apply_tome(hf.Dinov2Backbone(dino(hf.Dinov2Config, out_features=["stage4"])).eval(), 4)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).feature_maps[0].shape == (2, 32, 8, 8)


def test_masked_image_modelling_decodes_every_patch():
    model = apply_tome(hf.ViTForMaskedImageModeling(hf.ViTConfig(**COMMON, encoder_stride=4)).eval(), 4)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).reconstruction.shape == (2, 3, 32, 32)
