# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Image augmentation in batches on the accelerator: RandAugment, random erasing, mixup and cutmix.

The pixel operations are kornia's; what is random about them comes from the key of each image (see `keyed_random`), so
an image looks the same whichever process or batch it is in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tocom_hf.devices import float64_device
from tocom_hf.distillation.checks import Magnitude, Natural, Share, require_checks
from tocom_hf.distillation.keyed_random import fold, normals, uniforms
from tocom_hf.errors import ArgumentError
from tocom_hf.extras import require_extras


_AUGMENT, _ERASE, _NOISE, _MIX, _BETA = range(5)  # what a key is folded with, so that each has numbers of its own
_MAX_MAGNITUDE = 10.0
_MAGNITUDE_STD = 0.5
_APPLY_PROBABILITY = 0.5  # of one RandAugment operation
_SWITCH_PROBABILITY = 0.5  # of cutmix instead of mixup, where both are on


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch of images. Everything is off by default.

    Attributes:
        randaugment_num_ops: Operations for each image (RandAugment, arXiv 1909.13719, in the variant that DeiT trains
            with: each is applied with probability 0.5, and strengths vary by a standard deviation of 0.5).
        randaugment_magnitude: Their strength, 0 to 10.
        random_erasing: Probability that a rectangle of noise replaces 2 to 33 % of an image (arXiv 1708.04896).
        mixup: Parameter alpha of the Beta distribution of mixup's weights (arXiv 1710.09412); 0 is off.
        cutmix: The same for the areas of cutmix (arXiv 1905.04899). Where both are on, a pair gets one of the two.
    """

    randaugment_num_ops: Natural = 0
    randaugment_magnitude: Magnitude = 9.0
    random_erasing: Share = 0.0
    # up to 1, the range of the rejection that draws the weights
    mixup: Share = 0.0
    cutmix: Share = 0.0

    def __post_init__(self):
        require_checks(self)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, which takes batches of an even number of images."""
        return self.mixup > 0 or self.cutmix > 0


