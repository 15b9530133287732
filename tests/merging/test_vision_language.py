# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Vision towers within whole models: what reads the tower's tokens sees as many, at the same places."""

import pytest
import torch
import transformers as hf
from helpers.duplicates import duplicates, without_positions

from tocom_hf import apply_tome


VISION = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# of the images that Janus draws, which no test here asks for
DECODER = {
    "embed_dim": 8, "num_embeddings": 8, "latent_channels": 32, "num_patches": 4, "base_channels": 32,
    "channel_multiplier": [1], "num_res_blocks": 1,
}  # fmt: skip
IMAGE_TOKEN = 99


def clipseg():
    text = {**TEXT, "max_position_embeddings": 16}
    decoder = {"reduce_dim": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    config = hf.CLIPSegConfig(
        text_config=text, vision_config=VISION, projection_dim=32, extract_layers=[1, 2, 3], **decoder
    )
    return hf.CLIPSegForImageSegmentation(config)


def internvl():
    vision = hf.InternVLVisionConfig(**{**VISION, "image_size": [32, 32], "patch_size": [4, 4]}, use_qk_norm=True)
    text = hf.Qwen2Config(**TEXT, num_key_value_heads=2)
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return hf.InternVLForConditionalGeneration(config)


def smolvlm():
    text = hf.LlamaConfig(**TEXT).to_dict()
    config = hf.SmolVLMConfig(
        vision_config=VISION, text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=2, pad_token_id=0
    )
    return hf.SmolVLMForConditionalGeneration(config)


def blip_2():
    former = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = hf.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    config = hf.Blip2Config(
        vision_config=VISION, qformer_config={**former, "encoder_hidden_size": 32, "vocab_size": 100},
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    return hf.Blip2ForConditionalGeneration(config)


def janus():
    sizes = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    vision = {**sizes, "mlp_ratio": 2, "projection_dim": 32}
    text = hf.LlamaConfig(**TEXT).to_dict()
    return hf.JanusForConditionalGeneration(
        hf.JanusConfig(vision_config=vision, text_config=text, vq_config=DECODER, image_token_id=IMAGE_TOKEN)
    )


def prompt(image_tokens):
    return {"input_ids": torch.tensor([[IMAGE_TOKEN] * image_tokens + [3, 4, 5]] * 2)}


# how to make it, what it reads besides, and whether an image is one of several
MODELS = {
    "CLIPSeg": (clipseg, {"input_ids": torch.tensor([[1, 5, 6, 2]] * 2)}, False),
    "InternVL": (internvl, prompt(16), False),
    "SmolVLM": (smolvlm, prompt(16), True),
    "BLIP-2": (blip_2, prompt(4), False),
    "Janus": (janus, prompt(64), False),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_they_agree_with_dense_ones_on_exact_duplicates(name):
    make, inputs, several = MODELS[name]
    torch.manual_seed(0)
    model = without_positions(make()).double()

    def logits(pixel_values):
        pixel_values = pixel_values.double()
        return model(pixel_values=pixel_values.unsqueeze(1) if several else pixel_values, **inputs).logits

    generator = torch.Generator().manual_seed(4)
    different = torch.randn(2, 3, 32, 32, generator=generator)
    expected, dense = logits(duplicates()), logits(different)
    apply_tome(model, 6)
    torch.testing.assert_close(logits(duplicates()), expected, rtol=1e-9, atol=1e-9)
    # or equality would show nothing: the logits depend on the image, and on what merges
    assert (dense - expected).abs().max() > 0.1
    assert (logits(different) - dense).abs().max() > 0.1
