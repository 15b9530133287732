# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images become what the image processors of transformers make of them; what cannot be had is refused by its name."""

import numpy as np
import pytest
import transformers as hf
from PIL import Image

from tocom_hf import ArgumentError
from tocom_hf.deployed.preprocessing import Preprocessing


PROCESSORS = {
    "ViT": hf.ViTImageProcessorPil,
    "DeiT": hf.DeiTImageProcessorPil,
    "Bit": hf.BitImageProcessorPil,  # of DINOv2
    "CLIP": hf.CLIPImageProcessorPil,
    "SigLIP": hf.SiglipImageProcessorPil,
}
# height and width: larger, smaller than the crop in one direction and in both, odd
SIZES = [(300, 411), (180, 400), (57, 31), (224, 224), (256, 225)]


def make_image(height, width, mode="RGB", seed=3):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def expected_of(processor, image):
    return processor(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_it_is_what_the_processor_makes(name, size):
    processor, image = PROCESSORS[name](), make_image(*size)
    found = Preprocessing.from_config(processor.to_dict(), 3)(image)
    np.testing.assert_allclose(found, expected_of(processor, image), rtol=0, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", ["Bit", "CLIP", "SigLIP"])
def test_transparent_parts_are_white(name):
    processor, image = PROCESSORS[name](), make_image(230, 240, "RGBA")
    found = Preprocessing.from_config(processor.to_dict(), 3)(image)
    np.testing.assert_allclose(found, expected_of(processor, image), rtol=0, atol=1e-6)


SETTINGS = [
    {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 31, "width": 33}},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"size": {"height": 30, "width": 50}, "resample": 0},
    {"size": {"height": 30, "width": 50}, "resample": 1},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    {"do_center_crop": True, "crop_size": {"height": 300, "width": 41}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(settings):
    processor, image = hf.ViTImageProcessorPil(**settings), make_image(61, 90)
    found = Preprocessing.from_config(processor.to_dict(), 3)(image)
    np.testing.assert_allclose(found, expected_of(processor, image), rtol=1e-6, atol=1e-6)


def test_one_channel():
    processor = hf.ViTImageProcessorPil(image_mean=[0.5], image_std=[0.25], size={"height": 28, "width": 28})
    image = make_image(40, 50, "L")
    found = Preprocessing.from_config(processor.to_dict(), 1)(image)
    np.testing.assert_allclose(found, expected_of(processor, image), rtol=0, atol=1e-6)


REFUSED = [
    ({"image_processor_type": "ConvNextImageProcessor"}, "image processor ConvNextImageProcessor cannot be exported"),
    ({"image_processor_type": None, "feature_extractor_type": "ASTFeatureExtractor"}, "ASTFeatureExtractor cannot"),
    ({"do_pad": True}, "setting do_pad=True cannot be exported"),
    ({"do_flip_channel_order": True}, "setting do_flip_channel_order=True"),
    ({"size": {"shortest_edge": 8, "longest_edge": 9}}, "setting size=.*: expected height and width, or shortest_edge"),
    ({"do_center_crop": True, "crop_size": {"shortest_edge": 8}}, "setting crop_size=.*: expected height and width"),
    ({"resample": 17}, "resample=17 is no filter of Pillow"),
    ({"image_std": [1.0, 1.0]}, r"image_std=\[1.0, 1.0\] must have 3 numbers"),
    ({"rescale_factor": "1/255"}, "rescale_factor='1/255' must be a number"),
    ({"image_mean": [0.5]}, "image_mean of its image processor is for 1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_had_is_refused_by_name(settings, message):
    config = {**hf.ViTImageProcessorPil().to_dict(), **settings}
    with pytest.raises(ArgumentError, match=message):
        Preprocessing.from_config(config, 3)
