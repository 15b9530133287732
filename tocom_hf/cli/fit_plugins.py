# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fit a plugin set to a model in closed form, on a few hundred unlabelled images, in minutes.

    tocom fit-plugins --model_name_or_path facebook/dinov2-small --dataset_name food101 --dataset_split "train[:400]" \\
        --max_r 20 --output_dir tocom-dinov2-small-food101

The result is an ordinary plugin set, for weights trained at --source_r:
`TocomModel.from_pretrained("dinov2-small-food101", plugins="tocom-dinov2-small-food101", source_r=0, target_r=16)`.
`tocom distill --init_plugins` trains it further.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tocom_hf.cli.endings import CommandParser, positive_integer, run_command
from tocom_hf.cli.loading import load_config, load_model, unmasked
from tocom_hf.cli.samples import SampleKind, add_image_options, load_samples
from tocom_hf.errors import ArgumentError


COMMAND = "tocom fit-plugins"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Pre-trained or fine-tuned: Hub id or folder.")
    parser.add_argument("--max_r", type=positive_integer, required=True, help="Largest degree of the set.")
    parser.add_argument("--degrees", type=int, nargs="+", help="Degrees to fit; default: eight up to max_r.")
    parser.add_argument("--source_r", type=int, default=0, help="The degree that the weights were trained at.")
    parser.add_argument("--rank", type=positive_integer, default=2, help="Rank h of one plugin.")
    parser.add_argument("--merge_recipe", help="JSON file of `tocom find-recipe`; default: ToMe's rule.")
    parser.add_argument(
        "--no_proportional_attention",
        dest="proportional_attention",
        action="store_false",
        help="Do not add the log of token sizes to attention logits.",
    )
    add_image_options(parser)
    parser.add_argument(
        "--num_eval_images", type=int, default=64, help="Images to hold out, for the agreement that is recorded."
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="What to store the set in.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the plugin set.")
    return parser.parse_args(argv)


def fit(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModel

    from tocom_hf.distillation.distill import hold_out
    from tocom_hf.distillation.fit_plugins import fit_plugins
    from tocom_hf.merging.recipes import MergeRecipe

    if args.num_eval_images < 0:
        raise ArgumentError(f"--num_eval_images must not be negative, got {args.num_eval_images}.")
    config = load_config(args.model_name_or_path)
    kind = SampleKind.of(config, args.model_name_or_path)
    recipe = None if args.merge_recipe is None else MergeRecipe.load(args.merge_recipe)
    model = load_model(AutoModel, args.model_name_or_path, dtype=torch.float32, **unmasked(config)).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    samples, eval_samples = load_samples(args, kind), None
    if args.num_eval_images:
        samples, eval_samples = hold_out(samples, args.num_eval_images)
    plugins = fit_plugins(
        model,
        samples,
        max_r=args.max_r,
        degrees=args.degrees,
        source_r=args.source_r,
        rank=args.rank,
        recipe=recipe,
        proportional_attention=args.proportional_attention,
        eval_images=eval_samples,
        base_model=args.model_name_or_path,
        report=lambda line: print(line, flush=True),
    )
    plugins.config.base_model_revision = getattr(model.config, "_commit_hash", None)
    plugins.config.training["dataset"] = args.dataset_name
    plugins.config.training["dataset_split"] = args.dataset_split
    plugins.save_pretrained(args.output_dir, dtype=args.dtype)
    print(f"{plugins} written to {args.output_dir.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, fit, argv, extra="train")


if __name__ == "__main__":
    sys.exit(main())