def augment(
    pixel_values: torch.Tensor,
    keys: torch.Tensor,
    settings: Augmentation,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> torch.Tensor:
    """Augment and normalise a batch.

    Args:
        pixel_values: `(batch, channels, height, width)`: uint8 in 0..255, or floating point and normalised already,
            to which RandAugment does not apply. Clips, `(batch, frames, channels, height, width)`, are erased and mixed
            in the same place of all their frames.
        keys: int64 `(batch,)`, one key for each image. Image 2i is mixed with image 2i + 1.
        settings: What to do.
        mean, std: `(channels,)`, for images in uint8: what their values in [0, 1] are normalised by.

    Returns:
        Floating point, of the shape of `pixel_values`, normalised.

    Raises:
        ArgumentError: if RandAugment is to be applied to clips.
    """
    images = pixel_values
    if images.ndim == 5 and settings.randaugment_num_ops:
        raise ArgumentError("RandAugment is for images; leave it out for clips (randaugment_num_ops=0).")
    if images.dtype == torch.uint8:
        images = images.float() / 255
        channels = images.shape[1]
        if settings.randaugment_num_ops and channels == 1:
            # its operations are made for RGB, and keep equal channels equal
            images = images.expand(-1, 3, -1, -1)
        for step in range(settings.randaugment_num_ops):
            step_keys = fold(fold(keys, _AUGMENT), step)
            images = rand_augment(images, step_keys, settings.randaugment_magnitude)
        images = images[:, :channels]
        if mean is not None and std is not None:
            images = (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    if settings.random_erasing:
        images = erase(images, keys, settings.random_erasing)
    if settings.mixes:
        images = mix(images, keys[::2], settings.mixup, settings.cutmix)
    return images


def rand_augment(images: torch.Tensor, keys: torch.Tensor, magnitude: float) -> torch.Tensor:
    """Apply one random operation of RandAugment to each image, or none.

    Args:
        images: Floating point in [0, 1], `(batch, 3, height, width)`.
        keys: int64 `(batch,)`.
        magnitude: Mean strength, 0 to 10.

    Returns:
        Images in [0, 1], a new tensor.
    """
    draws = uniforms(keys, 3)
    strengths = (magnitude + _MAGNITUDE_STD * normals(keys, 1)[:, 0]).clamp(0, _MAX_MAGNITUDE) / _MAX_MAGNITUDE
    if magnitude == 0:
        strengths = torch.zeros_like(strengths)
    signs = torch.where(draws[:, 2] < 0.5, -1.0, 1.0)
    choices = (draws[:, 0] * len(OPERATIONS)).long()
    choices = torch.where(draws[:, 1] < _APPLY_PROBABILITY, choices, len(OPERATIONS))
    images, chosen_by_image = images.clone(), choices.tolist()
    for index, operation in enumerate(OPERATIONS):
        chosen = [position for position, choice in enumerate(chosen_by_image) if choice == index]
        if chosen:
            rows = torch.tensor(chosen, device=images.device)
            images[rows] = operation(images[rows], strengths[rows], signs[rows]).clamp(0, 1)
    return images


def erase(images: torch.Tensor, keys: torch.Tensor, probability: float) -> torch.Tensor:
    """Replace a random rectangle of some images by normal noise.

    Args:
        images: `(batch, channels, height, width)`, or clips with frames in front of the channels, normalised.
        keys: int64 `(batch,)`.
        probability: Of being erased, for each image.
    """
    height, width = images.shape[-2:]
    apply, area, ratio, top, left = uniforms(fold(keys, _ERASE), 5).unbind(1)
    area = (0.02 + (1 / 3 - 0.02) * area) * height * width
    aspect = (3.3 ** (2 * ratio - 1)).float()  # between 1 / 3.3 and 3.3
    box_height = (area * aspect).sqrt().clamp(1, height).floor()
    box_width = (area / aspect).sqrt().clamp(1, width).floor()
    inside = _box_mask(top * (height - box_height + 1), left * (width - box_width + 1), box_height, box_width, images)
    rows = (apply < probability).nonzero()[:, 0]
    if len(rows) == 0:
        return images
    noise = normals(fold(keys[rows], _NOISE), images[0].numel()).view(-1, *images.shape[1:]).to(images.dtype)
    return images.index_copy(0, rows, torch.where(_as_wide(inside[rows], images), noise, images[rows]))


def mix(images: torch.Tensor, pair_keys: torch.Tensor, mixup: float, cutmix: float) -> torch.Tensor:
    """Mix image 2i with image 2i + 1, both ways, by mixup or by cutmix.

    Args:
        images: `(batch, channels, height, width)` with an even batch, or clips with frames in front of the channels.
        pair_keys: int64 `(batch / 2,)`.
        mixup, cutmix: The parameters alpha; 0 is off.
    """
    height, width = images.shape[-2:]
    switch, centre_y, centre_x = uniforms(fold(pair_keys, _MIX), 3).unbind(1)
    cut = switch < (_SWITCH_PROBABILITY if mixup and cutmix else float(cutmix > 0))
    weight = torch.where(cut, beta(pair_keys, cutmix or 1.0), beta(pair_keys, mixup or 1.0))
    # cutmix: the other image shows in a box of (1 - weight) of the area, cut off at the image's border
    side = (1 - weight).sqrt()
    tops, bottoms = ((centre_y + sign * side / 2).clamp(0, 1) * height for sign in (-1, 1))
    lefts, rights = ((centre_x + sign * side / 2).clamp(0, 1) * width for sign in (-1, 1))
    box = _box_mask(tops, lefts, bottoms.floor() - tops.floor(), rights.floor() - lefts.floor(), images)
    own = torch.where(cut[:, None, None], (~box).float(), weight[:, None, None])
    own = _as_wide(own.repeat_interleave(2, dim=0), images).to(images.dtype)
    partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return own * images + (1 - own) * partners


def beta(keys: torch.Tensor, alpha: float, rounds: int = 24) -> torch.Tensor:
    """Draws from Beta(alpha, alpha) by Jöhnk's rejection: float32 `(batch,)` for int64 keys `(batch,)`.

    The first accepted of a fixed number of trials; for alpha <= 1 all fail less than once in ten million keys.
    """
    draws = uniforms(fold(keys, _BETA), 2 * rounds)
    trials = draws.to(float64_device(draws.device)).double() ** (1 / alpha)
    first, second = trials[:, :rounds], trials[:, rounds:]
    total = first + second
    accepted = ((total <= 1) & (total > 0)).long().argmax(dim=1, keepdim=True)
    return (first / total).gather(1, accepted)[:, 0].nan_to_num(0.5).float().to(draws.device)


def _as_wide(planes: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Planes `(batch, height, width)`, the same for all channels (and frames) of images (or clips)."""
    return planes.view(len(planes), *[1] * (images.ndim - 3), *planes.shape[1:])


def _box_mask(top, left, box_height, box_width, images: torch.Tensor) -> torch.Tensor:
    """True inside the boxes: bool `(batch, height, width)`."""
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    top, left = top.floor()[:, None], left.floor()[:, None]
    inside_rows = (rows >= top) & (rows < top + box_height[:, None])
    inside_columns = (columns >= left) & (columns < left + box_width[:, None])
    return inside_rows[:, :, None] & inside_columns[:, None, :]


# --- the operations of RandAugment: (images, strengths in [0, 1], signs) -> images ---

Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _affine(make: Callable[[torch.Tensor], tuple], about_corner: bool = False) -> Operation:
    """An operation that moves pixels.

    Args:
        make: Gives the matrix from the signed strengths: in pixels, but for the last column, which is in halves of the
            width and of the height.
        about_corner: Whether the upper left corner stays where it is, as when DeiT shears images, and not the centre.
    """

    def operation(images, strengths, signs):
        (a, b, c), (d, e, f) = make(strengths * signs)
        # torch has both axes in [-1, 1]
        aspect = images.shape[-2] / images.shape[-1]
        if about_corner:
            c = c + (a - 1) + b * aspect
            f = f + (e - 1) + d / aspect
        entries = [a, b * aspect, c, d / aspect, e, f]
        columns = []
        for entry in entries:
            entry = torch.as_tensor(entry, device=images.device, dtype=images.dtype)
            columns.append(entry.expand_as(strengths))
        matrices = torch.stack(columns, dim=-1).view(-1, 2, 3)  # (batch, 2, 3)
        grid = torch.nn.functional.affine_grid(matrices, list(images.shape), align_corners=False)
        # what comes in from outside is mid-grey
        moved = torch.nn.functional.grid_sample(images - 0.5, grid, mode="bilinear", align_corners=False)
        return moved + 0.5

    return operation


def _rotation(strength: torch.Tensor) -> tuple:
    angle = torch.deg2rad(30 * strength)
    return (angle.cos(), -angle.sin(), 0), (angle.sin(), angle.cos(), 0)


def _auto_contrast(images, strengths, signs):
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def _enhance(name: str) -> Operation:
    """An operation of kornia with a factor for each image, between 0.1 and 1.9."""

    def operation(images, strengths, signs):
        with require_extras("RandAugment"):
            import kornia.enhance

        return getattr(kornia.enhance, name)(images, 1 + 0.9 * strengths * signs)

    return operation


def _equalize(images, strengths, signs):
    with require_extras("RandAugment"):
        import kornia.enhance

    return kornia.enhance.equalize(images)


def _posterize(images, strengths, signs):
    with require_extras("RandAugment"):
        import kornia.enhance

    return kornia.enhance.posterize(images, 4 - (4 * strengths).int())


def _solarize(images, strengths, signs):
    return torch.where(images < (1 - strengths).view(-1, 1, 1, 1), images, 1 - images)


def _solarize_add(images, strengths, signs):
    return torch.where(images < 0.5, images + (strengths * 110 / 255).view(-1, 1, 1, 1), images)


OPERATIONS: tuple[Operation, ...] = (
    _auto_contrast,
    _equalize,
    lambda images, strengths, signs: 1 - images,
    _affine(_rotation),
    _posterize,
    _solarize,
    _solarize_add,
    _enhance("adjust_saturation_with_gray_subtraction"),
    _enhance("adjust_contrast_with_mean_subtraction"),
    _enhance("adjust_brightness_accumulative"),
    _enhance("sharpness"),
    _affine(lambda strength: ((1, 0.3 * strength, 0), (0, 1, 0)), about_corner=True),
    _affine(lambda strength: ((1, 0, 0), (0.3 * strength, 1, 0)), about_corner=True),
    _affine(lambda strength: ((1, 0, 0.9 * strength), (0, 1, 0))),  # 0.45 of the width
    _affine(lambda strength: ((1, 0, 0), (0, 1, 0.9 * strength))),
)
