# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The classes that people use vision towers in: language models, detectors and contrastive models."""

import pytest
import torch
import transformers as hf
from helpers.families import SIMILAR, internvl_tower, tower

from tocom_hf import ArgumentError, apply_tome, count_flops, remove_tome
from tocom_hf.merging.backbones import find_backbone


IMAGE = 99  # the id of image tokens
LLAMA = hf.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=120, pad_token_id=0
).to_dict()
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def prompt(tokens):
    return torch.tensor([[1, *[IMAGE] * tokens, 2, 3]] * 2)


def idefics3():
    vision = tower(hf.models.idefics3.Idefics3VisionConfig).to_dict()
    config = hf.Idefics3Config(vision_config=vision, text_config=LLAMA, image_token_id=IMAGE, pad_token_id=0)
    return hf.Idefics3ForConditionalGeneration(config), {"input_ids": prompt(16), "pixel_values": images()[:, None]}


def smolvlm():
    vision = tower(hf.models.smolvlm.SmolVLMVisionConfig).to_dict()
    config = hf.SmolVLMConfig(vision_config=vision, text_config=LLAMA, image_token_id=IMAGE, pad_token_id=0)
    return hf.SmolVLMForConditionalGeneration(config), {"input_ids": prompt(16), "pixel_values": images()[:, None]}


def internvl():
    vision = internvl_tower(use_qk_norm=True).to_dict()
    config = hf.InternVLConfig(vision_config=vision, text_config=LLAMA, image_token_id=IMAGE)
    return hf.InternVLForConditionalGeneration(config), {"input_ids": prompt(16), "pixel_values": images()}


def detector(model_class, config_class, vision_class):
    config = config_class(vision_config=tower(vision_class).to_dict(), text_config=TEXT, projection_dim=16)
    return model_class(config), {"input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]]), "pixel_values": images()}


def owlvit():
    return detector(hf.OwlViTForObjectDetection, hf.OwlViTConfig, hf.OwlViTVisionConfig)


def owlv2():
    return detector(hf.Owlv2ForObjectDetection, hf.Owlv2Config, hf.Owlv2VisionConfig)


def siglip2():
    vision = tower(hf.Siglip2VisionConfig, num_patches=64).to_dict()
    family = next(family for family in SIMILAR if family.model_class is hf.Siglip2VisionModel)
    config = hf.Siglip2Config(vision_config=vision, text_config=TEXT, num_labels=5)
    return hf.Siglip2ForImageClassification(config), family.inputs(batch=2)


def git():
    config = hf.GitConfig(vision_config=tower(hf.GitVisionConfig).to_dict(), **TEXT)
    return hf.GitForCausalLM(config), {"input_ids": torch.tensor([[1, 5, 2]] * 2), "pixel_values": images()}


@pytest.mark.parametrize("make", [idefics3, smolvlm, internvl, owlvit, owlv2, siglip2, git])
def test_classes_that_read_patch_tokens_give_what_they_give_without_merging(make):
    """Groups of four identical tokens merge exactly."""
    torch.manual_seed(0)
    model, inputs = make()
    model = model.eval().double()
    inputs = {name: part.double() if part.is_floating_point() else part for name, part in inputs.items()}
    backbone = find_backbone(model)

    def duplicate(module, args):
        tokens = args[0].clone()
        for offset in range(1, 4):
            tokens[:, backbone.protected + offset :: 4] = tokens[:, backbone.protected :: 4]
        return (tokens, *args[1:])

    backbone.layers[0].register_forward_pre_hook(duplicate)
    with torch.no_grad():
        dense = model(**inputs)
        merged = apply_tome(model, [32, 16, 0, 0])(**inputs)
        torch.testing.assert_close(merged.logits, dense.logits, rtol=1e-4, atol=1e-5)
        if "pred_boxes" in dense:
            torch.testing.assert_close(merged.pred_boxes, dense.pred_boxes, rtol=1e-4, atol=1e-5)
        assert torch.equal(remove_tome(model)(**inputs).logits, dense.logits)


def test_operations_of_a_model_that_takes_sequences_of_patches():
    torch.manual_seed(0)
    model, _ = siglip2()
    assert count_flops(model, 8) < count_flops(model, 0)
    with pytest.raises(ArgumentError, match="takes patch sequences, not images"):
        count_flops(model, 8, image_size=32)
