# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Paint merged tokens over images: a row for each image, with the image and its groups at several r.

    tocom visualize --model_name_or_path facebook/deit-base-patch16-224 --images cat.jpg dog.jpg --output groups.png

A group of patches that were merged has their mean colour, and a line around it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tocom_hf.cli.endings import CommandParser, positive_integer, run_command
from tocom_hf.cli.loading import load_config, load_model, load_processor, refused_input, require_images, unmasked
from tocom_hf.errors import ArgumentError


if TYPE_CHECKING:
    import torch
    from PIL import Image

COMMAND = "tocom visualize"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Hub id or folder of a model.")
    parser.add_argument("--images", type=Path, nargs="*", help="Image files; by default the first of the data set.")
    parser.add_argument("--dataset_name", help="Hub name, folder of images, or parquet file.")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--num_images", type=positive_integer, default=5)
    parser.add_argument("--r", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layer", type=int, default=-1, help="Show the groups after this layer.")
    parser.add_argument("--size", type=positive_integer, default=168, help="Height of one picture in pixels.")
    parser.add_argument("--output", type=Path, default=Path("groups.png"))
    args = parser.parse_args(argv)
    if not args.images and args.dataset_name is None:
        parser.error("one of --images and --dataset_name is required")
    return args


def read_images(args: argparse.Namespace, num_channels: int) -> "list[Image.Image]":
    """The images to paint over, in the channels that the model takes."""
    from tocom_hf.data.decoding import decode_file
    from tocom_hf.data.images import load_images, read_column

    if args.images:
        return [decode_file(path, num_channels) for path in args.images]
    dataset = load_images(args.dataset_name, split=args.dataset_split, max_samples=args.num_images)
    return read_column(dataset, "image", num_channels)


def pictures_of(pixel_values: "torch.Tensor") -> "list[Image.Image]":
    """What the model sees: resized and cropped, and brought back from normalised values to [0, 255]."""
    from PIL import Image

    low = pixel_values.amin((1, 2, 3), keepdim=True)
    high = pixel_values.amax((1, 2, 3), keepdim=True)
    seen = (pixel_values - low) / (high - low).clamp(min=1e-6) * 255
    seen = seen.expand(-1, 3, -1, -1)  # of a grey image one channel is all three
    return [Image.fromarray(image) for image in seen.byte().permute(0, 2, 3, 1).numpy()]


def visualize(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModel

    from tocom_hf.data.colour import find_num_channels, model_channels
    from tocom_hf.merging.backbones import find_backbone
    from tocom_hf.merging.inputs import patch_grid
    from tocom_hf.merging.patching import apply_tome
    from tocom_hf.merging.tracing import trace_tokens
    from tocom_hf.visualization import paint_groups, tile

    if not args.output.suffix or not args.output.absolute().parent.is_dir():
        raise ArgumentError(f"--output {args.output} must be a picture, such as groups.png, in a folder that exists.")
    config = load_config(args.model_name_or_path)
    require_images(config, args.model_name_or_path)
    model = load_model(AutoModel, args.model_name_or_path, **unmasked(config)).eval()
    found = find_backbone(model)
    backbone = found.module  # of CLIP the vision part
    layers = len(found.layers)
    if not -layers <= args.layer < layers:
        raise ArgumentError(f"--layer {args.layer} is none of the model's {layers} layers.")
    processor = load_processor(args.model_name_or_path)
    images = read_images(args, find_num_channels(processor, model_channels(model.config)))
    with refused_input("The images cannot be prepared for the model"):
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    grid = patch_grid(found.dimensions.patch_size, pixel_values)
    if args.size < 3 * grid[0]:
        raise ArgumentError(f"--size {args.size} is too small for {grid[0]} rows of patches: 3 pixels each at least.")
    shown = pictures_of(pixel_values)
    cell = args.size // grid[0]
    rows = [[image.resize((grid[1] * cell, grid[0] * cell))] for image in shown]
    for r in args.r:
        with torch.no_grad(), trace_tokens(apply_tome(model, r)) as trace:
            backbone(pixel_values.to(backbone.dtype))
        positions = trace.positions[args.layer][:, trace.protected :]
        for row, image, own in zip(rows, shown, positions, strict=True):
            row.append(paint_groups(image, own, grid, size=args.size))
    with refused_input(f"--output {args.output} cannot be written"):
        tile(rows).save(args.output)
    print(f"{args.output}: a row for each of {len(rows)} images; the image, then r = {', '.join(map(str, args.r))}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, visualize, argv)


if __name__ == "__main__":
    sys.exit(main())
