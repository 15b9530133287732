# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fit a scale for every layer and plugin to one checkpoint, on a few hundred unlabelled images of its task.

    tocom fit-scales --model_name_or_path deit-food101 --plugins tocom-deit-base --dataset_name food101 \\
        --output_dir tocom-deit-food101

The result is a plugin set for this checkpoint:
`TocomModel.from_pretrained("deit-food101", plugins="tocom-deit-food101", target_r=16)`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tocom_hf.cli.endings import CommandParser, run_command
from tocom_hf.cli.loading import load_config
from tocom_hf.cli.samples import SampleKind, add_image_options, load_samples


COMMAND = "tocom fit-scales"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Fine-tuned checkpoint: Hub id or folder.")
    parser.add_argument("--plugins", required=True, help="Plugin set of its backbone: Hub id or folder.")
    parser.add_argument("--source_r", type=int, help="The degree of the checkpoint, if it does not record it.")
    parser.add_argument("--target_r", type=int, nargs="+", help="Degrees to run at; default: all of the set.")
    add_image_options(parser)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--per_device_train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the plugin set.")
    return parser.parse_args(argv)


def fit(args: argparse.Namespace) -> None:
    import torch

    from tocom_hf.model.tocom_model import TocomModel
    from tocom_hf.scales.fitting import fit_scales

    kind = SampleKind.of(load_config(args.model_name_or_path), args.model_name_or_path)
    model = TocomModel.from_pretrained(
        args.model_name_or_path, plugins=args.plugins, source_r=args.source_r, dtype=torch.float32
    )
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    samples = load_samples(args, kind)
    plugins = fit_scales(
        model,
        samples,
        target_r=args.target_r,
        max_steps=args.max_steps,
        batch_size=args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    plugins.config.training["dataset"] = args.dataset_name
    plugins.config.training["dataset_split"] = args.dataset_split
    plugins.save_pretrained(args.output_dir)
    print(f"{plugins} written to {args.output_dir.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, fit, argv, extra="train")


if __name__ == "__main__":
    sys.exit(main())
