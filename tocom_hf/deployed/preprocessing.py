# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images to the inputs of a model, as the image processors of transformers do it with Pillow.

Their other backend, torchvision, resizes in its own way; transformers itself takes Pillow where torchvision is missing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tocom_hf.data.colour import find_num_channels, to_channels
from tocom_hf.errors import ArgumentError


# their defaults differ, but what transformers writes to preprocessor_config.json is complete
PROCESSORS = (
    "ViTImageProcessor",
    "DeiTImageProcessor",
    "BitImageProcessor",
    "CLIPImageProcessor",
    "SiglipImageProcessor",
)
# settings that switch on what is not done here; without a value, or false, they change nothing
_UNSUPPORTED = ("do_pad", "do_flip_channel_order", "do_thumbnail", "do_align_long_axis", "do_reduce_labels", "crop_pct")


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor does to an image.

    Attributes:
        size: Height and width to resize to, or the length of the shorter edge, or `None`.
        resample: Pillow's number of the filter to resize with.
        crop: Height and width to cut out of the centre, or `None`.
        rescale: The factor that pixels of 0 to 255 are multiplied by, or `None`.
        mean, std: What pixels are normalised by, one value for each channel, or `None`.
        convert_rgb: Whether images become RGB, with transparent parts in white.
        num_channels: The channels of the result.
    """

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    convert_rgb: bool
    num_channels: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_channels: int) -> "Preprocessing":
        """Read the content of a `preprocessor_config.json`.

        Args:
            config: The content.
            num_channels: The channels that the model takes.

        Raises:
            ArgumentError: if it asks for something that is not done here, by its name.
        """
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
        if kind.removesuffix("Fast").removesuffix("Pil") not in PROCESSORS:
            raise ArgumentError(
                f"The image processor {kind} cannot be exported. Expected one of {', '.join(PROCESSORS)}; export with "
                "processor=False to give finished pixel_values."
            )
        for name in _UNSUPPORTED:
            if config.get(name):
                raise ArgumentError(
                    f"The image processor's setting {name}={config[name]!r} cannot be exported. Switch it off, or "
                    "export with processor=False to give finished pixel_values."
                )
        find_num_channels(_Settings(config), num_channels)
        mean = std = None
        if config.get("do_normalize"):
            mean = _per_channel(config, "image_mean", num_channels)
            std = _per_channel(config, "image_std", num_channels)
        return cls(
            size=_size(config, "size") if config.get("do_resize") else None,
            resample=_resample(config),
            crop=_pair(config, "crop_size") if config.get("do_center_crop") else None,
            rescale=_number(config, "rescale_factor") if config.get("do_rescale") else None,
            mean=mean,
            std=std,
            convert_rgb=bool(config.get("do_convert_rgb")),
            num_channels=num_channels,
        )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """An image before it is rescaled and normalised: uint8 `(channels, height, width)`.

        Raises:
            DatasetError: if its pixels have no known range.
        """
        if self.convert_rgb and ("A" in image.getbands() or image.info.get("transparency") is not None):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        if image.mode != ("RGB" if self.num_channels == 3 else "L"):
            image = to_channels(image, self.num_channels)
        if self.size is not None:
            height, width = self._resized(image)
            image = image.resize((width, height), resample=Image.Resampling(self.resample))
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (channels, height, width)
        if self.crop is not None:
            pixels = _center_crop(pixels, *self.crop)
        return pixels

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The input for one image: float32 `(channels, height, width)`.

        Raises:
            DatasetError: as `pixels` does.
        """
        pixels = self.pixels(image)
        values = pixels.astype(np.float32)
        if self.rescale is not None:
            values = (pixels.astype(np.float64) * self.rescale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.asarray(numbers, np.float32)[:, None, None] for numbers in (self.mean, self.std))
            values = (values - mean) / std
        return np.ascontiguousarray(values)

    def scale_and_shift(self) -> tuple[np.ndarray, np.ndarray]:
        """Two of float32 `(channels,)`: `pixels * scale + shift` is what a call returns, up to rounding."""
        mean = np.zeros(self.num_channels) if self.mean is None else np.asarray(self.mean)
        std = np.ones(self.num_channels) if self.std is None else np.asarray(self.std)
        scale = (1.0 if self.rescale is None else self.rescale) / std
        return scale.astype(np.float32), (-mean / std).astype(np.float32)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of an image behind the resizing."""
        if not isinstance(self.size, int):
            assert self.size is not None
            return self.size
        width, height = image.size
        if width <= height:
            return int(self.size * height / width), self.size
        return self.size, int(self.size * width / height)


class _Settings:
    """A configuration whose entries are attributes."""

    def __init__(self, config: Mapping[str, Any]):
        self.__dict__.update(config)


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut out the centre of `(channels, height, width)`; what lies outside of the image is black."""
    rows, columns = pixels.shape[1:]
    missing_rows, missing_columns = max(0, height - rows), max(0, width - columns)
    above, left = math.ceil(missing_rows / 2), math.ceil(missing_columns / 2)
    pixels = np.pad(pixels, ((0, 0), (above, missing_rows - above), (left, missing_columns - left)))
    top, first = (rows - height) // 2 + above, (columns - width) // 2 + left
    return pixels[:, top : top + height, first : first + width]


def _size(config: Mapping[str, Any], name: str) -> tuple[int, int] | int:
    size = config.get(name)
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if given.keys() == {"shortest_edge"} and _is_side(given["shortest_edge"]):
            return given["shortest_edge"]
    return _pair(config, name)


def _pair(config: Mapping[str, Any], name: str) -> tuple[int, int]:
    size = config.get(name)
    given = {} if not isinstance(size, Mapping) else {key: side for key, side in size.items() if side is not None}
    if given.keys() != {"height", "width"} or not all(map(_is_side, given.values())):
        raise ArgumentError(
            f"The image processor's setting {name}={size!r} cannot be exported: expected height and width"
            f"{', or shortest_edge' if name == 'size' else ''}. Export with processor=False to give finished "
            "pixel_values."
        )
    return given["height"], given["width"]


def _resample(config: Mapping[str, Any]) -> int:
    number = config.get("resample", Image.Resampling.BILINEAR)
    if number not in list(Image.Resampling):
        raise ArgumentError(f"The image processor's setting resample={number!r} is no filter of Pillow.")
    return int(number)


def _per_channel(config: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    values = config.get(name)
    listed = [values] * channels if isinstance(values, int | float) else values
    if not isinstance(listed, list | tuple) or len(listed) != channels or not all(map(_is_number, listed)):
        raise ArgumentError(f"The image processor's setting {name}={values!r} must have {channels} numbers.")
    return tuple(float(value) for value in listed)


def _number(config: Mapping[str, Any], name: str) -> float:
    if not _is_number(config.get(name)):
        raise ArgumentError(f"The image processor's setting {name}={config.get(name)!r} must be a number.")
    return float(config[name])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= 65_536
