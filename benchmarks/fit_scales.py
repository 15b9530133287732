# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fitting scales in two commits of this repository, in turn on one machine.

    python benchmarks/fit_scales.py --before 8e40ea9      # against the working tree

Each commit runs in a process of its own. In each round both fit the same checkpoint by the same images, seed and steps.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from commits import AFTER, BEFORE, Worker, packages_of


EXAMPLES = Path(__file__).parents[1] / "examples"
COLUMNS = {
    "images": "images", "max_steps": "steps", "batch_size": "batch", "before_s": "before, s", "after_s": "after, s",
    "speed": "before over after", "difference": "largest difference of a factor", "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "Seconds are medians over rounds, *before over after* the median of the ratios of each round.",
    "The largest difference of an entry of `lora_B` between the two fitted sets, over the largest entry.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="A commit to compare the working tree with.")
    parser.add_argument("--checkpoint", type=Path, default=EXAMPLES / "digits" / "checkpoint")
    parser.add_argument("--plugins", type=Path, default=EXAMPLES.parent / "hub_cards" / "tocom-vit-mix")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "digits" / "test.parquet")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "fit_scales_cpu")
    # checkpoint, plugins, data, images, steps, batch size
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None and args.before is None:
        parser.error("--before is required: the commit to compare the working tree with.")
    return args


def work(checkpoint: str, plugins: str, data: str, count: int, max_steps: int, batch_size: int) -> None:
    """Answer every line of standard input, a folder to save the fitted set in, by the seconds that fitting took."""
    from transformers import AutoImageProcessor

    from tocom_hf import TocomModel, fit_scales, load_images, with_pixel_values

    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    images = with_pixel_values(load_images(data, split="test", max_samples=count), processor)
    images = [images[index] for index in range(len(images))]
    for line in sys.stdin:
        start = time.perf_counter()
        fitted = fit_scales(model, images, max_steps=max_steps, batch_size=batch_size)
        seconds = time.perf_counter() - start
        fitted.save_pretrained(line.strip())
        print(seconds, flush=True)


def distance(one: Path, other: Path) -> float:
    """The largest difference of what two fitted sets hold, over the largest of what one holds."""
    from tocom_hf import PluginSet

    first, second = PluginSet.from_pretrained(one), PluginSet.from_pretrained(other)
    differences, sizes = [], []
    for index in range(first.config.min_r, first.config.max_r):
        for path, factors in first.adapter(index).items():
            differences.append((factors.lora_B - second.adapter(index)[path].lora_B).abs().max().item())
            sizes.append(factors.lora_B.abs().max().item())
    return max(differences) / max(sizes)


def main() -> None:
    args = parse_args()
    if args.worker is not None:
        *paths, count, max_steps, batch_size = args.worker
        work(*paths, int(count), int(max_steps), int(batch_size))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sessions import Results, versions

    results = Results(
        args.output, f"Fitting scales in {args.before} and after", COLUMNS, NOTES, versions("torch", "transformers"),
        resume=False,
    )  # fmt: skip
    paths = [path.resolve() for path in (args.checkpoint, args.plugins, args.data)]
    arguments = [*paths, args.images, args.max_steps, args.batch_size]
    with packages_of(args.before) as packages, tempfile.TemporaryDirectory() as folder:
        workers = {commit: Worker(package, __file__, arguments) for commit, package in packages.items()}
        for commit, worker in workers.items():  # not counted
            worker.ask(str(Path(folder, commit)))
        seconds: dict[str, list[float]] = {commit: [] for commit in workers}
        for _ in range(args.rounds):
            for commit, worker in workers.items():
                seconds[commit].append(worker.ask(str(Path(folder, commit))))
        for worker in workers.values():
            worker.end()
        difference = distance(Path(folder, BEFORE), Path(folder, AFTER))
    ratios = [before / after for before, after in zip(seconds[BEFORE], seconds[AFTER], strict=True)]
    results.add([{
        "images": args.images, "max_steps": args.max_steps, "batch_size": args.batch_size,
        "before_s": round(statistics.median(seconds[BEFORE]), 2),
        "after_s": round(statistics.median(seconds[AFTER]), 2),
        "speed": round(statistics.median(ratios), 3), "difference": float(f"{difference:.1e}"), "rounds": args.rounds,
    }])  # fmt: skip


if __name__ == "__main__":
    main()
