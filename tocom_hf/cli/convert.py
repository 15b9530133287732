# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Convert checkpoints of the authors' repository into a plugin set, and timm DeiT or ViT weights into transformers'.

    tocom convert --plugins checkpoint.pth --model_name_or_path facebook/deit-base-patch16-224 \\
        --output_dir tocom-deit-base
    tocom convert --weights deit_base_patch16_224-b5f2ef4d.pth --output_dir deit-base

No code that a file may hold is run. timm is not needed.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tocom_hf.cli.endings import CommandParser, run_command
from tocom_hf.cli.loading import load_model


COMMAND = "tocom convert"
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--plugins", type=Path, help="Checkpoint of plugins from the authors' repository.")
    source.add_argument("--weights", type=Path, help="Weights of a timm DeiT or ViT (.pth, .bin or .safetensors).")
    parser.add_argument("--model_name_or_path", help="With --plugins: the backbone, in transformers' layout.")
    parser.add_argument("--max_r", type=int, default=16, help="Plugins in the checkpoint.")
    parser.add_argument("--scale", type=float, default=0.1, help="The scale that they were trained with.")
    parser.add_argument("--head_dim", type=int, default=64, help="With --weights: width of an attention head.")
    parser.add_argument(
        "--image_mean", type=float, nargs=3, default=IMAGENET_MEAN, help="With --weights: `mean` of timm's data_config."
    )
    parser.add_argument(
        "--image_std", type=float, nargs=3, default=IMAGENET_STD, help="With --weights: `std` of timm's data_config."
    )
    parser.add_argument(
        "--crop_pct", type=float, default=0.875, help="With --weights: `crop_pct` of timm's data_config."
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.max_r < 1 or args.head_dim < 1:
        parser.error("--max_r and --head_dim must be at least 1")
    if not 0 < args.crop_pct <= 1:
        parser.error("--crop_pct must be in (0, 1]")
    if args.plugins and not args.model_name_or_path:
        parser.error("--plugins needs --model_name_or_path, the backbone that they were trained for")
    return args


def convert(args: argparse.Namespace) -> None:
    if args.weights:
        save_classifier(args)
    else:
        save_plugins(args)


def save_classifier(args: argparse.Namespace) -> None:
    """Write timm's weights as a checkpoint of transformers, with the processor that prepares images for it."""
    from transformers import BitImageProcessorPil

    from tocom_hf.cli.official_weights import convert_weights, read_weights

    model = convert_weights(read_weights(args.weights), args.head_dim)
    side = model.config.image_size
    processor = BitImageProcessorPil(
        size={"shortest_edge": math.floor(side / args.crop_pct)},
        crop_size={"height": side, "width": side},
        resample=3,
        image_mean=args.image_mean,
        image_std=args.image_std,
    )
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    print(
        f"{type(model).__name__} written to {args.output_dir.resolve()}. Images are normalised by the mean "
        f"{args.image_mean} and the deviation {args.image_std}, of a crop of {args.crop_pct:g}: compare that with "
        "timm's data_config of the model (--image_mean, --image_std, --crop_pct)."
    )


def save_plugins(args: argparse.Namespace) -> None:
    """Write a checkpoint of plugins as a plugin set."""
    import torch
    from transformers import AutoModel

    from tocom_hf.cli.official_weights import convert_plugins, read_weights
    from tocom_hf.plugins.plugin_set import plugin_name

    model = load_model(AutoModel, args.model_name_or_path, dtype=torch.float32)
    tensors = read_weights(args.plugins)
    plugins = convert_plugins(tensors, model, args.max_r, args.scale, base_model=args.model_name_or_path)
    plugins.save_pretrained(args.output_dir)
    print(f"{plugins}, {plugin_name(0)} to {plugin_name(args.max_r - 1)}, written to {args.output_dir.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
