# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Augmentation is that of PIL and the papers, and an image's own whatever batch it is in."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from tocom_hf import ArgumentError
from tocom_hf.distillation.augmentation import OPERATIONS, Augmentation, augment, beta, erase, mix, rand_augment
from tocom_hf.distillation.keyed_random import image_keys


FULL = Augmentation(randaugment_num_ops=2, random_erasing=0.5, mixup=0.8, cutmix=1.0)
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])


def keys(count, epoch=0):
    return image_keys(3, torch.full((count,), epoch), torch.arange(count))


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(16, 3, 6, 6, generator=generator) * 200 + 20
    return torch.nn.functional.interpolate(coarse, (24, 24), mode="bilinear").round().to(torch.uint8)


def test_an_image_is_augmented_alike_in_every_batch(pixels):
    whole = augment(pixels, keys(16), FULL, MEAN, STD)
    parts = [augment(pixels[i : i + 4], keys(16)[i : i + 4], FULL, MEAN, STD) for i in range(0, 16, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_epochs_differ(pixels):
    assert not torch.allclose(
        augment(pixels, keys(16), FULL, MEAN, STD), augment(pixels, keys(16, epoch=1), FULL, MEAN, STD)
    )


def test_without_augmentation_images_are_normalised(pixels):
    expected = (pixels.double() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    torch.testing.assert_close(
        augment(pixels, keys(16), Augmentation(), MEAN, STD).double(), expected, rtol=0, atol=1e-5
    )
    finished = torch.randn(4, 3, 8, 8)
    assert torch.equal(augment(finished, keys(4), Augmentation(), None, None), finished)


# every operation of RandAugment at a strength of 0.6, by PIL
PIL_OPERATIONS = {
    0: ImageOps.autocontrast,
    1: ImageOps.equalize,
    2: ImageOps.invert,
    4: lambda image: ImageOps.posterize(image, 4 - 2),
    5: lambda image: ImageOps.solarize(image, 102),
    6: lambda image: image.point(lambda value: min(255, value + 66) if value < 128 else value),
    7: lambda image: ImageEnhance.Color(image).enhance(1.54),
    8: lambda image: ImageEnhance.Contrast(image).enhance(1.54),
    9: lambda image: ImageEnhance.Brightness(image).enhance(1.54),
    10: lambda image: ImageEnhance.Sharpness(image).enhance(1.54),
    3: lambda image: image.rotate(18, Image.Resampling.BILINEAR, fillcolor=(127, 127, 127)),
    11: lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0.18, 0, 0, 1, 0), Image.Resampling.BILINEAR
    ),
    12: lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0, 0.18, 1, 0), Image.Resampling.BILINEAR
    ),
    13: lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0.27 * 24, 0, 1, 0), Image.Resampling.BILINEAR
    ),
    14: lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, 0.27 * 24), Image.Resampling.BILINEAR
    ),
}


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
def test_operations_are_those_of_pil(pixels, index):
    images = pixels.float() / 255
    ones = torch.ones(len(images))
    ours = OPERATIONS[index](images, 0.6 * ones, ones).clamp(0, 1) * 255
    inside = slice(7, 17) if index in (3, 11, 12, 13, 14) else slice(None)  # away from what comes in from outside
    for image, result in zip(pixels, ours, strict=True):
        picture = PIL_OPERATIONS[index](Image.fromarray(image.permute(1, 2, 0).numpy()))
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        difference = (result - expected)[:, inside, inside].abs()
        assert difference.mean() < 1.5
        assert difference.max() < 12


def test_turns_and_shears_are_those_of_pil_on_images_that_are_not_square():
    """By the place of a bright spot: a turn by 30 degrees about the centre, and shears by 0.3 about the corner."""
    height, width, y, x = 60, 120, 20, 75
    images = torch.zeros(1, 3, height, width)
    images[:, :, y - 1 : y + 2, x - 1 : x + 2] = 1
    picture = Image.fromarray((images[0, 0].numpy() * 255).astype(np.uint8))
    rotated = [picture.rotate(angle, Image.Resampling.BILINEAR) for angle in (30, -30)]
    sheared = [
        picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        for matrix in ((1, 0.3, 0, 0, 1, 0), (1, 0, 0, 0.3, 1, 0))
    ]
    # black instead of the grey that comes in at the edges
    moved = [operation(images, torch.ones(1), torch.ones(1))[0, 0].clamp(min=0.55) - 0.55 for operation in OPERATIONS]

    def place(pixels):
        pixels = np.asarray(pixels, dtype=float)
        rows, columns = np.indices(pixels.shape)
        return np.array([(rows * pixels).sum(), (columns * pixels).sum()]) / max(pixels.sum(), 1e-9)

    for wanted in (rotated, *([picture] for picture in sheared)):
        assert any(np.abs(place(one) - place(other)).max() < 0.5 for one in wanted for other in moved)


