# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Clips for models of video: rows of a data set that are lists of images, or videos, turned into `pixel_values`.

A model takes a fixed number of frames. They are drawn evenly over a clip, as the video processors of transformers do,
which refuse clips that have fewer.
"""

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from PIL import Image

from tocom_hf.data.colour import find_num_channels, to_channels
from tocom_hf.data.images import TrainingImages, load_columns, open_image
from tocom_hf.errors import ArgumentError, DatasetError, MissingExtraError, UnreadableImageError


def load_clips(
    name: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
    keep_columns: Sequence[str] = (),
) -> Any:
    """Load a data set of clips and check that it has what the job needs.

    Args:
        name: Hub name, a folder of videos or of parquet files, or a parquet file.
        split: The split, in the slicing syntax of `datasets`.
        config_name: Configuration of a Hub data set.
        image_column: Column of the clips: lists of images, which are the frames in their order, or videos.
        label_column: Column of the integer labels, where they are needed.
        max_samples: Keep only so many clips, drawn as in `load_images`.
        streaming: Read the clips as they come.
        keep_columns: Further columns to keep.

    Returns:
        The data set with the named columns only: a `datasets.Dataset`, with `streaming` a `datasets.IterableDataset`.

    Raises:
        DatasetError: if it cannot be loaded, is empty, lacks a column, or has no clips in it.
        MissingExtraError: if the clips are videos and nothing is installed that decodes them.
    """
    loaded = load_columns(
        name,
        "clip",
        image_column,
        label_column,
        _holds_clips,
        split=split,
        config_name=config_name,
        max_samples=max_samples,
        streaming=streaming,
        keep_columns=keep_columns,
    )
    if isinstance(loaded.features[image_column], datasets.Video):
        _require_video_decoder(image_column)
    return loaded


def with_clip_values(
    dataset: datasets.Dataset,
    processor: Any,
    num_frames: int,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    num_channels: int | None = None,
    size: tuple[int, int] | None = None,
) -> datasets.Dataset:
    """Process clips when they are read: samples become `pixel_values` `(frames, channels, height, width)` and `labels`.

    Args:
        dataset: What `load_clips` returned.
        processor: The model's video processor, or its image processor where that takes the frames of clips.
        num_frames: What the model takes. So many are drawn evenly over a clip, and only they are decoded.
        image_column: Column of the clips.
        label_column: Column of the labels, if they shall be in the samples.
        num_channels: What the model takes, 3 for RGB or 1 for grey; by default what the processor is made for.
        size: Height and width that the model takes; by default whatever the processor makes.

    Raises:
        ArgumentError: if the processor is made for another number of channels, or, when a sample is read, for images or
            for another size.
        DatasetError: when a sample is read that is damaged, or that has fewer frames than the model takes.
    """
    feature = dataset.features[image_column]
    num_channels = find_num_channels(processor, num_channels)
    reader = ClipReader(feature, image_column, num_frames, num_channels)
    return encoded_clips(dataset, image_column).with_transform(_Process(processor, reader, label_column, size))


def encoded_clips(dataset: Any, image_column: str) -> Any:
    """A data set whose images, clips or videos are read as paths and bytes, so that one that is damaged can be named.

    Args:
        dataset: Of images or of clips.
        image_column: Where they are.
    """
    feature = dataset.features[image_column]
    if isinstance(feature, datasets.Image | datasets.Video):
        return dataset.cast_column(image_column, replace(feature, decode=False))
    encoded = replace(feature, feature=datasets.Image(decode=False))
    if not isinstance(dataset, datasets.Dataset):  # a stream
        return dataset.cast_column(image_column, encoded)
    # cast_column would write all lists anew, although they are stored alike
    info = dataset.info.copy()
    info.features = datasets.Features({**dataset.features, image_column: encoded})
    table = dataset.data.replace_schema_metadata(None)
    as_encoded = datasets.Dataset(table, info=info, split=dataset.split, indices_table=dataset._indices)
    as_encoded.set_format(**dataset.format)
    return as_encoded


def draw_frames(total: int, num_frames: int) -> list[int]:
    """The numbers of the frames that a model sees of a clip: evenly over all of it, from the first on.

    Args:
        total: Frames of the clip, no fewer than the model takes.
        num_frames: Frames that the model takes.
    """
    return [index * total // num_frames for index in range(num_frames)]


@dataclass(frozen=True)
class ClipReader:
    """Decodes the frames of a clip that a model sees.

    Attributes:
        feature: What the column holds: a list of images, or a video.
        column: Its name, for messages.
        num_frames: Frames that the model takes.
        num_channels: 3 for RGB, 1 for grey.
    """

    feature: Any
    column: str
    num_frames: int
    num_channels: int

    def read(self, encoded: Any) -> list[Image.Image]:
        """The frames of one clip, all of one size.

        Args:
            encoded: The clip in a row of `encoded_clips`.

        Raises:
            UnreadableImageError: if it is damaged or missing.
            DatasetError: if it has fewer frames than the model takes, or frames of several sizes.
        """
        if not encoded:
            raise UnreadableImageError(f"The column {self.column!r} has a sample without a clip. Filter it out first.")
        is_video = isinstance(self.feature, datasets.Video)
        frames = self._read_video(encoded) if is_video else self._read_images(encoded)
        sizes = sorted({frame.size for frame in frames})
        if len(sizes) > 1:
            raise DatasetError(
                f"{self._name(encoded)} has frames of several sizes: {sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x "
                f"{sizes[1][1]} pixels. Each sample must be one clip."
            )
        return frames

    def _read_images(self, encoded: Sequence[Any]) -> list[Image.Image]:
        self._require_length(len(encoded), encoded)
        drawn = [encoded[index] for index in draw_frames(len(encoded), self.num_frames)]
        return [open_image(frame, self.column, self.num_channels) for frame in drawn]

    def _read_video(self, encoded: dict[str, Any]) -> list[Image.Image]:
        try:
            decoder = replace(self.feature, decode=True, dimension_order="NHWC").decode_example(encoded)
            total = len(decoder)
            indices = draw_frames(total, self.num_frames) if total >= self.num_frames else []
            frames = decoder.get_frames_at(indices=indices).data.cpu().numpy() if indices else []
        except Exception as error:  # torchcodec has no type of its own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            # what has a number comes from the operating system, and of a file elsewhere the network may have failed
            local = encoded["bytes"] is not None or "://" not in str(encoded["path"])
            lasting = local and not isinstance(error, MemoryError) and getattr(error, "errno", None) is None
            kind = UnreadableImageError if lasting else DatasetError
            raise kind(
                f"{self._name(encoded)} cannot be read: {reason}. Repair it or take it out of the data."
            ) from error
        self._require_length(total, encoded)
        return [to_channels(Image.fromarray(frame), self.num_channels) for frame in frames]

    def _require_length(self, total: int, encoded: Any) -> None:
        if total < self.num_frames:
            raise DatasetError(
                f"{self._name(encoded)} has {total} frame{'' if total == 1 else 's'}, and the model takes "
                f"{self.num_frames}. Take shorter clips out of the data, or repeat frames of theirs first."
            )

    def _name(self, encoded: Any) -> str:
        """What the user knows a clip by: its file, or that of its first frame."""
        is_video = isinstance(encoded, dict)
        first = encoded if is_video else encoded[0] or {}
        path, content = first.get("path"), first.get("bytes")
        name = ""
        if path is not None:
            name = f"{path} " if is_video else f"that begins with {path} "
        elif content is not None:
            digest = hashlib.sha256(content).hexdigest()[:12]
            name = f"whose {'file' if is_video else 'first frame'} has the SHA-256 {digest} "
        return f"The clip {name}in the column {self.column!r}"


class TrainingClips(TrainingImages):
    """Random views of clips for distillation: the same part of all frames of each, uint8.

    Args:
        clips: What `load_clips` returned.
        processor: The model's video processor, or its image processor where that takes the frames of clips.
        num_frames: What the model takes. So many are drawn evenly over a clip.
        image_column: Column of the clips.
        min_crop, flip, num_channels: As for `TrainingImages`. All frames of a clip are cut and mirrored alike.

    Attributes:
        num_channels: Channels of the views.
        image_mean, image_std: float32 `(channels,)`, what values in [0, 1] are normalised by.
        size: Height and width of the views.

    Raises:
        ArgumentError: if an argument is out of range, or the processor is made for another number of channels, or for
            images.
    """

    def __init__(
        self,
        clips: Any,
        processor: Any,
        num_frames: int,
        *,
        image_column: str = "image",
        min_crop: float = 0.08,
        flip: float = 0.5,
        num_channels: int | None = None,
    ):
        feature = clips.features[image_column]
        super().__init__(
            clips, processor, image_column=image_column, min_crop=min_crop, flip=flip, num_channels=num_channels
        )
        self.reader = ClipReader(feature, image_column, num_frames, self.num_channels)
        # looked up in what the processor does, because some scale to [-1, 1] before they normalise
        black, white = (self._process_shade(processor, shade) for shade in (0, 255))
        self.image_std = 1 / (white - black)
        self.image_mean = -black * self.image_std

    def _encoded(self, images: Any, image_column: str) -> Any:
        return encoded_clips(images, image_column)

    def _open(self, sample: dict[str, Any]) -> list[Image.Image]:
        return self.reader.read(sample[self.image_column])

    def _resize(self, frames: list[Image.Image], box: Any) -> torch.Tensor:
        """uint8 `(frames, channels, height, width)`."""
        return torch.stack([self._resize_image(frame, box) for frame in frames])

    def _process_shade(self, processor: Any, shade: int) -> torch.Tensor:
        """What the processor makes of the channels of a clip of one shade: float32 `(channels,)`."""
        height, width = self.size
        mode = "RGB" if self.num_channels == 3 else "L"
        frame = Image.new("RGB", (width, height), (shade, shade, shade)).convert(mode)
        values = process_frames(processor, [frame] * self.reader.num_frames, self.num_channels)
        return values.float().mean(dim=(0, 2, 3))


@dataclass(frozen=True)
class _Process:
    """The transform of `with_clip_values`; a class, so that worker processes can be started with any method."""

    processor: Any
    reader: ClipReader
    label_column: str | None
    size: tuple[int, int] | None

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        # one after the other, because the frames of a whole batch before resizing may not fit into memory
        clips = []
        for encoded in batch[self.reader.column]:
            frames = self.reader.read(encoded)
            clips.append(process_frames(self.processor, frames, self.reader.num_channels, self.size))
        sample: dict[str, Any] = {"pixel_values": clips}
        if self.label_column is not None:
            sample["labels"] = batch[self.label_column]
        return sample


def process_frames(
    processor: Any, frames: list[Image.Image], num_channels: int, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """The values of one clip, `(frames, channels, height, width)`.

    Args:
        processor, num_channels, size: As in `with_clip_values`.
        frames: All that the model takes.
    """
    # these frames are drawn already
    settings = {"do_sample_frames": False} if hasattr(processor, "do_sample_frames") else {}
    processed = processor([frames], return_tensors="pt", **settings)
    values = processed[processor.model_input_names[0]]
    if values.ndim != 5 or tuple(values.shape[:3]) != (1, len(frames), num_channels):
        raise ArgumentError(
            f"{type(processor).__name__} makes values of the shape {tuple(values.shape)} of one clip; expected "
            f"(1, {len(frames)}, {num_channels}, height, width). The model's own video processor is needed, or an "
            "image processor for clips, such as VideoMAEImageProcessor."
        )
    made = tuple(values.shape[-2:])
    if size is not None and made != size:
        raise ArgumentError(
            f"{type(processor).__name__} makes frames of {made[0]} x {made[1]} pixels, but the model takes "
            f"{size[0]} x {size[1]}. Correct size and crop_size in the settings of the checkpoint's processor."
        )
    return values[0]


def _holds_clips(feature: Any) -> bool:
    """Whether a feature is a video or a list of images."""
    if isinstance(feature, datasets.Video):
        return True
    return isinstance(feature, datasets.List | datasets.LargeList) and isinstance(feature.feature, datasets.Image)


def _require_video_decoder(column: str) -> None:
    """Import what decodes videos, which fails without its package and without FFmpeg."""
    try:
        importlib.import_module("torchcodec.decoders")
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MissingExtraError(
            f"The column {column!r} holds videos, which torchcodec decodes, and that cannot be imported ({reason}). "
            "Run: pip install torchcodec, and install FFmpeg; or store every clip as a list of images."
        ) from error
