# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The data that a command reads for a model: images, or clips for a model of video."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_hf.cli.loading import load_processor, refused_input
from tocom_hf.errors import ArgumentError, DatasetError, MissingExtraError, UnsupportedModelError


if TYPE_CHECKING:
    import datasets
    import numpy as np


@dataclass(frozen=True)
class SampleKind:
    """What a model takes, and how it is loaded and processed.

    Attributes:
        num_channels: Of each image, or of each frame.
        num_frames: Frames of a clip; `None` for images.
        size: Height and width of a clip, which models take at one size only; `None` for images.
    """

    num_channels: int
    num_frames: int | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: Any, name: str | Path) -> "SampleKind":
        """What a model takes, before any data are loaded.

        Args:
            config: Of the model.
            name: What to call it in the message.

        Raises:
            UnsupportedModelError: if it takes neither images nor clips.
        """
        from tocom_hf.data.colour import model_channels
        from tocom_hf.merging.architectures import ARCHITECTURES, supported_parts
        from tocom_hf.merging.inputs import as_pair

        parts = [(part, ARCHITECTURES[part.model_type]) for part in supported_parts(config)]
        kinds = {architecture.inputs for _, architecture in parts}
        if not kinds or "images" in kinds:
            return cls(model_channels(config))
        for part, architecture in parts:
            if architecture.inputs == "clips":
                frames, channels, size = (getattr(part, name) for name in architecture.clip_sizes)
                return cls(channels, frames, as_pair(size))
        raise UnsupportedModelError(
            f"{name} takes {' and '.join(sorted(kinds))} ({config.model_type}), and this command reads images and "
            "clips. From Python, apply_tome, calibrate and distill take such models, with samples of finished "
            "pixel_values."
        )

    @property
    def noun(self) -> str:
        """What the samples are: images or clips."""
        return "images" if self.num_frames is None else "clips"

    def load(self, name: str, **arguments: Any) -> Any:
        """What `load_images` does, and for clips `load_clips`, which takes the same arguments."""
        from tocom_hf.data.clips import load_clips
        from tocom_hf.data.images import load_images

        return load_images(name, **arguments) if self.num_frames is None else load_clips(name, **arguments)

    def load_processor(self, name: str | Path, **arguments: Any) -> Any:
        """The processor of a checkpoint, made for what the model takes."""
        from tocom_hf.data.colour import find_num_channels

        load = load_processor if self.num_frames is None else load_clip_processor
        processor = load(name, **arguments)
        find_num_channels(processor, self.num_channels)
        if self.num_frames is not None and self.size is not None:
            with refused_input(f"The processor of {str(name)!r} cannot process clips"):
                self._try_out(processor, self.num_frames, self.size)
        return processor

    def process(
        self, dataset: "datasets.Dataset", processor: Any, *, image_column: str, label_column: str | None = None
    ) -> "datasets.Dataset":
        """Process samples when they are read, as `with_pixel_values` does."""
        from tocom_hf.data.clips import with_clip_values
        from tocom_hf.data.images import with_pixel_values

        columns: dict[str, Any] = {
            "image_column": image_column,
            "label_column": label_column,
            "num_channels": self.num_channels,
        }
        if self.num_frames is None:
            return with_pixel_values(dataset, processor, **columns)
        return with_clip_values(dataset, processor, self.num_frames, size=self.size, **columns)

    def reader(self, dataset: Any, processor: Any, image_column: str) -> "Callable[[Any], np.ndarray]":
        """What makes the input of a single sample, float32, of an image or clip that is not decoded yet.

        Threads may call it at once. It raises `DatasetError` where a sample cannot be read or prepared.

        Args:
            dataset: What `load` returned.
            processor: What `load_processor` returned.
            image_column: Column of the images or clips.
        """
        from tocom_hf.data.clips import ClipReader, process_frames
        from tocom_hf.data.images import open_image

        num_channels, num_frames, size = self.num_channels, self.num_frames, self.size
        if num_frames is not None:
            clips = ClipReader(dataset.features[image_column], image_column, num_frames, num_channels)
            return lambda encoded: process_frames(processor, clips.read(encoded), num_channels, size).float().numpy()

        def read(encoded: Any) -> "np.ndarray":
            image = open_image(encoded, image_column, num_channels)
            try:
                processed = processor([image], return_tensors="pt")["pixel_values"]
            except ValueError as error:  # such as for an image of a single row of pixels
                raise DatasetError(
                    f"{type(processor).__name__} cannot prepare an image of {image.width} x {image.height} pixels: "
                    f"{error}. Take it out of the data."
                ) from error
            return processed[0].float().numpy()

        return read

    def views(self, dataset: Any, processor: Any, **settings: Any) -> Any:
        """Random views for distillation: `TrainingImages` or `TrainingClips`, with settings that both have."""
        from tocom_hf.data.clips import TrainingClips
        from tocom_hf.data.images import TrainingImages

        if self.num_frames is None:
            return TrainingImages(dataset, processor, num_channels=self.num_channels, **settings)
        clips = TrainingClips(dataset, processor, self.num_frames, num_channels=self.num_channels, **settings)
        if clips.size != self.size:
            raise ArgumentError(
                f"The settings of the checkpoint's processor name {clips.size} as height and width of the frames, but "
                f"the model takes {self.size}. Correct size and crop_size there."
            )
        return clips

    def _try_out(self, processor: Any, num_frames: int, size: tuple[int, int]) -> None:
        """Process a clip that is wide and black, before any data are loaded."""
        from PIL import Image

        from tocom_hf.data.clips import process_frames

        frame = Image.new("RGB" if self.num_channels == 3 else "L", (2 * size[1], size[0]))
        process_frames(processor, [frame] * num_frames, self.num_channels, size)


