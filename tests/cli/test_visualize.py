# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import transformers as hf
from helpers.families import COMMON
from PIL import Image

from tocom_hf.cli.visualize import main


SIZES = {"image_size": [32, 64], "patch_size": [4, 8]}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MODELS = {
    "vit, patches that are no squares": lambda: hf.ViTModel(hf.ViTConfig(**{**COMMON, **SIZES})),
    "mae": lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**COMMON, **DECODER)),
}


@pytest.mark.parametrize("name", MODELS)
def test_patches_of_any_shape_are_painted(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "model")
    height, width = (32, 64) if "squares" in name else (32, 32)
    hf.ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(tmp_path / "model")
    Image.linear_gradient("L").save(tmp_path / "image.png")
    output = tmp_path / "groups.png"
    arguments = ["--images", str(tmp_path / "image.png"), "--r", "0", "6", "--size", "80", "--output", str(output)]
    assert main(["--model_name_or_path", str(tmp_path / "model"), *arguments]) == 0
    with Image.open(output) as sheet:
        assert sheet.size == (3 * 80 + 2 * 4, 80)  # the image, r = 0 and r = 6, in square cells of the 8 x 8 patches
