# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Measure what every degree costs on this machine: tokens, GFLOPs, latency, throughput and speed-up.

    tocom calibrate facebook/deit-base-patch16-224 --plugins tocom-deit-base --source_r 0 --batch_size 32 \\
        --output calibration.json --plot calibration.png

The file is what `TocomModel.from_pretrained(..., target_speedup=1.5, calibration="calibration.json")` picks its degree
from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tocom_hf.cli.endings import CommandParser, positive_integer, run_command
from tocom_hf.cli.loading import find_device
from tocom_hf.errors import ArgumentError


COMMAND = "tocom calibrate"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a checkpoint.")
    parser.add_argument("--plugins", help="Plugin set whose degrees to measure: Hub id or folder.")
    parser.add_argument("--source_r", type=int, help="The degree of the checkpoint, if it does not record it.")
    add_measuring_options(parser)
    parser.add_argument(
        "--target_r", type=int, nargs="+", help="Degrees to measure, besides 0; default: the set's, or 0 to 16."
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="How long to measure.")
    parser.add_argument("--output", type=Path, help="JSON file for the calibration.")
    parser.add_argument("--plot", type=Path, help="Picture of the speed-ups.")
    args = parser.parse_args(argv)
    check_measuring_options(parser, args)
    return args


def add_measuring_options(parser: CommandParser) -> None:
    """The options for what is run, which `tocom merge-report` has too."""
    parser.add_argument(
        "--image_size",
        type=positive_integer,
        nargs="+",
        help="Height and width of the images in pixels; default: the checkpoint's.",
    )
    parser.add_argument("--batch_size", type=positive_integer, default=1, help="Images per forward pass.")
    parser.add_argument("--device", help="Where to measure, such as cuda; default: an accelerator if there is one.")


def check_measuring_options(parser: CommandParser, args: argparse.Namespace) -> None:
    """What `add_measuring_options` cannot check alone; afterwards `image_size` is `None` or a height and a width."""
    if args.image_size is not None and len(args.image_size) > 2:
        parser.error("--image_size takes one number, or two: height and width")
    if args.image_size is not None:
        args.image_size = (args.image_size[0], args.image_size[-1])
    if not args.seconds >= 0:
        parser.error(f"--seconds must not be negative, got {args.seconds:g}")


def measuring_device(name: str | None) -> Any:
    """The device with this name; without a name an accelerator if there is one, else the CPU."""
    import torch

    if name is None and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return find_device(name or "cpu")


def load_checkpoint(args: argparse.Namespace) -> Any:
    """The model with its plugins, all degrees of which it can run at."""
    from tocom_hf.model.checkpoint import Checkpoint
    from tocom_hf.model.tocom_model import TocomModel

    source_r = args.source_r
    config, _ = Checkpoint(args.model, {}).config(None, {})
    if source_r is None and args.plugins is None and not getattr(config, "tocom", None):
        # The degree that the weights were trained at says what plugins do to them, and nothing about cost.
        source_r = 0
    model = TocomModel.from_pretrained(args.model, plugins=args.plugins, source_r=source_r)
    if model.plugins is not None:
        for degree in args.target_r or ():
            model.plugins.require(model.source_r, degree)
    return model


def require_writable(*paths: Path | None) -> None:
    """Make the folders of the results, before there are any that could be lost."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise ArgumentError(f"{path} is a folder; expected the file to write.")
        path.parent.mkdir(parents=True, exist_ok=True)


def calibrate_checkpoint(args: argparse.Namespace) -> None:
    if args.plot is not None:
        import matplotlib  # noqa: F401  # before the measurement that it would be missed after

    from tocom_hf.cost.calibration import calibrate

    require_writable(args.output, args.plot)
    device = measuring_device(args.device)
    model = load_checkpoint(args).to(device)
    calibration = calibrate(model, args.image_size, args.batch_size, degrees=args.target_r, seconds=args.seconds)
    print(calibration)
    if args.output is not None:
        calibration.to_json_file(args.output)
        print(f"Written to {args.output.resolve()}")
    if args.plot is not None:
        calibration.plot(args.plot)
        print(f"Plot: {args.plot.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, calibrate_checkpoint, argv)


if __name__ == "__main__":
    sys.exit(main())
