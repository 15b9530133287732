# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images of every mode of Pillow become what the model takes, held against formulas written down here."""

import colorsys
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTConfig, ViTImageProcessorPil

from tocom_hf import ArgumentError, DatasetError, with_pixel_values
from tocom_hf.data.colour import find_num_channels, model_channels, to_channels
from tocom_hf.data.images import TrainingImages


SIZE = {"height": 4, "width": 4}
GREY = ViTImageProcessorPil(size=SIZE, image_mean=[0.5], image_std=[0.5])
COLOUR = ViTImageProcessorPil(size=SIZE)
ORANGE = (200, 100, 50)


def as_dataset(*images):
    return datasets.Dataset.from_dict({"image": list(images)}).cast_column("image", datasets.Image())


def as_files(*paths):
    return datasets.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", datasets.Image())


def luma(red, green, blue):
    """ITU-R BT.601."""
    return 0.299 * red + 0.587 * green + 0.114 * blue


def ycbcr_to_rgb(y, cb, cr):
    """JPEG's variant of ITU-R BT.601."""
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    return red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue


def lab_to_rgb(lightness, a, b):
    """CIELAB with white point D50 to sRGB, by the matrix of the ICC's sRGB profile; 128 is zero for a and b."""
    fy = (lightness / 255 * 100 + 16) / 116
    f = np.array([fy + (a - 128) / 500, fy, fy - (b - 128) / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249]
    matrix = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    linear = np.clip(np.array(matrix) @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def hsv_to_rgb(*values):
    return [255 * value for value in colorsys.hsv_to_rgb(*(value / 255 for value in values))]


def of_16_bits(order, value):
    byte_order = {"": "<", "L": "<", "B": ">", "N": "="}[order]
    return Image.frombytes(f"I;16{order}", (4, 4), 16 * struct.pack(f"{byte_order}H", value))


def with_palette(mode):
    image = Image.new(mode, (4, 4), 1 if mode == "P" else (1, 128))
    image.putpalette([0, 0, 0, *ORANGE])
    if mode == "P":
        image.info["transparency"] = 1
    return image


MODES = {
    "1": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "L": (Image.new("L", (4, 4), 77), (77, 77, 77)),
    "LA": (Image.new("LA", (4, 4), (77, 128)), (77, 77, 77)),
    "La": (Image.new("LA", (4, 4), (77, 128)).convert("La"), (77, 77, 77)),
    "P": (with_palette("P"), ORANGE),
    "PA": (with_palette("PA"), ORANGE),
    "RGB": (Image.new("RGB", (4, 4), ORANGE), ORANGE),
    "RGBA": (Image.new("RGBA", (4, 4), (*ORANGE, 128)), ORANGE),
    "RGBa": (Image.new("RGBA", (4, 4), (*ORANGE, 128)).convert("RGBa"), ORANGE),
    "RGBX": (Image.new("RGBX", (4, 4), (*ORANGE, 0)), ORANGE),
    "CMYK": (Image.new("CMYK", (4, 4), (10, 50, 100, 40)), tuple((255 - c) * 215 / 255 for c in (10, 50, 100))),
    "YCbCr": (Image.new("YCbCr", (4, 4), (100, 110, 170)), ycbcr_to_rgb(100, 110, 170)),
    "HSV": (Image.new("HSV", (4, 4), (30, 150, 200)), hsv_to_rgb(30, 150, 200)),
    "LAB": (Image.new("LAB", (4, 4), (140, 160, 170)), lab_to_rgb(140, 160, 170)),
    **{f"I;16{order}": (of_16_bits(order, 40000), [40000 / 257] * 3) for order in ("", "L", "B", "N")},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_or_grey(mode):
    image, expected = MODES[mode]
    assert image.mode == mode
    colour = to_channels(image, 3)
    assert colour.mode == "RGB"
    tolerance = 3 if mode in ("LAB", "HSV", "RGBa") else 1.01
    assert np.abs(np.array(colour.getpixel((1, 1))) - expected).max() <= tolerance
    grey = to_channels(image, 1)
    assert grey.mode == "L"
    assert abs(grey.getpixel((1, 1)) - luma(*expected)) <= tolerance


@pytest.mark.parametrize(("mode", "ending"), [("F", "tiff"), ("I", "tiff"), ("F", "pfm"), ("I", "pgm")])
def test_32_bits_are_refused_by_name(tmp_path, mode, ending):
    """They became black or saturated: `Image.convert` cuts their values off at 0 and 255."""
    path = tmp_path / f"depth.{ending}"
    frames = [Image.new(mode, (4, 4), 70000), Image.new(mode, (4, 4), 1)]
    frames[0].save(path, **({"save_all": True, "append_images": frames[1:]} if ending == "tiff" else {}))
    message = rf"depth\.{ending} in .* cannot be used: .* 32 bits \(mode {mode}\).*Convert it to 8 or 16 bits"
    images = as_files(path)
    for read in (lambda: with_pixel_values(images, COLOUR)[0], lambda: TrainingImages(images, COLOUR)[0]):
        with pytest.raises(DatasetError, match=message):
            read()


def test_12_bits_of_a_tiff_are_scaled_by_their_own_range(tmp_path):
    """Two pixels of 12 bits each in three bytes: 0xFFF is white and 0x800 is grey."""
    path = tmp_path / "x-ray.tiff"
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    content = b"II*\0" + struct.pack("<I", 12) + bytes([0xFF, 0xF8, 0x00, 0])
    content += struct.pack("<H", len(entries))
    content += b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries) + bytes(4)
    path.write_bytes(content)
    assert Image.open(path).mode == "I;16"
    processor = ViTImageProcessorPil(size={"height": 1, "width": 2}, do_normalize=False)
    pixels = TrainingImages(as_files(path), processor)[0]["pixel_values"]
    assert pixels[0].tolist() == [[255, 128]]


def test_a_model_of_one_channel_gets_grey_images():
    images = as_dataset(Image.new("RGB", (8, 8), ORANGE), Image.new("L", (8, 8), 77))
    processed = with_pixel_values(images, GREY)
    expected = [round(luma(*ORANGE)), 77]
    for sample, value in zip(processed, expected, strict=True):
        assert sample["pixel_values"].shape == (1, 4, 4)
        torch.testing.assert_close(sample["pixel_values"], torch.full((1, 4, 4), value / 127.5 - 1))
    views = TrainingImages(images, GREY, min_crop=0.5)
    assert views.image_mean.tolist() == [0.5]
    for index, value in enumerate(expected):
        assert views[index]["pixel_values"].shape == (1, 4, 4)
        view = views.view(index, np.random.default_rng(0))
        assert torch.equal(view, torch.full((1, 4, 4), value, dtype=torch.uint8))


def test_the_number_of_channels_is_the_models_where_the_processor_says_nothing():
    processor = ViTImageProcessorPil(size=SIZE, do_normalize=False)
    images = as_dataset(Image.new("RGB", (4, 4), ORANGE))
    assert with_pixel_values(images, processor)[0]["pixel_values"].shape == (3, 4, 4)
    assert with_pixel_values(images, processor, num_channels=1)[0]["pixel_values"].shape == (1, 4, 4)
    assert TrainingImages(images, processor, num_channels=1)[0]["pixel_values"].shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("processor", "num_channels", "message"),
    [
        (COLOUR, 1, "takes images of 1 channel, but the setting image_mean of its image processor is for 3"),
        (GREY, 3, "takes images of 3 channels, but the setting image_mean .* is for 1"),
        (CLIPImageProcessorPil(image_mean=[0.5], image_std=[0.5]), None, "1 channel, .* do_convert_rgb .* is for 3"),
        (ViTImageProcessorPil(size=SIZE, do_normalize=False), 4, "but the model takes 4.*finished pixel_values"),
        (ViTImageProcessorPil(size=SIZE, image_mean=[0.5] * 4, image_std=[0.5] * 4), None, "the model takes 4"),
    ],
)
def test_a_processor_that_contradicts_the_model_is_refused_before_any_image_is_read(processor, num_channels, message):
    images = as_dataset(Image.new("L", (4, 4)))
    for make in (with_pixel_values, TrainingImages):
        with pytest.raises(ArgumentError, match=message):
            make(images, processor, num_channels=num_channels)


def test_a_mean_for_all_channels_at_once_is_for_any_number():
    processor = ViTImageProcessorPil(size=SIZE, image_mean=0.5, image_std=0.5)
    assert (find_num_channels(processor), find_num_channels(processor, 1)) == (3, 1)


def test_the_channels_of_a_model_are_those_of_its_vision_part():
    class OfTwoTowers:
        vision_config = ViTConfig(num_channels=1)

    assert model_channels(ViTConfig()) == 3
    assert model_channels(ViTConfig(num_channels=1)) == 1
    assert model_channels(OfTwoTowers()) == 1