def test_half_of_the_operations_are_applied():
    images = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = (rand_augment(images, keys(400), 9.0) != images).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.5) < 0.1


def test_mixup_and_cutmix_mix_pairs_both_ways():
    images = torch.randn(40, 3, 20, 20)
    partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    pair_keys = keys(40)[::2]
    mixed = mix(images, pair_keys, 0.8, 0.0)
    weights = beta(pair_keys, 0.8).repeat_interleave(2)[:, None, None, None]
    torch.testing.assert_close(mixed, weights * images + (1 - weights) * partners)
    cut = mix(images, pair_keys, 0.0, 1.0)
    assert ((cut == images) | (cut == partners)).all()
    # a box of 1 - weight of the area, cut off at the border
    foreign = (cut == partners).all(1).float().mean((1, 2))
    assert (foreign <= 1 - beta(pair_keys, 1.0).repeat_interleave(2) + 0.12).all()
    assert 0.1 < foreign.mean() < 0.5


def test_both_mixers_take_turns():
    images = torch.randn(400, 1, 6, 6)
    partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    mixed = mix(images, keys(400)[::2], 0.8, 1.0)
    cut = ((mixed == images) | (mixed == partners)).flatten(1).all(1).float().mean()
    assert abs(cut - 0.5) < 0.12


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_beta_has_the_moments_of_beta(alpha):
    draws = beta(keys(4000), alpha)
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(draws.var() - 0.25 / (2 * alpha + 1)) < 0.01
    assert ((draws >= 0) & (draws <= 1)).all()


def test_erasing_replaces_rectangles_by_noise():
    images = torch.zeros(400, 3, 20, 20)
    erased = erase(images, keys(400), 0.25)
    shares = (erased != 0).all(1).float().mean((1, 2))
    hit = shares > 0
    assert abs(hit.float().mean() - 0.25) < 0.06
    assert shares[hit].max() < 0.36
    assert abs(erased[erased != 0].std() - 1) < 0.05
    first = (erased[hit][0] != 0).all(0)
    rows, columns = first.any(1).nonzero()[:, 0], first.any(0).nonzero()[:, 0]
    assert first.sum() == len(rows) * len(columns)
    assert rows[-1] - rows[0] + 1 == len(rows)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mixup": -1.0},
        {"mixup": 1.5},
        {"cutmix": float("inf")},
        {"random_erasing": 1.5},
        {"randaugment_num_ops": -1},
        {"randaugment_num_ops": 1.5},
        {"randaugment_magnitude": 11.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_one_channel_is_augmented_like_three_equal_ones():
    """All operations of RandAugment keep grey images grey, so one channel of a grey image is what is to be seen."""
    generator = torch.Generator().manual_seed(5)
    grey = torch.randint(0, 256, (64, 1, 12, 12), generator=generator, dtype=torch.uint8)
    keys = torch.arange(64) * 7_919
    settings = Augmentation(randaugment_num_ops=2)
    mean, std = torch.tensor([0.4]), torch.tensor([0.2])
    one = augment(grey, keys, settings, mean, std)
    three = augment(grey.expand(-1, 3, -1, -1), keys, settings, mean.expand(3), std.expand(3))
    assert one.shape == (64, 1, 12, 12)
    torch.testing.assert_close(three, one.expand(-1, 3, -1, -1), rtol=0, atol=1e-4)
    assert not torch.equal(one, augment(grey, keys, Augmentation(), mean, std))


@pytest.mark.parametrize("settings", [{"random_erasing": 1.0}, {"mixup": 0.8}, {"cutmix": 1.0}], ids=str)
def test_clips_are_augmented_in_the_same_place_of_all_frames(settings):
    """As many clips as frames, which a wrong axis would take one for the other. A clip of one image repeated."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clips = images[:, None].repeat(1, 4, 1, 1, 1)
    keys, augmentation = torch.arange(4), Augmentation(**settings)
    found = augment(clips, keys, augmentation, None, None)
    assert found.shape == clips.shape
    if settings.get("random_erasing"):
        changed = (found != clips).any(dim=2)  # (batch, frames, height, width)
        assert changed.any()
        assert (changed == changed[:, :1]).all()
    else:
        expected = augment(images, keys, augmentation, None, None)
        torch.testing.assert_close(found, expected[:, None].expand_as(found))


def test_randaugment_of_clips_is_refused():
    clips = torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="RandAugment is for images; leave it out for clips"):
        augment(clips, torch.arange(2), Augmentation(randaugment_num_ops=2), None, None)
