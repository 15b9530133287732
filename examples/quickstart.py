# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Run the embedded checkpoint, fine-tuned on digits, at several degrees, plain and with ToCom, without a network.

python examples/quickstart.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tocom_hf.cli.endings import CommandParser, extras_or_exit, run_command
from tocom_hf.cli.loading import load_processor


COMMAND = "quickstart.py"

with extras_or_exit(COMMAND):
    import matplotlib

    from tocom_hf import DegreeResult, TocomModel, evaluate_degrees, load_images, match_labels, with_pixel_values

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt


HERE = Path(__file__).parent
EMBEDDED = HERE / "digits"
PLUGINS = HERE.parent / "hub_cards" / "tocom-vit-mix"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--model_name_or_path", default=str(EMBEDDED / "checkpoint"))
    parser.add_argument("--plugins", default=str(PLUGINS))
    parser.add_argument("--dataset_name", default=str(EMBEDDED / "test.parquet"))
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--source_r", type=int, default=None, help="Default: what the checkpoint records.")
    parser.add_argument("--target_r", type=int, nargs="+", default=[0, 2, 4, 6, 8])
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="Where the plot goes.")
    return parser.parse_args(argv)


def print_table(results: list[DegreeResult]) -> None:
    print("target_r  tokens kept  accuracy plain  accuracy ToCom  images/s  speed-up")
    for row in results:
        print(
            f"{row.target_r:8d}  {row.tokens:11d}  {row.accuracy_plain:14.1%}  {row.accuracy_tocom:14.1%}"
            f"  {row.images_per_second:8.0f}  {row.speedup:7.2f}x"
        )


def plot(results: list[DegreeResult], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    speed = [row.speedup for row in results]
    axes.plot(speed, [100 * row.accuracy_plain for row in results], "o--", color="0.5", label="token merging alone")
    axes.plot(speed, [100 * row.accuracy_tocom for row in results], "o-", color="tab:blue", label="with ToCom")
    for row in results:
        height = 100 * max(row.accuracy_plain, row.accuracy_tocom)
        axes.annotate(
            f"r = {row.target_r}", (row.speedup, height), xytext=(0, 6), textcoords="offset points", ha="center"
        )
    axes.set(xlabel="speed-up over r = 0", ylabel="accuracy (%)", title="One checkpoint, several costs")
    axes.margins(y=0.15)
    axes.legend()
    figure.savefig(path, dpi=150)


def compare(args: argparse.Namespace) -> None:
    model = TocomModel.from_pretrained(args.model_name_or_path, plugins=args.plugins, source_r=args.source_r)
    processor = load_processor(args.model_name_or_path)
    images = load_images(args.dataset_name, split=args.dataset_split, label_column="label")
    dataset = with_pixel_values(match_labels(images, model.config), processor, label_column="label")
    print(f"{len(images)} images of {Path(args.dataset_name).name}, weights trained at r = {model.source_r}")
    results = evaluate_degrees(model, dataset, args.target_r)
    print_table(results)
    plot(results, args.output)
    print(f"Plot: {args.output.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
