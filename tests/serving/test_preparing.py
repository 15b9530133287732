# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What stands in for a processor gives its pixels; a processor of which nothing does is asked itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from tocom_hf.serving.preparing import Preparation


PROCESSORS = {
    "resize": ViTImageProcessorPil(size={"height": 24, "width": 40}),
    "shortest edge and crop": CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24}),
    "crop that pads": ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size={"height": 99, "width": 99}),
    "no rescaling": ViTImageProcessorPil(size={"height": 24, "width": 24}, do_rescale=False),
    "no normalising": ViTImageProcessorPil(size={"height": 24, "width": 24}, do_normalize=False),
    "one channel": ViTImageProcessorPil(size={"height": 24, "width": 24}, image_mean=[0.3], image_std=[0.2]),
    "uneven channels": ViTImageProcessorPil(
        size={"height": 24, "width": 24}, resample=3, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ),
}


def pictures(channels, sizes=((31, 45), (80, 20), (24, 24))):
    chance = np.random.default_rng(0)
    noise = [chance.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Image.fromarray(pixels).convert("RGB" if channels == 3 else "L") for pixels in noise]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor(name):
    processor, channels = PROCESSORS[name], 1 if name == "one channel" else 3
    preparation = Preparation(processor, channels)
    assert preparation.stand_in is not None
    for image in pictures(channels):
        pixels = preparation.prepare([image])
        assert pixels.dtype == torch.uint8
        found = preparation.finish(pixels, torch.device("cpu"), torch.float32)
        expected = processor([image], return_tensors="pt")["pixel_values"]
        scale = 255 if name == "no rescaling" else 1
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5 * scale)
        assert found.is_contiguous()


def test_a_batch_is_what_its_requests_are():
    preparation = Preparation(PROCESSORS["resize"], 3)
    images = pictures(3)
    together = preparation.prepare(images)
    assert torch.equal(together, torch.cat([preparation.prepare([image]) for image in images]))
    half = preparation.finish(together, torch.device("cpu"), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    single = preparation.finish(together, torch.device("cpu"), torch.float32)
    assert torch.equal(half, single.bfloat16())  # rounded once, at the end


class Inverting(ViTImageProcessorPil):
    """Its settings say nothing of what it does."""

    def resize(self, image, *arguments, **settings):
        return super().resize(255 - image, *arguments, **settings)


@pytest.mark.parametrize(
    "processor",
    [
        Inverting(size={"height": 24, "width": 24}),
        ViTImageProcessorPil(do_pad=True, pad_size={"height": 224, "width": 224}),
    ],
    ids=["does something else", "has a setting that is not known"],
)
def test_a_processor_of_which_nothing_gives_the_pixels_does_its_work_itself(processor):
    preparation = Preparation(processor, 3)
    assert preparation.stand_in is None
    (image,) = pictures(3, [(50, 60)])
    expected = processor([image], return_tensors="pt")["pixel_values"]
    found = preparation.finish(preparation.prepare([image]), torch.device("cpu"), torch.float32)
    assert torch.equal(found, expected)


def test_images_of_several_sizes_that_stay_so_are_refused():
    preparation = Preparation(ViTImageProcessorPil(do_resize=False), 3)
    assert preparation.stand_in is not None
    with pytest.raises(ValueError, match=r"several sizes: \(31, 45\), \(80, 20\)"):
        preparation.prepare(pictures(3, [(31, 45), (80, 20)]))