def load_clip_processor(name: str | Path, **arguments: Any) -> Any:
    """The processor of a checkpoint of video.

    Those of VideoMAE and ViViT have an image processor that takes the frames of a clip, and that runs without
    torchvision. Others have a video processor only.

    Raises:
        MissingExtraError: if it has a video processor only, and torchvision is not installed.
        ArgumentError: if it has neither.
    """
    from transformers import AutoImageProcessor
    from transformers.utils import is_torchvision_available

    try:
        return AutoImageProcessor.from_pretrained(name, **arguments)
    except (OSError, ValueError) as error:
        without_image_processor = error
    if not is_torchvision_available():
        raise MissingExtraError(
            f"{name} has no image processor for the frames of clips (preprocessor_config.json), and the video "
            "processors of transformers need torchvision, which is not installed. Run: pip install torchvision"
        ) from without_image_processor
    from transformers import AutoVideoProcessor

    with refused_input(f"The video processor of {str(name)!r} cannot be loaded"):
        return AutoVideoProcessor.from_pretrained(name, **arguments)


def load_samples(args: argparse.Namespace, kind: SampleKind) -> Any:
    """The images or clips that a command was given, drawn at random, each decoded and processed once for many uses.

    Args:
        args: With the options of `add_image_options`, and the name of the model.
        kind: What the model takes.

    Returns:
        A list of samples with `pixel_values`.
    """
    return load_samples_and_more(args, kind, 0)[0]


def load_samples_and_more(args: argparse.Namespace, kind: SampleKind, more: int) -> tuple[Any, Any]:
    """What `load_samples` does, and up to so many further samples that are decoded when they are read, or `None`."""
    processor = kind.load_processor(args.model_name_or_path)
    loaded = kind.load(
        args.dataset_name,
        split=args.dataset_split,
        config_name=args.dataset_config_name,
        image_column=args.image_column,
        max_samples=args.max_samples + more,
    )
    if more:
        loaded = loaded.shuffle(seed=0)  # all of a small data set come in its own order
    processed = kind.process(loaded, processor, image_column=args.image_column)
    count = min(args.max_samples, len(processed))
    rest = processed.select(range(count, len(processed))) if len(processed) > count else None
    return [processed[i] for i in range(count)], rest


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that chooses by a few hundred images or clips."""
    parser.add_argument("--dataset_name", required=True, help="Hub name, folder of images, or parquet file.")
    parser.add_argument("--dataset_config_name", help="Configuration of a Hub data set.")
    parser.add_argument("--dataset_split", default="train", help="Split to take images from.")
    parser.add_argument(
        "--image_column", default="image", help="Column of the images, or of the clips: lists of images, or videos."
    )
    parser.add_argument("--max_samples", type=int, default=200, help="Images or clips, drawn at random, all in memory.")


def one_kind(kinds: dict[str, SampleKind]) -> SampleKind:
    """What all checkpoints take alike.

    Args:
        kinds: What each takes, by its name.

    Raises:
        ArgumentError: if some take images and others clips.
    """
    by_noun = {kind.noun: name for name, kind in kinds.items()}
    if len(by_noun) > 1:
        raise ArgumentError(
            f"{by_noun['images']} takes images and {by_noun['clips']} takes clips. Evaluate them one after the other, "
            "each on data of its kind."
        )
    return next(iter(kinds.values()))
